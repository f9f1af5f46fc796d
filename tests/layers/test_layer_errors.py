"""Errors of constructors and layers name the argument, the contract and what came."""

import re

import pytest
import torch

import moe_ext
from moe_ext import CosineRouter, Experts, GroupedExperts, ModuleExperts, MoE, MOELayer, TopKGate

E, H = 8, 4

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
