"""Experts: their networks, the tensors they save, and their state."""

import copy
import re

import pytest
import torch
from cases import assert_near, mixtral_experts, plans, random_experts, relative_error, weighted_sum
from rules import expert_by_hand
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import moe_ext
from moe_ext import GroupedExperts, SharedExperts
from moe_ext.ops import checks

E, H, FFN = 3, 6, 4


def experts_of(activation="swiglu", bias=False, dtype=torch.float64, **options) -> GroupedExperts:
    experts = GroupedExperts(E, H, FFN, activation, bias, dtype=dtype, **options)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return experts


def small_case() -> tuple[torch.Tensor, moe_ext.Plan, torch.Tensor]:
    """Five tokens, a plan of two choices each, and weights."""
    plan = moe_ext.make_plan(random_experts(5, 2, E), E)
    return torch.randn(5, H), plan, torch.rand(5, 2)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", checks.ACTIVATIONS)
def test_grouped_experts_are_one_network_per_expert(activation, bias, before):
    T, K = 9, 2
    tokens = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    for recompute in (True, False):
        experts = experts_of(activation, bias, score_before_experts=before, recompute=recompute)
        leaves = [tokens, weights, *experts.parameters()]
        for plan in plans(T, K, E):
            out = experts.routed(tokens, plan, weights)
            outputs = [expert_by_hand(experts, e, tokens) for e in range(E)]
            expected = weighted_sum(outputs, plan.expert_ids, weights * (plan.slots >= 0))
            torch.testing.assert_close(out, expected)
            upstream = torch.randn_like(out)
            grads = [torch.autograd.grad(y, leaves, upstream) for y in (out, expected)]
            torch.testing.assert_close(*grads)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_gradients_of_every_order(activation, bias, before):
    experts = experts_of(activation, bias, score_before_experts=before)
    names = [name for name, _ in experts.named_parameters()]
    tokens = torch.randn(5, H, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    for plan in plans(5, 2, E)[:4]:

        def routed(tokens, weights, *parameters, plan=plan):
            state = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(experts, state, (tokens, plan, weights))

        leaves = (tokens, weights, *experts.parameters())
        assert gradcheck(routed, leaves, check_batched_grad=True, fast_mode=True)
        assert gradgradcheck(routed, leaves, fast_mode=True)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_float32_gives_the_gradients_of_float64(activation, bias, before):
    """The output, its gradients, and theirs, of sizes that kernels for tensor cores take."""
    T, K, H, ffn = 70, 2, 40, 24
    options = {"dtype": torch.float64, "score_before_experts": before}
    experts = GroupedExperts(E, H, ffn, activation, bias, **options)
    leaves = [torch.randn(T, H, dtype=torch.float64), torch.rand(T, K, dtype=torch.float64)]
    upstream = torch.randn(T, H, dtype=torch.float64)
    directions = [torch.randn_like(x) for x in (*leaves, *experts.parameters())]

    def derivatives(dtype, plan):
        experts.to(dtype)
        tokens, weights = (x.to(dtype).requires_grad_() for x in leaves)
        of = (tokens, weights, *experts.parameters())
        out = experts.routed(tokens, plan, weights)
        grads = torch.autograd.grad(out, of, upstream.to(dtype), create_graph=True)
        along = sum((g * d.to(dtype)).sum() for g, d in zip(grads, directions, strict=True))
        return out, *grads, *torch.autograd.grad(along, of)

    for plan in plans(T, K, E)[:4]:
        exact = derivatives(torch.float64, plan)
        assert_near(derivatives(torch.float32, plan), exact, 1e-5)


# The operands of feed_forward.
SHAPES = {
    "tokens": (7, H),
    "weights": (7, 2),
    "up": (E, FFN, H),
    "down": (E, H, FFN),
    "up_bias": (E, FFN),
    "down_bias": (E, H),
}


@pytest.mark.parametrize("needed", SHAPES)
def test_each_gradient_alone(needed):
    plan = moe_ext.make_plan(random_experts(7, 2, E), E, 4)
    leaves = {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}

    def grads(names):
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in names).grad = None
        out = moe_ext.feed_forward(plan=plan, activation="gelu", **leaves)
        out.square().sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    together = grads(SHAPES)[needed].clone()
    alone = grads([needed])
    assert torch.equal(alone.pop(needed), together)
    assert all(grad is None for grad in alone.values())


def saved_bytes(function) -> int:
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    assert out.requires_grad
    return sum(seen.values())


def test_recompute_saves_tokens_and_pre_activations_only():
    T, K, hidden, ffn = 200, 4, 32, 24
    experts = GroupedExperts(8, hidden, ffn)
    tokens = torch.randn(T, hidden, requires_grad=True)
    weights = torch.rand(T, K, requires_grad=True)
    plan = moe_ext.make_plan(random_experts(T, K, 8), 8)
    parameters = sum(p.nbytes for p in experts.parameters())
    of_plan = sum(x.nbytes for x in (plan.slots, plan.sources, plan.offsets, plan.load))
    pre_activation = T * K * 2 * ffn * 4
    least = parameters + of_plan + tokens.nbytes + weights.nbytes + pre_activation
    assert saved_bytes(lambda: experts.routed(tokens, plan, weights)) == least
    experts.recompute = False
    rows, active, out = T * K * hidden * 4, T * K * ffn * 4, T * K * hidden * 4
    everything = least - tokens.nbytes + rows + active + out
    assert saved_bytes(lambda: experts.routed(tokens, plan, weights)) == everything


def test_a_subclass_with_its_own_forward_is_run_by_it():
    class Doubled(GroupedExperts):
        def forward(self, rows, plan):
            return 2 * super().forward(rows, plan)

    doubled, case = Doubled(E, H, FFN), small_case()
    plain = GroupedExperts(E, H, FFN)
    plain.load_state_dict(doubled.state_dict())
    assert relative_error(doubled.routed(*case), 2 * plain.routed(*case)) < 1e-6
    plain.forward = lambda rows, plan: torch.zeros_like(rows)
    assert (plain.routed(*case) == 0).all()


@pytest.mark.parametrize("shared", [False, True])
def test_routed_calls_the_module(shared):
    """Hooks run, and so do FSDP and offloading, which use them."""
    experts, seen = GroupedExperts(E, H, FFN), []
    experts = SharedExperts(experts, nn.Linear(H, H)) if shared else experts
    experts.register_forward_hook(lambda module, args, out: seen.append(out))
    out = experts.routed(*small_case())
    assert len(seen) == 1
    assert seen[0] is out


ACTIVATIONS = "swiglu, geglu, swiglu_oai, gelu, relu or relu2"
WRONG = [
    ({"down": (E, H + 1, FFN)}, "down must be [E, H, F] with E = 3, H = 6, F = 4, got [3, 7, 4]"),
    ({"up": (E, 2 * FFN, H + 1)}, "up must be [E, G, H] with E = 3, H = 6, got [3, 8, 7]"),
    (
        {"up": (E + 1, 2 * FFN, H)},
        "up must be [E, G, H] with E = 3, H = 6 like the plan's load [3], got [4, 8, 6]",
    ),
    ({"up": (E, 7, H)}, "up must be [E, 2F, H], got [3, 7, 6]"),
    ({"up_bias": (E, FFN)}, "up_bias must be [E, G] with E = 3, G = 8, got [3, 4]"),
    ({"down_bias": (E, 1)}, "down_bias must be [E, H] with E = 3, H = 6, got [3, 1]"),
    ({"activation": "silu"}, f"activation must be {ACTIVATIONS}, got silu"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_feed_forward_names_what_is_wrong(wrong, message):
    tokens, plan, weights = small_case()
    right = {"up": (E, 2 * FFN, H), "down": (E, H, FFN), "activation": "swiglu"}
    given = {n: torch.randn(v) if isinstance(v, tuple) else v for n, v in (right | wrong).items()}
    with pytest.raises(RuntimeError, match="^" + re.escape(f"feed_forward: {message}")):
        moe_ext.feed_forward(tokens, plan, weights, **given)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("which", SHAPES)
def test_feed_forward_supports_vmap_over_any_operand(which, before):
    plan = moe_ext.make_plan(random_experts(7, 2, E), E)
    operands = {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    options = {"plan": plan, "activation": "gelu", "score_before_experts": before}

    def function(given):
        return moe_ext.feed_forward(**operands | {which: given}, **options)

    many = torch.randn(3, *SHAPES[which], dtype=torch.float64)
    expected = torch.stack([function(given) for given in many])
    torch.testing.assert_close(torch.vmap(function)(many), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_results_are_close_to_float64(dtype):
    """Errors are a few roundings against float64, at the scale of a real layer."""
    T, K, hidden, ffn = 300, 4, 256, 128
    experts = GroupedExperts(8, hidden, ffn, bias=True, dtype=dtype)
    wide = copy.deepcopy(experts).double()
    tokens, upstream = (torch.randn(T, hidden).to(dtype) for _ in range(2))
    weights = torch.rand(T, K)
    plan = moe_ext.make_plan(random_experts(T, K, 8), 8)

    def results(module, tokens, weights, upstream):
        leaves = [tokens.requires_grad_(), weights.requires_grad_(), *module.parameters()]
        out = module.routed(tokens, plan, weights)
        return out, *torch.autograd.grad(out, leaves, upstream)

    found = results(experts, tokens, weights, upstream)
    exact = results(wide, tokens.detach().double(), weights.detach().double(), upstream.double())
    assert found[0].dtype == dtype
    assert found[2].dtype == torch.float32  # of weights
    assert_near(found, exact, 2 * torch.finfo(dtype).eps)


def test_autocast_casts_tokens_and_weights():
    experts = GroupedExperts(E, H, FFN, bias=True)
    tokens, plan, weights = small_case()
    leaves = [tokens.requires_grad_(), *experts.parameters()]
    results = []
    for experts.recompute in (True, False):
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            out = experts.routed(tokens, plan, weights)
        assert out.dtype == torch.bfloat16
        grads = torch.autograd.grad(out.float().sum(), leaves)
        assert all(grad.dtype == torch.float32 for grad in grads)
        results.append([out, *grads])
    assert_near(*results, torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("gated", [False, True])
def test_shared_experts_add_their_output(gated):
    routed = GroupedExperts(E, H, FFN, dtype=torch.float64)
    shared = nn.Sequential(nn.Linear(H, 5), nn.ReLU(), nn.Linear(5, H)).double()
    gate = nn.Linear(H, 1, bias=False).double() if gated else None
    router = moe_ext.TopKGate(H, E, 2, drop_tokens=False, top2_2nd_expert_sampling=False)
    layer = moe_ext.MOELayer(router, SharedExperts(routed, shared, gate))
    alone = moe_ext.MOELayer(router, routed)
    x = torch.randn(7, H, dtype=torch.float64)
    of_shared = shared(x) * (torch.sigmoid(gate(x)) if gated else 1)
    torch.testing.assert_close(layer(x), alone(x) + of_shared)


def test_unexpected_and_missing_keys_are_reported():
    experts, (state, _) = GroupedExperts(E, H, FFN), mixtral_experts(E, H, FFN)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*weird"):
        experts.load_state_dict(state | {"weird": torch.ones(1)})
    experts.scale = nn.Parameter(torch.zeros(1))
    experts.load_state_dict(state | {"scale": torch.ones(1)})
    assert experts.scale == 1
    del state["1.w2.weight"]
    with pytest.raises(RuntimeError, match=r"1\.w2\.weight"):
        GroupedExperts(E, H, FFN).load_state_dict(state)


@pytest.mark.parametrize("bias", [False, True])
def test_load_state_dict_takes_one_tensor_per_expert(bias):
    experts, other = GroupedExperts(E, H, FFN, bias=bias), nn.Linear(2, 2)
    theirs, grouped = mixtral_experts(E, H, FFN, bias)
    state = {f"experts.{name}": tensor for name, tensor in theirs.items()}
    state |= {f"other.{name}": torch.randn_like(x) for name, x in other.state_dict().items()}
    given = dict(state)
    nn.ModuleDict({"experts": experts, "other": other}).load_state_dict(state)
    assert state == given
    torch.testing.assert_close(dict(experts.state_dict()), grouped, rtol=0, atol=0)
    assert torch.equal(other.weight, state["other.weight"])


def test_checkpoints_of_gpt_oss_need_its_activation():
    state = {
        "gate_up_proj": torch.randn(E, H, 2 * FFN),
        "gate_up_proj_bias": torch.randn(E, 2 * FFN),
        "down_proj": torch.randn(E, FFN, H),
        "down_proj_bias": torch.randn(E, H),
    }
    with pytest.raises(RuntimeError, match=r'clamped, scaled gate .* activation="swiglu_oai"'):
        GroupedExperts(E, H, FFN, bias=True).load_state_dict(state)
    experts = GroupedExperts(E, H, FFN, activation="swiglu_oai", bias=True)
    experts.load_state_dict(state)
    for name, tensor in state.items():
        loaded = getattr(experts, name)
        assert torch.equal(loaded, tensor if name.endswith("bias") else tensor.mT)


def test_packed_weights_are_loaded_not_initialised():
    experts = GroupedExperts(E, 32, 32).quantize("mxfp4")
    with pytest.raises(RuntimeError, match="quantized weights cannot be initialised; load them"):
        experts.reset_parameters()


def test_the_dtype_of_meta_tokens_is_checked():
    experts = GroupedExperts(E, H, FFN, device="meta", dtype=torch.bfloat16)
    x, plan, weights = small_case()
    with pytest.raises(RuntimeError, match=r"tokens are torch.float32, the weights torch.bfloat16"):
        experts(x.to("meta"), plan, weights)
