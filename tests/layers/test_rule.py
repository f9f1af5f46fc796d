"""The core: a gate with frozen rules, and a layer of a gate and experts."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from rules import E, H, tokens

from moe_ext import GroupedExperts, MOELayer, TopKGate
from moe_ext.layer import Layer
from moe_ext.routing.capacity import expert_capacity
from moe_ext.routing.gate import Gate
from moe_ext.routing.rule import Rule

MIXTRAL = Rule(k=2, normalize="before")


def gate_of(rule: Rule, eval_rule: Rule | None = None, **options) -> Gate:
    return Gate(H, E, rule, eval_rule, dtype=torch.float64, **options)


def test_each_mode_has_its_own_rule():
    gate = gate_of(MIXTRAL, replace(MIXTRAL, k=1, capacity_factor=0.5))
    x = tokens()
    assert gate.route(x).weights.shape[1] == 2
    assert gate.capacity(len(x)) is None
    assert gate.eval().route(x).weights.shape[1] == 1
    assert gate.capacity(len(x)) == 3
    gate.eval_rule = MIXTRAL
    assert gate.route(x).weights.shape[1] == 2


def test_a_rule_is_a_value():
    with pytest.raises(FrozenInstanceError):
        MIXTRAL.k = 3
    assert replace(MIXTRAL, k=3) == Rule(k=3, normalize="before") != MIXTRAL
    assert {MIXTRAL: 1}[Rule(k=2, normalize="before")] == 1


def test_the_named_arguments_of_topkgate_are_a_rule():
    gate = TopKGate(H, E, 2, 1.5, noisy_gate_policy="RSample", balancing="sinkhorn")
    noisy = {"normalize": "after", "noise": "RSample", "noise_scale": 1.0}
    assert gate.rule == Rule(2, 1.5, 8, "position", "choice", **noisy, balancing="sinkhorn")
    assert gate.eval_rule == Rule(2, 1.0, 8, normalize="after")
    gate.k, gate.drop_tokens, gate.noise_in_eval = 4, False, True
    assert gate.eval_rule == Rule(4, None, 8, "probs", "token", **noisy)
    assert gate.eval().route(torch.randn(5, H)).weights.shape == (5, 4)


def test_a_layer_is_its_two_parts():
    gate = gate_of(MIXTRAL)
    layer = Layer(gate, GroupedExperts(E, H, 7, dtype=torch.float64))
    x = tokens()
    routing = gate.route(x)
    expected = layer.experts.routed(x, routing.plan, routing.weights)
    assert torch.equal(layer(x.view(3, -1, H)), expected.view(3, -1, H))
    assert torch.equal(layer.l_aux, routing.l_aux)
    same = MOELayer(gate, layer.experts)
    assert torch.equal(same(x), expected)
    assert list(same.state_dict()) == list(layer.state_dict())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(k=E + 1), f"Gate: k must be in 1..num_experts = {E}, got {E + 1}"),
        (Rule(noise="uniform"), "Gate: noise must be one of"),
        (Rule(noise="None"), "Gate: noise must be one of"),
        (Rule(noise="RSample"), "Gate: noise_scale must be above 0 with noise = 'RSample', got 0"),
        ("top2", "Gate: (eval_)?rule must be a Rule, got 'top2'"),
        (Rule(capacity_factor=-1.0), "Gate: capacity_factor must be in"),
        (Rule(num_groups=5), f"Gate: num_groups must divide num_experts = {E}, got 5"),
    ],
)
def test_a_rule_that_does_not_fit_the_gate_is_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        gate_of(rule)
    with pytest.raises(ValueError, match=message):
        gate_of(MIXTRAL, rule)


def test_a_gate_shows_the_rules_and_the_bias_that_it_has():
    assert gate_of(MIXTRAL).extra_repr() == "rule=Rule(k=2, normalize='before')"
    text = gate_of(MIXTRAL, replace(MIXTRAL, k=1), expert_bias=True).extra_repr()
    assert text.endswith(", eval_rule=Rule(normalize='before'), expert_bias=True")


def test_a_subclass_may_set_an_option_before_the_constructor():
    class Two(TopKGate):
        def __init__(self):
            self.k = 2
            super().__init__(H, E, self.k)

    assert Two().rule.k == 2


def test_capacity_is_float32_arithmetic():
    assert expert_capacity(25, 2, 1.2, 0) == 16
    assert expert_capacity(20, 3, 1.05, 0) == 7
    factors = [0.1, 0.5, 0.7, 1.0, 1.05, 1.1, 1.2, 1.25, 1.3, 1.5, 2.0, 2.4, 3.3, 4.0, 1e-3]
    for T in [*range(1, 130), 1000, 4095, 4096, 4097, 65537, 999_999]:
        for num_experts in (1, 2, 3, 5, 7, 8, 12, 64, 100, 256):
            for factor in factors:
                tensor = torch.tensor(T / num_experts) * torch.tensor(factor)
                wanted = max(int(tensor.ceil()), 4)
                assert expert_capacity(T, num_experts, factor, 4) == wanted
