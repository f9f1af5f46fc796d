"""Gates and experts written for DeepSpeed, in our layer."""

import re

import pytest
import torch
from cases import relative_error, with_seed
from rules import Apply
from torch import nn
from torch.nn import functional as F

import moe_ext
from moe_ext import GroupedExperts, MoE, MOELayer, TopKGate

E, H, S = 6, 10, 40


@pytest.mark.parametrize("use_residual", [False, True])
def test_an_expert_may_return_a_tuple(use_residual):
    pair, plain = (
        MoE(H, Apply(function), E, k=2, use_residual=use_residual).eval()
        for function in (lambda x: (x + 1, "bias"), lambda x: x + 1)
    )
    plain.load_state_dict(pair.state_dict())
    x = torch.randn(S, H)
    assert torch.equal(pair(x)[0], plain(x)[0])


class Gate(nn.Module):
    """A gate of the caller: every token goes to the expert of its largest element."""

    def __init__(self, change=lambda result: result):
        super().__init__()
        self.change, self.seen = change, None

    def forward(self, tokens, used_token):
        self.seen = used_token
        expert = tokens[:, :E].argmax(-1)
        place = F.one_hot(expert, E).cumsum(0).gather(1, expert[:, None])[:, 0] - 1
        mask = torch.zeros(len(tokens), E, len(tokens), dtype=torch.bool)
        mask[torch.arange(len(tokens)), expert, place] = True
        counts = torch.bincount(expert, minlength=E)
        return self.change((tokens.sum() * 0 + 7, mask * 0.5, mask, counts))


def test_a_gate_written_for_deepspeed_runs_in_our_layer():
    gate, experts = Gate(), GroupedExperts(E, H, 7)
    layer = MOELayer(gate, experts)
    x, used = torch.randn(4, S // 4, H), torch.ones(S)
    out = layer(x, used)
    tokens = x.view(S, H)
    expert = tokens[:, :E].argmax(-1)
    plan = moe_ext.make_plan(expert.to(torch.int32).view(-1, 1), E)
    expected = experts.routed(tokens, plan, torch.full((S, 1), 0.5))
    assert relative_error(out.view(S, H), expected) < 1e-6
    assert layer.l_aux == 7
    assert torch.equal(layer.exp_counts, torch.bincount(expert, minlength=E))
    assert gate.seen is used
    with pytest.raises(RuntimeError, match="expert_ids must be None with a gate of type Gate"):
        layer(x, expert_ids=plan.expert_ids)

    class Own(nn.Module):
        num_experts = E

        def route(self, tokens, used_token=None):
            return moe_ext.route(tokens[:, :E], 1)

    with pytest.raises(RuntimeError, match="expert_ids must be None with a gate of type Own"):
        MOELayer(Own(), experts)(x, expert_ids=plan.expert_ids)

    class Warm(Own):
        def route(self, tokens, used_token=None, temperature=1.0):
            return moe_ext.route(tokens[:, :E] / temperature, 1)

    assert torch.equal(MOELayer(Warm(), experts)(x), MOELayer(Own(), experts)(x))
    short = MOELayer(Gate(lambda r: (r[0], r[1].bfloat16(), r[2], r[3])), experts)
    assert relative_error(short(x), out) < 1e-6


def sparse(routes):
    ids = torch.zeros(1, S, dtype=torch.int32)
    return routes[0], torch.tensor(S), E, ids, ids, torch.ones(2, S), routes[3]


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda r: r[1], "gate must return .* got Tensor$"),
        (lambda r: r[:3], "gate must return .* got 3 things$"),
        (lambda r: None, "gate must return .* got NoneType$"),
        (lambda r: (r[0], r[2], r[1], r[3]), "combine_weights must be float"),
        (lambda r: (r[0], r[1], r[2][:, :, :3], r[3]), r"dispatch_mask must be \[S, E, C\] with"),
        (lambda r: (r[0], r[1][:5], r[2][:5], r[3]), r"combine_weights must be \[S, E, C\] with"),
        (
            lambda r: (r[0], r[1][:, :5], r[2][:, :5], r[3]),
            "must choose among E = 6 experts, got 5",
        ),
        (sparse, r"gates must be \[S, K\] with S = 40, K = 1, got \[40, 2\]"),
    ],
)
def test_a_gate_that_returns_another_tuple_is_an_error(change, got):
    layer = MOELayer(Gate(change), GroupedExperts(E, H, 7))
    with pytest.raises(RuntimeError, match=f"MOELayer: .*{got}"):
        layer(torch.randn(S, H))


class Scaled(TopKGate):
    """DeepSpeed's gate with a forward of its own."""

    def forward(self, input, used_token=None, sparse_routes=False, use_tutel=False):
        l_aux, *rest = super().forward(input, used_token, sparse_routes, use_tutel)
        return (l_aux * 100, *rest)


def test_a_gate_with_a_forward_of_its_own_is_used_by_it():
    gate, experts = Scaled(H, E), GroupedExperts(E, H, 7)
    plain = TopKGate(H, E)
    plain.load_state_dict(gate.state_dict())
    x = torch.randn(S, H)
    layer, other = MOELayer(gate, experts), MOELayer(plain, experts)
    assert relative_error(with_seed(layer, x), with_seed(other, x)) < 1e-6
    assert relative_error(layer.l_aux, 100 * other.l_aux) < 1e-6
    assert torch.equal(layer.exp_counts, other.exp_counts)


def test_a_dispatched_token_of_no_weight_has_a_gradient():
    weight = torch.zeros((), requires_grad=True)
    gate = Gate(lambda r: (r[0], r[2] * weight, r[2], r[3]))
    x = torch.rand(S, H) + 1
    experts = GroupedExperts(E, H, 7)
    MOELayer(gate, experts)(x).sum().backward()
    assert relative_error(weight.grad, 2 * MOELayer(Gate(), experts)(x).sum()) < 1e-5


def after_none(layer, name, part):
    setattr(layer, name, None)
    setattr(layer, name, part)


@pytest.mark.parametrize(
    "replace",
    [
        setattr,
        nn.Module.add_module,
        lambda layer, name, part: layer._modules.__setitem__(name, part),
        after_none,
    ],
)
def test_gate_and_experts_may_be_replaced(replace):
    moe = MoE(H, nn.Linear(H, H), E)
    replace(moe.deepspeed_moe, "gate", Gate())
    x = torch.randn(S, H)
    assert moe(x)[1] == 7
    grouped = GroupedExperts(E, H, 7)
    replace(moe.deepspeed_moe, "experts", grouped)
    assert relative_error(moe(x)[0], MOELayer(Gate(), grouped)(x)) == 0
    replace(moe.deepspeed_moe, "gate", TopKGate(H, E, drop_tokens=False))
    _, aux = moe.forward_with_aux(x)
    assert torch.equal(moe(x, expert_ids=aux.expert_ids)[0], moe.forward_with_aux(x)[0])
    replace(moe.deepspeed_moe, "experts", Apply(lambda rows: rows))
    assert moe(x)[0].shape == x.shape
    replace(moe.deepspeed_moe, "gate", nn.Linear(H, E))
    with pytest.raises(ValueError, match="MOELayer: gate must have route"):
        moe(x)


def test_a_gate_that_changes_is_used_as_it_is():
    gate, experts, x = TopKGate(H, E).eval(), GroupedExperts(E, H, 7), torch.randn(S, H)
    layer = MOELayer(gate, experts)
    out, aux = layer.forward_with_aux(x)
    recorded = aux.expert_ids
    gate.route = lambda tokens, used_token: moe_ext.route(tokens[:, :E], 1)
    assert torch.equal(layer.forward_with_aux(x)[1].expert_ids[:, 0], x[:, :E].argmax(-1))
    with pytest.raises(RuntimeError, match="expert_ids must be None with a gate of type TopKGate"):
        layer(x, expert_ids=recorded)
    del gate.route
    assert torch.equal(layer(x, expert_ids=recorded), out)
    gate.__class__ = Scaled
    assert relative_error(layer.forward_with_aux(x)[1].l_aux, 100 * aux.l_aux) < 1e-6


def test_the_signature_of_a_gate_is_read_once(monkeypatch):
    class Recording(nn.Module):
        num_experts = E

        def route(self, tokens, used_token=None, expert_ids=None):
            return moe_ext.route(tokens[:, :E], 1, expert_ids=expert_ids)

    x = torch.randn(S, H)
    layers = [MOELayer(gate, GroupedExperts(E, H, 7)) for gate in (Scaled(H, E), Recording())]
    recorded = [None, torch.zeros(S, 1, dtype=torch.int32)]
    for _ in range(2):
        for layer, expert_ids in zip(layers, recorded, strict=True):
            layer(x, expert_ids=expert_ids)
        monkeypatch.setattr("moe_ext.deepspeed.foreign.inspect", None)


def test_a_gate_may_be_a_function_whose_signature_python_does_not_know():
    class Largest(nn.Module):
        forward = max

    layer = MOELayer(Largest(), GroupedExperts(1, 1, 7))
    with pytest.raises(RuntimeError, match=r"MOELayer: gate must return .* got Tensor$"):
        layer(torch.ones(1, 1), torch.ones(1))


@pytest.mark.parametrize("drop_tokens", [True, False])
def test_experts_written_for_deepspeed_run_in_our_layer(drop_tokens):
    shapes = []

    class Scale(nn.Module):
        num_experts = E
        routed = "an attribute of theirs, which is not the method of moe_ext.Experts"

        def forward(self, rows):
            shapes.append(tuple(rows.shape))
            return rows * torch.arange(1, E + 1).view(1, E, 1, 1)

    gate = TopKGate(H, E, 2, drop_tokens=drop_tokens, min_capacity=9).eval()
    layer = MOELayer(gate, Scale())
    x = torch.randn(30, H)
    routing = gate.route(x)
    factor = (routing.weights * (routing.plan.expert_ids + 1)).sum(-1, keepdim=True)
    assert relative_error(layer(x), x * factor) < 1e-6
    C = gate.capacity(30) if drop_tokens else int(routing.plan.load.max())
    assert shapes == [(1, E, C, H)]
    assert layer(x[:0]).shape == (0, H)


def test_padded_experts_need_the_host_only_without_dropping():
    moe = MoE(H, nn.Linear(H, H), E, use_rts=False).eval()
    x = torch.randn(S, H)
    torch._dynamo.reset()
    compiled = torch.compile(moe.deepspeed_moe.forward_with_aux, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x)[0], moe(x)[0])
    torch._dynamo.reset()
    dropless = MoE(H, nn.Linear(H, H), E, drop_tokens=False).to("meta")
    with pytest.raises(RuntimeError, match=r"Experts: without dropping, .* the largest load"):
        dropless(x.to("meta"))


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda x: x.transpose(-1, -2), r"\[1, 1, 10, \d+\]"),
        (lambda x: x[0], r"\[1, \d+, 10\]"),
        (lambda x: {}, "dict"),
        (lambda x: (), "tuple"),
    ],
)
def test_an_expert_that_returns_another_shape_is_an_error(function, got):
    with pytest.raises(RuntimeError, match=rf"Experts: expert 0 must return .* got {got}$"):
        MoE(H, Apply(function), E)(torch.randn(S, H))


def test_padded_experts_may_be_scripted():
    gate, experts, x = TopKGate(H, E).eval(), nn.Linear(H, H), torch.randn(30, H)
    expected = MOELayer(gate, experts, num_local_experts=E)(x)
    scripted = torch.jit.trace(experts, torch.ones(1, E, 8, H))
    assert torch.equal(MOELayer(gate, scripted, num_local_experts=E)(x), expected)


@pytest.mark.parametrize("function", [lambda x: x.transpose(1, 2), lambda x: x[:, :1]])
def test_padded_experts_that_return_another_shape_are_an_error(function):
    layer = MOELayer(TopKGate(H, E), Apply(function), num_local_experts=E)
    got = list(function(torch.ones(1, E, 8, H)).shape)
    message = f"Apply: experts must return [ep, E, C, H] = [1, 6, 8, 10], got {got}"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        layer(torch.randn(30, H))


@pytest.mark.parametrize("returned", [None, (1, 2)])
def test_a_route_that_is_not_a_routing_is_an_error(returned):
    class Gate(nn.Module):
        def route(self, tokens, used_token):
            return returned

    with pytest.raises(ValueError, match="MOELayer: Gate has route, but no num_experts"):
        MOELayer(Gate(), GroupedExperts(2, 4, 4))
    Gate.num_experts = 2
    layer, got = MOELayer(Gate(), GroupedExperts(2, 4, 4)), type(returned).__name__
    with pytest.raises(RuntimeError, match=f"Gate.route must return a moe_ext.Routing, got {got}"):
        layer(torch.randn(3, 4))
