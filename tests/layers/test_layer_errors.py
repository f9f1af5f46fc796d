"""Errors of constructors and layers name the argument, the contract and what came."""

import re
from math import inf, nan

import pytest
import torch
from torch import nn

import moe_ext
from moe_ext import GroupedExperts, ModuleExperts, MoE, MOELayer, SharedExperts, TopKGate
from moe_ext.layer import Layer
from moe_ext.routing.routers import CosineRouter

E, H = 8, 4

FLAG = "be one of (True, False)"
FACTOR = "be in 1e-06..1000000.0"
# The argument of TopKGate, what it must do, and values that do not.
GATE = [
    ("num_experts", "be at least 1", [0]),
    ("num_experts", "be an integer", [4.0]),
    ("k", "be at least 1", [0, -1]),
    ("k", "be in 1..num_experts = 8", [9, 99]),
    ("k", "be an integer", [1.5, 2.0, "2", None]),
    ("capacity_factor", FACTOR, [0.0, -1.0, nan, inf, "1", None]),
    ("eval_capacity_factor", FACTOR, [0.0, nan]),
    ("min_capacity", "be an integer", [0.5, None]),
    ("min_capacity", "be at least 0", [-1]),
    ("noisy_gate_policy", "be one of (None, 'None', ", ["jitter", 3, ["Jitter"]]),
    ("drop_policy", "be one of (None, 'random', ", ["first", 0, ["probs"]]),
    ("order", "be one of (None, 'choice', ", ["expert", True, ["token"]]),
    ("scoring", "be one of ('softmax', ", ["tanh", None, ["softmax"], {}]),
    ("normalize", "be one of (None, 'never', ", [True, "always", ["after"]]),
    ("group_score", "be one of ('max', ", ["mean", None, ["max"]]),
    ("balancing", "be one of (None, 'sinkhorn', ", ["bias", False, {}, torch.ones(2)]),
    ("scale", "be in -1000000.0..1000000.0", [nan, inf, "2", None, [1.0], torch.ones(2)]),
    ("noise_scale", "be in 0..1000000.0", [-1.0, nan, "a", [1.0], torch.ones(2)]),
    ("num_groups", "divide num_experts = 8", [3, 5]),
    ("num_groups", "be at least 1", [0]),
    ("num_groups", "be an integer", [2.0, [2]]),
    ("topk_groups", "be in 1..num_groups = 1", [5]),
    ("topk_groups", "be at least 1", [0]),
    ("topk_groups", "be an integer", [None]),
    ("ep_group", "be None or a process group", ["world", 0]),
    ("router", "be None or a module", [5, nn.Linear]),
    ("aux_loss", "be None or a function of a Routing", [0.01, "z"]),
    ("expert_bias", FLAG, ["no", torch.zeros(8)]),
    ("drop_tokens", FLAG, ["no", None, 0.5]),
    ("use_rts", FLAG, ["x"]),
    ("top2_2nd_expert_sampling", FLAG, ["no"]),
    ("noise_in_eval", FLAG, ["x"]),
    ("sampling_in_eval", FLAG, [3]),
]


# The arguments of TopKGate that are not attributes which change its rules.
FIXED = {"num_experts", "ep_group", "router", "aux_loss", "expert_bias"}


@pytest.mark.parametrize(("name", "contract", "values"), GATE)
def test_an_option_out_of_range_is_refused_by_the_constructor_and_later(name, contract, values):
    gate = TopKGate(H, E)
    before = repr(gate), gate.rule, gate.eval_rule
    contract = re.escape(f"TopKGate: {name} must {contract}")
    for value in values:
        message = f"^{contract}.*, got {re.escape(repr(value))}$"
        with pytest.raises(ValueError, match=message):
            TopKGate(**{"model_dim": H, "num_experts": E, name: value})
        if name not in FIXED:
            with pytest.raises(ValueError, match=message):
                setattr(gate, name, value)
            assert (repr(gate), gate.rule, gate.eval_rule) == before
    gate.k = 2
    assert gate.rule.k == gate.eval_rule.k == 2


def test_layer_constructor():
    gate, experts, one = TopKGate(H, E), GroupedExperts(E, H, 4), nn.Linear(H, H)
    for make, message in (
        (
            lambda: TopKGate(H, E, 3, num_groups=4),
            "k = 3 experts to choose from, got 1 groups of 2",
        ),
        (lambda: MOELayer(gate, nn.Linear(H, H)), "num_local_experts must be given where"),
        (lambda: MOELayer(gate, nn.Linear(H, H), "", 1, 4), "num_experts = 8, got 4"),
        (lambda: MOELayer(gate, None, "", 1, E), "experts must be a module, got NoneType"),
        (lambda: MOELayer(print, experts), "gate must be an nn.Module with route(), got builtin"),
        (lambda: MOELayer(experts, gate), "gate must be an nn.Module with route(), got Group"),
        (lambda: MOELayer(gate, gate), "experts must be a module, got TopKGate"),
        (lambda: MoE(nn.Linear(H, H), H, E), "MoE: expert must be the module of one"),
        (lambda: MoE(H, nn.ModuleList(), E), "one expert, got ModuleList"),
        (lambda: MoE(H, experts, E), "MoE: expert must be the module of one expert, got Grouped"),
        (lambda: Layer(gate, GroupedExperts(4, H, 4)), "Layer: experts must have the gate's num_e"),
        (lambda: Layer(gate, experts, 0), "Layer: num_experts must be at least 1, got 0"),
        (lambda: Layer(gate, one), "Layer: experts must be an nn.Module with routed(), got Linear"),
        (lambda: Layer(nn.Linear, experts), "Layer: gate must be an nn.Module with route(), got t"),
        (lambda: MOELayer(gate, GroupedExperts(4, H, 4)), "num_experts = 8, got 4"),
        (lambda: MOELayer(gate, GroupedExperts(E, 5, 4)), "model_dim = 4 as hidden_size, got 5"),
        (lambda: MOELayer(gate, experts, ep_size=2), "num_experts = 8, got 16"),
        (lambda: MOELayer(gate, experts, ep_size=0), "MOELayer: ep_size must be at least 1, got 0"),
        (lambda: MOELayer(gate, experts, num_local_experts=4), "num_local_experts must be 8"),
        (lambda: MoE(H, one, E, dtype=torch.float16), "MoE: dtype must not be given to the gate"),
        (lambda: MoE(H, nn.Identity(), E, ep_size=3), "ExpertParallel.of(experts, group)) also"),
        (lambda: MoE(H, nn.Identity(), 0), "MoE: num_experts must be at least 1, got 0"),
        (lambda: CosineRouter(H, E, 0), "CosineRouter: proj_dim must be at least 1, got 0"),
        (lambda: CosineRouter(H, E, temperature=0.0), "temperature must be in 0.01..inf, got 0.0"),
        (lambda: GroupedExperts(E, H, 4, activation="tanh"), "activation must be one of"),
        (lambda: GroupedExperts(0, H, 4), "GroupedExperts: num_experts must be at least 1"),
        (lambda: ModuleExperts(nn.Identity(), 0), "ModuleExperts: num_experts must be"),
        (lambda: ModuleExperts(nn.ModuleList()), "must hold one module or more, got an empty"),
        (lambda: ModuleExperts(nn.ModuleList([one]), 2), "num_experts must be 1, the length of"),
        (lambda: ModuleExperts(nn.ModuleList([one, None])), "expert 1 must be an nn.Module, got N"),
        (lambda: ModuleExperts(nn.ModuleList([one] * 2)), "0 and 1 are the same object"),
        (lambda: ModuleExperts("one"), "must be an nn.Module, or a list of one per expert, got s"),
        (lambda: ModuleExperts([one, None]), "expert 1 must be an nn.Module, got N"),
        (lambda: ModuleExperts(one), "num_experts must be given beside one module"),
        (lambda: MOELayer(gate, one), "moe_ext.ModuleExperts(module, num_experts) makes E copies"),
        (
            lambda: MOELayer(gate, [one]),
            "MOELayer: moe_ext.ModuleExperts(experts) makes experts of",
        ),
        (lambda: Layer(gate, nn.ModuleList([one])), "Layer: moe_ext.ModuleExperts(experts) makes"),
        (lambda: SharedExperts(one, one), "SharedExperts: experts must be Experts, got Linear"),
        (lambda: SharedExperts(experts, print), "SharedExperts: shared must be a module, got buil"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            make()


def test_layer_input():
    layer = MOELayer(TopKGate(H, E), GroupedExperts(E, H, 4))
    tokens = torch.randn(3, H)
    for args, message in (
        ((torch.randn(3, H + 1),), "TopKGate: tokens must be [T, H] with H = 4, got [3, 5]"),
        ((tokens, torch.ones(4)), "TopKGate: used_token must have T = 3 values, got [4]"),
        ((tokens, [1, 1, 0]), "TopKGate: used_token must be a tensor, got list"),
        ((torch.tensor(1.0),), "MOELayer: hidden must be [..., H], got []"),
        (([1.0],), "MOELayer: hidden must be [..., H], got list"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            layer(*args)
    layer.gate = TopKGate(H, 5)
    with pytest.raises(RuntimeError, match="gate must choose among E = 8 experts, got 5"):
        layer(tokens)


class Returns(moe_ext.Experts):
    def __init__(self, function):
        super().__init__(E)
        self.function = function

    def forward(self, rows, plan=None):
        return self.function(rows)


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda x: x[:1], r"\[1, 4\]"),
        (lambda x: x[:, :3], r"\[\d+, 3\]"),
        (lambda x: x.sum(), r"\[\]"),
        (lambda x: None, "NoneType"),
    ],
)
def test_experts_of_the_wrong_shape(function, got):
    gate, x = TopKGate(H, E, drop_tokens=False), torch.randn(40, H)
    message = rf"Returns: forward must return \[R, H\] = \[40, 4\], got {got}$"
    with pytest.raises(RuntimeError, match=message):
        MOELayer(gate, Returns(function))(x)
    message = rf"ModuleExperts: expert \d must return \[rows, H\] = \[\d+, 4\], got {got}$"
    with pytest.raises(RuntimeError, match=message):
        MOELayer(gate, ModuleExperts(Returns(function), E))(x)


def test_shared_parts_of_the_wrong_shape():
    experts, one = GroupedExperts(E, H, 4), nn.Linear(H, H)
    plan = moe_ext.make_plan(torch.zeros(5, 1).int(), E)
    for parts, message in (
        ((nn.Linear(H, 5),), r"SharedExperts: shared must return \[T, H\] = \[5, 4\], got"),
        ((one, nn.Linear(H, 5)), r"SharedExperts: gate must return \[T, 1\] = \[5, 1\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            SharedExperts(experts, *parts).routed(torch.randn(5, H), plan, torch.rand(5, 1))


def test_lists_for_tensors():
    with pytest.raises(RuntimeError, match="route: expert_ids must be a tensor, got list"):
        moe_ext.route(torch.randn(2, 3), 1, expert_ids=[[0], [1]])
    with pytest.raises(RuntimeError, match="route: logits must be a tensor, got list"):
        moe_ext.route([[0.5, 1.0]], 1)


def test_module_experts_cannot_be_exported():
    layer = MOELayer(TopKGate(H, E), ModuleExperts(nn.Linear(H, H), E)).eval()
    message = "ModuleExperts: the bounds of the experts are read back"
    with pytest.raises(RuntimeError, match=message):
        torch.export.export(layer, (torch.randn(5, H),))
    with pytest.raises(RuntimeError, match=message):
        layer.to("meta")(torch.randn(5, H, device="meta"))
