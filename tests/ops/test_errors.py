"""Wrong input names the argument, the contract and what came, in the same words everywhere."""

import re
from math import inf, nan

import pytest
import torch

import moe_ext
from moe_ext import CosineRouter, Experts, GroupedExperts, ModuleExperts, MoE, MOELayer, TopKGate
from moe_ext.ops import reference, registry

T, K, E, H = 33, 2, 8, 4
EXPERTS = torch.stack([torch.arange(T) % E, (torch.arange(T) + 3) % E], dim=1).to(torch.int32)
PLAN = moe_ext.make_plan(EXPERTS, E)
R = len(PLAN.sources)
X, ROWS, W = torch.randn(T, H), torch.randn(R, H), torch.rand(T, K)
LOGITS, PROBS = torch.randn(T, E), torch.randn(T, E).softmax(-1)
STACK = torch.randn(E, 3, H)

GOOD = {
    "gate": dict(
        logits=LOGITS, choice_scores=LOGITS, k=K, scoring="softmax", normalize=False, scale=1.0
    ),
    "gate_backward": dict(
        grad_weights=W,
        grad_probs=None,
        grad_importance=torch.ones(E),
        probs=PROBS,
        expert_ids=EXPERTS,
        scoring="softmax",
        normalize=False,
        scale=1.0,
    ),
    "plan": dict(
        expert_ids=EXPERTS, priority=W, num_experts=E, capacity=5, order="choice", align=1
    ),
    "mask_weights": dict(weights=W, slots=PLAN.slots, normalize=True, eps=1e-9, scale=1.0),
    "mask_weights_backward": dict(
        grad=W, weights=W, slots=PLAN.slots, normalize=True, eps=1e-9, scale=1.0
    ),
    "dispatch": dict(tokens=X, slots=PLAN.slots, sources=PLAN.sources, weights=W),
    "combine": dict(rows=ROWS, slots=PLAN.slots, sources=PLAN.sources, weights=W),
    "route_dot": dict(tokens=X, rows=ROWS, slots=PLAN.slots, sources=PLAN.sources),
    "combine_backward": dict(
        tokens=X, rows=ROWS, slots=PLAN.slots, sources=PLAN.sources, weights=W
    ),
    "grouped_mm": dict(
        rows=ROWS,
        weights=STACK,
        bias=STACK[:, :, 0],
        offsets=PLAN.offsets,
        load=PLAN.load,
        capacity=None,
    ),
    "grouped_outer": dict(
        left=torch.randn(R, 3), right=ROWS, offsets=PLAN.offsets, load=PLAN.load, capacity=None
    ),
    "activate": dict(
        pre_activation=ROWS, slots=PLAN.slots, sources=PLAN.sources, weights=W, activation="swiglu"
    ),
    "activate_backward": dict(
        grad=ROWS[:, :2],
        pre_activation=ROWS,
        slots=PLAN.slots,
        sources=PLAN.sources,
        weights=W,
        activation="swiglu",
    ),
}

# (operator, what is wrong, the message after "operator: ")
SHAPE_AND_TYPE = [
    ("gate", {"logits": LOGITS[0]}, "logits must be [T, E], got [8]"),
    (
        "gate",
        {"logits": LOGITS.long()},
        "logits must be float32, float64, bfloat16 or float16, got int64",
    ),
    ("gate", {"k": 9}, "k must be in 1..E with E = 8, got 9"),
    ("gate", {"k": 0}, "k must be in 1..E with E = 8, got 0"),
    ("gate", {"logits": LOGITS[:, :0]}, "k must be in 1..E with E = 0, got 2"),
    (
        "gate",
        {"choice_scores": LOGITS[:32]},
        "choice_scores must be [T, E] with T = 33, E = 8, got [32, 8]",
    ),
    (
        "gate",
        {"choice_scores": LOGITS.double()},
        "choice_scores must be float32 like logits, got float64",
    ),
    (
        "gate",
        {"scoring": "tanh"},
        "scoring must be softmax, sigmoid or sqrtsoftplus, got tanh",
    ),
    ("gate_backward", {"probs": PROBS.bfloat16()}, "probs must be float32, got bfloat16"),
    ("gate_backward", {"expert_ids": EXPERTS.long()}, "expert_ids must be int32, got int64"),
    (
        "gate_backward",
        {"expert_ids": EXPERTS[:2]},
        "expert_ids must be [T, K] with T = 33, got [2, 2]",
    ),
    (
        "gate_backward",
        {"grad_weights": W[:, :1]},
        "grad_weights must be [T, K] with T = 33, K = 2, got [33, 1]",
    ),
    (
        "gate_backward",
        {"grad_importance": W},
        "grad_importance must be [E] with E = 8, got [33, 2]",
    ),
    (
        "gate_backward",
        {"grad_probs": PROBS.double()},
        "grad_probs must be float32 like probs, got float64",
    ),
    ("mask_weights", {"weights": W.half()}, "weights must be float32, got float16"),
    (
        "mask_weights",
        {"slots": PLAN.slots[:9]},
        "weights must be [T, K] with T = 9, K = 2 like the plan's slots [9, 2], got [33, 2]",
    ),
    ("mask_weights", {"eps": nan}, "eps must be finite, got nan"),
    ("mask_weights", {"eps": -nan}, "eps must be finite, got nan"),
    ("mask_weights", {"scale": inf}, "scale must be finite, got inf"),
    ("mask_weights_backward", {"eps": -inf}, "eps must be finite, got -inf"),
    ("mask_weights_backward", {"scale": nan}, "scale must be finite, got nan"),
    ("gate", {"scale": nan}, "scale must be finite, got nan"),
    ("gate_backward", {"scale": -inf}, "scale must be finite, got -inf"),
    ("mask_weights", {"slots": PLAN.slots.long()}, "slots must be int32, got int64"),
    ("mask_weights_backward", {"weights": W[0]}, "weights must be [T, K], got [2]"),
    (
        "mask_weights_backward",
        {"grad": W[:, :1]},
        "grad must be [T, K] with T = 33, K = 2, got [33, 1]",
    ),
    (
        "mask_weights_backward",
        {"grad": W.double()},
        "grad must be float32 like weights, got float64",
    ),
    (
        "gate_backward",
        {"scoring": ""},
        "scoring must be softmax, sigmoid or sqrtsoftplus, got ",
    ),
    ("plan", {"expert_ids": EXPERTS[:, 0]}, "expert_ids must be [T, K], got [33]"),
    ("plan", {"expert_ids": EXPERTS.long()}, "expert_ids must be int32, got int64"),
    ("plan", {"priority": W[1:]}, "priority must be [T, K] with T = 33, K = 2, got [32, 2]"),
    ("plan", {"priority": W.double()}, "priority must be float32, got float64"),
    ("plan", {"num_experts": 0}, "num_experts must be at least 1, got 0"),
    ("plan", {"order": "expert"}, "order must be choice or token, got expert"),
    ("plan", {"align": 0, "capacity": None}, "align must be at least 1, got 0"),
    ("plan", {"align": 8}, "align must be 1 where there is a capacity, got 8"),
    ("plan", {"capacity": -1}, "capacity must not be negative, got -1"),
    ("plan", {"capacity": 2**31}, "capacity must be below 2147483648, got 2147483648"),
    ("plan", {"capacity": 2**29}, "rows must be below 2147483648, got 4294967296"),
    ("dispatch", {"tokens": X[0]}, "tokens must be [T, H], got [4]"),
    (
        "dispatch",
        {"tokens": X.int()},
        "tokens must be float32, float64, bfloat16 or float16, got int32",
    ),
    (
        "dispatch",
        {"tokens": X[:32]},
        "tokens must be [T, H] with T = 33 like the plan's slots [33, 2], got [32, 4]",
    ),
    ("dispatch", {"slots": PLAN.slots.long()}, "slots must be int32, got int64"),
    ("dispatch", {"sources": PLAN.sources.view(-1, 1)}, f"sources must be [R], got [{R}, 1]"),
    ("dispatch", {"sources": PLAN.sources.long()}, "sources must be int32, got int64"),
    (
        "dispatch",
        {"weights": W.T},
        "weights must be [T, K] with T = 33, K = 2 like the plan's slots [33, 2], got [2, 33]",
    ),
    ("dispatch", {"weights": W.bfloat16()}, "weights must be float32, got bfloat16"),
    ("dispatch", {"tokens": X.double()}, "weights must be float64, got float32"),
    ("combine", {"rows": ROWS[0]}, "rows must be [R, H], got [4]"),
    (
        "combine",
        {"rows": ROWS[1:]},
        "rows must be [R, H] with R = 66 like the plan's sources [66], got [65, 4]",
    ),
    (
        "combine",
        {"rows": ROWS.bool()},
        "rows must be float32, float64, bfloat16 or float16, got bool",
    ),
    ("combine", {"slots": PLAN.slots[:, 0]}, "slots must be [T, K], got [33]"),
    (
        "combine",
        {"weights": W[:, :1]},
        "weights must be [T, K] with T = 33, K = 2 like the plan's slots [33, 2], got [33, 1]",
    ),
    (
        "combine",
        {"rows": ROWS.half(), "weights": W.double()},
        "weights must be float32, got float64",
    ),
    ("route_dot", {"rows": ROWS[:, :3]}, "rows must be [R, H] with H = 4, got [66, 3]"),
    ("route_dot", {"rows": ROWS.double()}, "rows must be float32 like tokens, got float64"),
    (
        "route_dot",
        {"tokens": X[:5]},
        "tokens must be [T, H] with T = 33 like the plan's slots [33, 2], got [5, 4]",
    ),
    (
        "route_dot",
        {"rows": ROWS[:-1]},
        "rows must be [R, H] with R = 66 like the plan's sources [66], got [65, 4]",
    ),
    ("combine_backward", {"rows": ROWS.double()}, "rows must be float32 like tokens, got float64"),
    (
        "combine_backward",
        {"tokens": X[:5]},
        "tokens must be [T, H] with T = 33 like the plan's slots [33, 2], got [5, 4]",
    ),
    ("combine_backward", {"weights": W.double()}, "weights must be float32, got float64"),
    ("grouped_mm", {"rows": ROWS[0]}, "rows must be [R, M], got [4]"),
    ("grouped_mm", {"weights": STACK[0]}, "weights must be [E, N, M] with M = 4, got [3, 4]"),
    ("grouped_mm", {"weights": STACK.half()}, "weights must be float32 like rows, got float16"),
    ("grouped_mm", {"bias": STACK[:7, :, 0]}, "bias must be [E, N] with E = 8, N = 3, got [7, 3]"),
    ("grouped_mm", {"bias": STACK[:, :, 0].half()}, "bias must be float32 like rows, got float16"),
    ("grouped_mm", {"capacity": 9}, "capacity must be R / E with R = 66, E = 8, got 9"),
    ("grouped_outer", {"capacity": 9}, "capacity must be R / E with R = 66, E = 8, got 9"),
    # Eight times as much is 2 ** 64, of which 64 bits keep 0.
    (
        "grouped_mm",
        {"rows": ROWS[:0], "capacity": 2**61},
        f"capacity must be R / E with R = 0, E = 8, got {2**61}",
    ),
    (
        "grouped_mm",
        {"weights": STACK[:7], "bias": None},
        "weights must be [E, N, M] with E = 8 like the plan's load [8], got [7, 3, 4]",
    ),
    ("activate", {"pre_activation": ROWS[0]}, "pre_activation must be [R, G], got [4]"),
    ("activate", {"pre_activation": ROWS[:, :3]}, "pre_activation must be [R, 2F], got [R, 3]"),
    (
        "activate",
        {"pre_activation": ROWS[1:]},
        "pre_activation must be [R, G] with R = 66 like the plan's sources [66], got [65, 4]",
    ),
    (
        "activate",
        {"activation": "silu"},
        "activation must be swiglu, geglu, gelu or relu, got silu",
    ),
    ("activate", {"weights": W.half()}, "weights must be float32, got float16"),
    ("activate_backward", {"grad": ROWS}, "grad must be [R, F] with R = 66, F = 2, got [66, 4]"),
    (
        "activate_backward",
        {"grad": ROWS[:, :2].half()},
        "grad must be float32 like pre_activation, got float16",
    ),
    ("activate_backward", {"weights": W.double()}, "weights must be float32, got float64"),
    ("grouped_mm", {"load": PLAN.load.view(2, 4)}, "load must be [E], got [2, 4]"),
    ("grouped_mm", {"offsets": PLAN.load}, "offsets must be [E+1] with E+1 = 9, got [8]"),
    ("grouped_mm", {"offsets": PLAN.offsets.long()}, "offsets must be int32, got int64"),
    ("grouped_outer", {"right": ROWS[1:]}, "right must be [R, M] with R = 66, got [65, 4]"),
    ("grouped_outer", {"right": ROWS.bfloat16()}, "right must be float32 like left, got bfloat16"),
    ("grouped_outer", {"load": PLAN.load.long()}, "load must be int32, got int64"),
]

META = [
    (name, {argument: value.to("meta")})
    for name, arguments in GOOD.items()
    for argument, value in arguments.items()
    if isinstance(value, torch.Tensor)
]


def call(name, wrong, where):
    arguments = {**GOOD[name], **wrong}
    if where == "reference":
        return getattr(reference, name)(**arguments)
    if where == "fake":
        mode = torch._subclasses.FakeTensorMode()
        arguments = {
            k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
            for k, v in arguments.items()
        }
        with mode:
            return getattr(torch.ops.moe_ext, name)(*arguments.values())
    return getattr(torch.ops.moe_ext, name)(*arguments.values())


@pytest.mark.parametrize("name", registry.NAMES)
@pytest.mark.parametrize("where", ["compiled", "reference", "fake"])
def test_the_good_arguments_are_good(name, where):
    call(name, {}, where)


@pytest.mark.parametrize("where", ["compiled", "reference", "fake"])
@pytest.mark.parametrize(("name", "wrong", "message"), SHAPE_AND_TYPE)
def test_shape_and_type(name, wrong, message, where):
    with pytest.raises(RuntimeError) as error:
        call(name, wrong, where)
    # torch adds lines of its own after the message.
    assert str(error.value).split("\n")[0].rstrip() == f"{name}: {message}".rstrip()


@pytest.mark.parametrize(("name", "wrong"), META)
def test_device(name, wrong):
    with pytest.raises(RuntimeError, match=rf"{name}: \w+ must be on (cpu|meta) like \w+, got"):
        call(name, wrong, "compiled")


def with_value(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


OTHER = moe_ext.make_plan(EXPERTS.flip(0), E)

VALUES = [
    (
        "plan",
        {"expert_ids": with_value(EXPERTS, (3, 1), 8)},
        "expert_ids must be in -1..E-1 with E = 8, got 8 at [3, 1]",
    ),
    (
        "plan",
        {"expert_ids": with_value(EXPERTS, (4, 0), -2)},
        "expert_ids must be in -1..E-1 with E = 8, got -2 at [4, 0]",
    ),
    (
        "gate_backward",
        {"expert_ids": with_value(EXPERTS, (3, 1), -1)},
        "expert_ids must be in 0..E-1 with E = 8, got -1 at [3, 1]",
    ),
    *(
        (
            name,
            {"slots": with_value(PLAN.slots, (5, 1), slot)},
            f"slots must be in -1..R-1 with R = 66, got {slot} at [5, 1]",
        )
        for name in ("dispatch", "combine", "route_dot", "combine_backward")
        for slot in (66, -2)
    ),
    (
        "dispatch",
        {"sources": with_value(PLAN.sources, int(PLAN.slots[5, 1]), 66)},
        "slots and sources must be of one plan, got slot",
    ),
    (
        "dispatch",
        {
            "slots": with_value(PLAN.slots, (5, 1), -1),
            "sources": with_value(PLAN.sources, int(PLAN.slots[5, 1]), 66),
        },
        "sources must be in -1..T*K-1 with T*K = 66, got 66 at [",
    ),
    (
        "dispatch",
        {"slots": with_value(PLAN.slots, (5, 1), -1)},
        "slots and sources must be of one plan, got route 11 at sources[",
    ),
    (
        "combine_backward",
        {"slots": with_value(PLAN.slots, (5, 1), -1)},
        "slots and sources must be of one plan, got route 11 at sources[",
    ),
    *(
        (name, {"slots": OTHER.slots}, "slots and sources must be of one plan, got slot")
        for name in (
            *("dispatch", "combine", "route_dot", "combine_backward"),
            *("activate", "activate_backward"),
        )
    ),
    *(
        (
            name,
            {"slots": with_value(PLAN.slots, (5, 1), -1)},
            "slots and sources must be of one plan, got route 11 at sources[",
        )
        for name in ("activate", "activate_backward")
    ),
    (
        "grouped_mm",
        {"offsets": with_value(PLAN.offsets, 3, 67)},
        "offsets must rise from 0 to at most R = 66, got 67 at [3]",
    ),
    (
        "grouped_mm",
        {"offsets": with_value(PLAN.offsets, 0, 1)},
        "offsets must rise from 0 to at most R = 66, got 1 at [0]",
    ),
    (
        "grouped_outer",
        {"offsets": with_value(PLAN.offsets, 3, 0)},
        "offsets must rise from 0 to at most R = 66, got 0 at [3]",
    ),
    (
        "grouped_mm",
        {"load": with_value(PLAN.load, 2, -1)},
        "load must not be negative, got -1 at [2]",
    ),
]


@pytest.mark.parametrize("where", ["compiled", "reference"])
@pytest.mark.checks_values
@pytest.mark.parametrize(("name", "wrong", "message"), VALUES)
def test_values_on_the_cpu(name, wrong, message, where):
    if (name, where) == ("gate_backward", "reference"):
        # It stands in vmap too, where values cannot be read: torch's own indexing checks them.
        with pytest.raises(RuntimeError, match="index -1 is out of bounds"):
            call("gate_backward", wrong, where)
        return
    with pytest.raises(RuntimeError, match="^" + re.escape(f"{name}: {message}")):
        call(name, wrong, where)


def test_what_does_not_fit_a_plan_is_at_fault():
    """The plan was made before: the error names both."""
    modules = ModuleExperts(torch.nn.Identity(), E)
    of_slots = "T = 33 like the plan's slots [33, 2], got [5, 4]"
    of_sources = "R = 66 like the plan's sources [66], got [5, 4]"
    for function, message in (
        (lambda: moe_ext.dispatch(X[:5], PLAN), f"tokens must be [T, H] with {of_slots}"),
        (lambda: moe_ext.route_dot(X[:5], ROWS, PLAN), f"tokens must be [T, H] with {of_slots}"),
        (lambda: moe_ext.combine(ROWS[:5], PLAN), f"rows must be [R, H] with {of_sources}"),
        (lambda: moe_ext.grouped_mm(ROWS[:5], STACK, PLAN), f"[R, M] with {of_sources}"),
        (lambda: modules(ROWS[:5], PLAN), f"rows must be [R, H] with {of_sources}"),
        (lambda: moe_ext.activate(ROWS[:5], PLAN, "relu"), f"[R, G] with {of_sources}"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            function()


@pytest.mark.parametrize("where", ["compiled", "reference"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dtypes_have_their_names_in_python(where):
    dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    assert len(dtypes) > 40
    for dtype in dtypes - {torch.int32}:
        name = str(dtype).removeprefix("torch.")
        with pytest.raises(RuntimeError, match=f"plan: expert_ids must be int32, got {name}\\b"):
            call("plan", {"expert_ids": torch.empty(T, K, dtype=dtype)}, where)


GATE = [
    ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
    ({"num_experts": 4.0}, "num_experts must be an integer, got 4.0"),
    ({"k": 0}, "k must be at least 1, got 0"),
    ({"k": 9}, "k must be in 1..num_experts = 8, got 9"),
    ({"k": 2.0}, "k must be an integer, got 2.0"),
    ({"min_capacity": 1.5}, "min_capacity must be an integer, got 1.5"),
    ({"ep_group": "world"}, "ep_group must be None or a process group, got 'world'"),
    ({"capacity_factor": 0.0}, "capacity_factor must be in 1e-06..1000000.0, got 0.0"),
    ({"eval_capacity_factor": float("nan")}, "eval_capacity_factor must be in 1e-06..1000000.0"),
    ({"min_capacity": -1}, "min_capacity must be at least 0, got -1"),
    ({"noisy_gate_policy": "Gauss"}, "noisy_gate_policy must be one of"),
    ({"drop_policy": "first"}, "drop_policy must be one of"),
    ({"order": "expert"}, "order must be one of"),
    ({"scoring": "tanh"}, "scoring must be one of"),
    ({"normalize": True}, "normalize must be one of"),
    ({"group_score": "mean"}, "group_score must be one of"),
    ({"balancing": "bias"}, "balancing must be one of"),
    ({"scale": float("inf")}, "scale must be in -1000000.0..1000000.0, got inf"),
    ({"noise_scale": -1.0}, "noise_scale must be in 0..1000000.0, got -1.0"),
    ({"num_groups": 3}, "num_groups must divide num_experts = 8, got 3"),
    ({"num_groups": 0}, "num_groups must be at least 1, got 0"),
    ({"num_groups": 4, "topk_groups": 5}, "topk_groups must be in 1..num_groups = 4"),
    ({"k": 3, "num_groups": 4}, "topk_groups must leave k = 3 experts to choose from"),
]


@pytest.mark.parametrize(("wrong", "message"), GATE)
def test_gate_constructor(wrong, message):
    with pytest.raises(ValueError, match=re.escape(f"TopKGate: {message}")):
        TopKGate(**{"model_dim": H, "num_experts": E} | wrong)


def test_layer_constructor():
    gate, experts = TopKGate(H, E), GroupedExperts(E, H, 4)
    for make, message in (
        (lambda: MOELayer(gate, torch.nn.Linear(H, H)), "num_local_experts must be given where"),
        (lambda: MOELayer(gate, torch.nn.Linear(H, H), "", 1, 4), "num_experts = 8, got 4"),
        (lambda: MOELayer(gate, None, "", 1, E), "experts must be a module, got NoneType"),
        (lambda: MOELayer(print, experts), "gate must be an nn.Module with route(), got builtin"),
        (lambda: MOELayer(experts, gate), "gate must be an nn.Module with route(), got Group"),
        (lambda: MOELayer(gate, gate), "experts must be a module, got TopKGate"),
        (lambda: MoE(torch.nn.Linear(H, H), H, E), "MoE: expert must be the module of one"),
        (lambda: MoE(H, torch.nn.ModuleList(), E), "one expert, got ModuleList"),
        (
            lambda: MoE(H, GroupedExperts(E, H, 3), E),
            "MoE: expert must be the module of one expert, got GroupedExperts",
        ),
        (lambda: MOELayer(gate, GroupedExperts(4, H, 4)), "num_experts = 8, got 4"),
        (lambda: MOELayer(gate, GroupedExperts(E, 5, 4)), "model_dim = 4 as hidden_size, got 5"),
        (lambda: MOELayer(gate, experts, ep_size=2), "num_experts = 8, got 16"),
        (lambda: MOELayer(gate, experts, ep_size=0), "MOELayer: ep_size must be at least 1, got 0"),
        (lambda: MOELayer(gate, experts, num_local_experts=4), "num_local_experts must be 8"),
        (
            lambda: MoE(H, torch.nn.Identity(), E, dtype=torch.float16),
            "MoE: dtype must not be given to the gate",
        ),
        (lambda: MoE(H, torch.nn.Identity(), E, ep_size=3), "must be a multiple of ep_size = 3"),
        (lambda: MoE(H, torch.nn.Identity(), 0), "MoE: num_experts must be at least 1, got 0"),
        (lambda: CosineRouter(H, E, 0), "CosineRouter: proj_dim must be at least 1, got 0"),
        (lambda: CosineRouter(H, E, temperature=0.0), "temperature must be 0.01 or more, got 0.0"),
        (lambda: GroupedExperts(E, H, 4, activation="tanh"), "activation must be one of"),
        (lambda: GroupedExperts(0, H, 4), "GroupedExperts: num_experts must be at least 1"),
        (lambda: ModuleExperts(torch.nn.Identity(), 0), "ModuleExperts: num_experts must be"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            make()


def test_layer_input():
    layer = MOELayer(TopKGate(H, E), GroupedExperts(E, H, 4))
    with pytest.raises(RuntimeError, match=r"TopKGate: tokens must be \[T, H\] with H = 4, got"):
        layer(torch.randn(3, H + 1))
    with pytest.raises(RuntimeError, match="TopKGate: used_token must have T = 3 values, got"):
        layer(torch.randn(3, H), torch.ones(4))
    with pytest.raises(RuntimeError, match="TopKGate: used_token must be a tensor, got list"):
        layer(torch.randn(3, H), [1, 1, 0])
    with pytest.raises(RuntimeError, match=r"MOELayer: hidden must be \[\.\.\., H\], got \[\]"):
        layer(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=r"MOELayer: hidden must be \[\.\.\., H\], got list"):
        layer([1.0])
    layer.experts = GroupedExperts(E, H, 4)
    layer.gate = TopKGate(H, 5)
    with pytest.raises(RuntimeError, match="gate must choose among E = 8 experts, got 5"):
        layer(torch.randn(3, H))
    layer.gate = TopKGate(H, E)
    with pytest.raises(RuntimeError, match=r"tokens are torch\.bfloat16, the weights torch\.float"):
        layer(torch.randn(3, H).bfloat16())


class Returns(Experts):
    def __init__(self, function):
        super().__init__(E)
        self.function = function

    def forward(self, rows, plan=None):
        return self.function(rows)


@pytest.mark.parametrize("function", [lambda x: x[:1], lambda x: x[:, :3], lambda x: x.sum()])
def test_experts_of_the_wrong_shape(function):
    gate, x = TopKGate(H, E, drop_tokens=False), torch.randn(40, H)
    with pytest.raises(
        RuntimeError, match=r"Returns: forward must return \[R, H\] = \[40, 4\], got"
    ):
        MOELayer(gate, Returns(function))(x)
    message = r"ModuleExperts: expert \d must return \[rows, H\] = \[\d+, 4\], got"
    with pytest.raises(RuntimeError, match=message):
        MOELayer(gate, ModuleExperts(Returns(function), E))(x)


@pytest.mark.parametrize(
    "wrong",
    [
        {"offsets": PLAN.offsets.long()},
        {"offsets": PLAN.offsets[1:]},
        {"offsets": with_value(PLAN.offsets, 3, 67)},
        {"offsets": with_value(PLAN.offsets, 3, 0)},
        {"load": PLAN.load.float()},
        {"load": with_value(PLAN.load, 2, -1)},
        {"capacity": 9},
        {"capacity": 2**61},
    ],
)
@pytest.mark.checks_values
def test_module_experts_refuse_the_plans_that_grouped_mm_refuses(wrong):
    plan = PLAN._replace(**wrong)
    errors = []
    for function in (
        lambda: moe_ext.grouped_mm(ROWS, STACK, plan),
        lambda: ModuleExperts(torch.nn.Identity(), E)(ROWS, plan),
    ):
        with pytest.raises(RuntimeError) as error:
            function()
        errors.append(str(error.value).split("\n")[0].rstrip())
    assert errors[1] == errors[0].replace("grouped_mm", "ModuleExperts")


def test_module_experts_refuse_a_plan_for_other_experts():
    message = re.escape("ModuleExperts: load must be [E] with E = 7, got [8]")
    with pytest.raises(RuntimeError, match=message):
        ModuleExperts(torch.nn.Identity(), 7)(ROWS, PLAN)


def test_lists_for_tensors():
    with pytest.raises(RuntimeError, match="route: expert_ids must be a tensor, got list"):
        moe_ext.route(torch.randn(2, 3), 1, expert_ids=[[0], [1]])
    with pytest.raises(RuntimeError, match="route: logits must be a tensor, got list"):
        moe_ext.route([[0.5, 1.0]], 1)


def test_module_experts_cannot_be_exported():
    layer = MOELayer(TopKGate(H, E), ModuleExperts(torch.nn.Linear(H, H), E)).eval()
    with pytest.raises(
        RuntimeError, match="ModuleExperts: the bounds of the experts are read back"
    ):
        torch.export.export(layer, (torch.randn(5, H),))
    with pytest.raises(
        RuntimeError, match="ModuleExperts: the bounds of the experts are read back"
    ):
        layer.to("meta")(torch.randn(5, H, device="meta"))


def test_an_error_loses_nothing():
    """The layer works as before after an error."""
    layer = MOELayer(TopKGate(H, E), GroupedExperts(E, H, 4)).eval()
    x = torch.randn(3, H)
    before = layer(x)
    with pytest.raises(RuntimeError):
        layer(torch.randn(3, H + 1))
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("mask_weights", lambda x, plan: moe_ext.mask_weights(x, plan)),
        ("dispatch", lambda x, plan: moe_ext.dispatch(x, plan)),
        ("combine", lambda x, plan: moe_ext.combine(x, plan)),
        ("route_dot", lambda x, plan: moe_ext.route_dot(x, x, plan)),
        ("grouped_mm", lambda x, plan: moe_ext.grouped_mm(x, x[None], plan)),
        ("activate", lambda x, plan: moe_ext.activate(x, plan, "relu")),
        ("feed_forward", lambda x, plan: moe_ext.feed_forward(x, plan, x, x, x, "relu")),
    ],
)
def test_something_else_in_the_place_of_a_plan_is_named(name, call):
    x = torch.randn(4, 4)
    with pytest.raises(RuntimeError, match=f"{name}: plan must be a moe_ext.Plan.* got Choice"):
        call(x, moe_ext.gate(x, 2))
