"""The core: a gate with frozen rules, and a layer of a gate and experts."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from rules import E, H, tokens

from moe_ext import GroupedExperts, MOELayer, TopKGate, route
from moe_ext.layer import Layer
from moe_ext.routing.gate import Gate
from moe_ext.routing.rule import Rule

MIXTRAL = Rule(k=2, normalize="before")


def gate_of(rule: Rule, eval_rule: Rule | None = None, **options) -> Gate:
    return Gate(H, E, rule, eval_rule, dtype=torch.float64, **options)


def test_a_gate_routes_its_logits_by_its_rule():
    rule = Rule(k=3, capacity_factor=0.7, drop_policy="probs", order="token", scoring="sigmoid")
    gate, x = gate_of(rule), tokens()
    routing, expected = (
        gate.route(x),
        route(
            *(gate.wg(x), 3),
            scoring="sigmoid",
            capacity=gate.capacity(len(x)),
            drop_policy="probs",
            order="token",
        ),
    )
    assert torch.equal(routing.plan.slots, expected.plan.slots)
    assert torch.equal(routing.weights, expected.weights)
    assert torch.equal(routing.l_aux, expected.l_aux)


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
    assert gate.rule == Rule(
        *(2, 1.5, 8, "position", "choice"),
        normalize="after",
        noise="RSample",
        noise_scale=1.0,
        balancing="sinkhorn",
    )
    assert gate.eval_rule == Rule(2, 1.0, 8, normalize="after")
    gate.k, gate.drop_tokens, gate.noise_in_eval = 4, False, True
    assert gate.eval_rule == Rule(
        *(4, None, 8, "probs", "token"), normalize="after", noise="RSample", noise_scale=1.0
    )
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
        (Rule(capacity_factor=-1.0), "Gate: capacity_factor must be in"),
        (Rule(num_groups=5), f"Gate: num_groups must divide num_experts = {E}, got 5"),
    ],
)
def test_a_rule_that_does_not_fit_the_gate_is_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        gate_of(rule)
    with pytest.raises(ValueError, match=message):
        gate_of(MIXTRAL, rule)


def test_experts_of_another_number_or_width_are_refused():
    for experts, message in (
        (GroupedExperts(E - 1, H, 7), f"Layer: experts must have the gate's num_experts = {E}"),
        (GroupedExperts(E, H + 1, 7), f"Layer: experts must have the gate's model_dim = {H}"),
    ):
        with pytest.raises(ValueError, match=message):
            Layer(gate_of(MIXTRAL), experts)
