"""Route: weights, dropping, replay and losses."""

import copy
import math
from functools import partial

import pytest
import torch
from cases import all_equal, assert_near, relative_error, with_seed
from rules import SCORES, E, H, T, chosen, expert_by_hand, gate_for, layer_for, tokens

from moe_ext import GroupedExperts, MOELayer, TopKGate, losses, route

pytestmark = pytest.mark.usefixtures("poisoned")


def assert_same_results(out, expected, x):
    """The values, and their gradients by x."""
    gradients = partial(torch.autograd.grad, inputs=x, retain_graph=True)
    assert_near(*((y, *gradients(y.square().sum())) for y in (out, expected)), 1e-12)


@pytest.mark.parametrize("scoring", SCORES)
@pytest.mark.parametrize("normalize", ["never", "before", "after"])
@pytest.mark.parametrize("policy", ["random", "position", "probs"])
@pytest.mark.parametrize(("k", "scale"), [(1, 1.0), (2, 2.5), (5, 0.5)])
def test_weights_follow_scoring_normalize_and_scale(scoring, normalize, policy, k, scale):
    options = {"scoring": scoring, "normalize": normalize, "scale": scale, "drop_policy": policy}
    gate = gate_for(k, capacity_factor=0.7, **options)
    x = tokens().requires_grad_()
    routing = gate.route(x)
    probs = SCORES[scoring](x @ gate.wg.weight.T)
    kept = routing.plan.slots >= 0
    assert 0 < kept.sum() < kept.numel()
    weights = probs.gather(-1, chosen(routing))
    if normalize == "before":
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights * kept
    if normalize == "after":
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
    weights = weights * scale
    assert_near((routing.weights, routing.probs), (weights, probs), 1e-12)
    upstream = torch.randn_like(weights)
    grads = [torch.autograd.grad((w * upstream).sum(), x)[0] for w in (routing.weights, weights)]
    # A normalized single choice has weight one and gradient zero.
    assert (grads[0] - grads[1]).norm() < 1e-12 * (grads[1].norm() + 1)


@pytest.mark.parametrize(
    ("k", "options"),
    [(1, {"use_rts": True}), (2, {"drop_policy": "random"}), (4, {"drop_policy": "random"})],
)
def test_random_token_selection_replays_one_uniform_draw(k, options):
    gate = gate_for(k, capacity_factor=0.5, **options)
    x = tokens()
    plan = with_seed(gate.route, x).plan
    uniform = with_seed(torch.rand, T, E)
    for e in range(E):
        asked = plan.expert_ids == e
        kept = (asked & (plan.slots >= 0)).any(-1)
        best = torch.where(asked.any(-1), uniform[:, e], -1).topk(int(kept.sum())).indices
        assert set(kept.nonzero().flatten().tolist()) == set(best.tolist())
        assert kept.sum() == min(gate.capacity(T), asked.sum())


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("normalize", ["never", "before", "after"])
@pytest.mark.parametrize("capacity", [None, T // E - 1])
@pytest.mark.parametrize(
    ("order", "own_scores", "dtype"),
    [("choice", False, torch.float64), ("token", True, torch.float64), ("token", False, None)],
)
def test_one_node_has_the_values_and_gradients_of_three(
    k, normalize, capacity, order, own_scores, dtype
):
    """A mask in which all tokens are used has gate, plan and balance one by one."""
    logits = torch.randn(T, E, dtype=dtype or torch.bfloat16, requires_grad=True)
    options = {"normalize": normalize, "capacity": capacity, "scale": 1.5, "order": order}
    options["choice_scores"] = torch.randn_like(logits).detach() if own_scores else None
    one, three = (route(logits, k, **options, used_token=it) for it in (None, torch.ones(T)))
    assert one.l_aux.grad_fn.name() == "GatePlanBalanceBackward"
    assert three.l_aux.grad_fn.name() == "BalanceBackward"
    assert all_equal(one.plan[:5], three.plan[:5])
    assert one.plan[5:] == three.plan[5:]
    assert (one.plan.slots < 0).any() == (capacity is not None)
    upstream = [torch.randn_like(y) for y in results_of(one)]
    for wanted in (slice(None), slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4)):
        found = []
        for routing in (one, three):
            results = results_of(routing)[wanted]
            grad = partial(torch.autograd.grad, inputs=logits, create_graph=True)
            (first,) = grad(results, grad_outputs=upstream[wanted])
            assert first.dtype == logits.dtype
            found.append((*results, first, *grad(first.square().sum())))
        assert_near(*found, 1e-13 if dtype else 2e-2)


def results_of(routing):
    """What has a gradient."""
    return routing.weights, routing.probs, routing.importance, routing.l_aux


@pytest.mark.parametrize("normalize", ["never", "before", "after"])
def test_the_least_probable_are_dropped_by_their_score(normalize):
    gate = gate_for(3, capacity_factor=0.5, normalize=normalize)
    routing = gate.route(tokens())
    scores = routing.probs.gather(-1, chosen(routing))
    for e in range(E):
        asked, kept = chosen(routing) == e, routing.plan.slots >= 0
        best = scores[asked].sort(descending=True).values[: gate.capacity(T)]
        assert torch.equal(scores[asked & kept].sort(descending=True).values, best)


def test_options_may_change_after_construction():
    """An option set later routes as one given to the constructor."""
    x = torch.randn(T, H)
    for name, value in (
        ("use_rts", False),
        ("k", 2),
        ("k", 3),
        ("noisy_gate_policy", "RSample"),
        ("noisy_gate_policy", "Jitter"),
        ("noisy_gate_policy", "Gaussian"),
        ("capacity_factor", 0.2),
        ("drop_tokens", False),
        ("min_capacity", 30),
    ):
        made = TopKGate(H, E, **({"capacity_factor": 0.5, "min_capacity": 0} | {name: value}))
        changed = TopKGate(H, E, capacity_factor=0.5, min_capacity=0)
        changed.load_state_dict(made.state_dict())
        before = with_seed(changed.route, x)
        setattr(changed, name, value)
        expected, after = (with_seed(gate.route, x) for gate in (made, changed))
        assert torch.equal(expected.weights, after.weights)
        assert torch.equal(expected.plan.slots, after.plan.slots)
        assert not torch.equal(before.weights, after.weights)


def test_repr_shows_options_that_are_not_default():
    text = str(gate_for(2, scoring="sigmoid", num_groups=3, topk_groups=2))
    for option in ("k=2", "scoring='sigmoid'", "num_groups=3", "drop_tokens=False"):
        assert option in text
    assert "balancing" not in text


def test_expert_choice_is_top_c_per_expert():
    """With K = E and drop_policy="probs" every expert keeps its C best tokens."""
    c = 2
    layer = layer_for(E, drop_policy="probs", normalize="never", capacity_factor=c / E)
    x = tokens().requires_grad_()
    probs = (x @ layer.gate.wg.weight.T).softmax(-1)
    C = c * T // E
    assert layer.gate.capacity(T) == C
    expected = torch.zeros_like(x)
    for e in range(E):
        best = probs[:, e].topk(C).indices
        rows = expert_by_hand(layer.experts, e, x[best])
        expected = expected.index_add(0, best, rows * probs[best, e].unsqueeze(-1))
    assert_same_results(layer(x), expected, x)


@pytest.mark.parametrize("k", [1, 3, E])
def test_forced_balancing_loads_all_experts_equally(k):
    gate = gate_for(k, balancing="forced")
    routing = gate.route(tokens(T + 1))
    load = routing.plan.load
    assert load.max() - load.min() <= 1
    assert load.sum() == (T + 1) * k
    assert (chosen(routing).sort(-1).values.diff(dim=-1) > 0).all()
    routing.weights.square().sum().backward()
    assert gate.wg.weight.grad.abs().sum() > 0


def test_weights_of_chosen_experts_with_vanishing_scores():
    """The smallest divisor is DeepSpeed's after dropping, and invisible before."""
    logits = torch.tensor([[0.0, -25.0]])
    experts = torch.ones(1, 1, dtype=torch.int32)
    score = math.exp(-25)
    for normalize, weight in (
        ("never", score),
        ("before", 1),
        ("after", score / torch.finfo(torch.float32).eps),
    ):
        routing = route(logits, 1, expert_ids=experts, normalize=normalize)
        assert routing.weights.item() == pytest.approx(weight, rel=1e-5)
    assert route(logits, 1, expert_ids=experts, normalize="before", scale=2.5).weights == 2.5
    for scoring in ("sigmoid", "sqrtsoftplus"):
        weights = route(torch.full((1, 4), -20.0), 2, scoring=scoring, normalize="after").weights
        torch.testing.assert_close(weights, torch.full((1, 2), 0.5))


@pytest.mark.parametrize("options", [{}, {"capacity_factor": 0.6}, {"balancing": "forced"}])
def test_a_recorded_choice_is_replayed(options):
    drawn = {"noisy_gate_policy": "RSample", "top2_2nd_expert_sampling": True}
    gate = gate_for(2, scale=1.5, **drawn, **options)
    layer = MOELayer(gate, GroupedExperts(E, H, 7, dtype=torch.float64))
    x = tokens().requires_grad_()
    used = torch.rand(T) < 0.8
    gate.balancing = None
    out, aux = layer.forward_with_aux(x, used)
    gate.balancing = options.get("balancing")
    assert not torch.equal(layer.forward_with_aux(x, used)[1].expert_ids, aux.expert_ids)
    again, aux_again = layer.forward_with_aux(x, expert_ids=aux.expert_ids)
    assert all_equal((again, *aux_again), (out, *aux))
    assert torch.equal(layer(x, expert_ids=aux.expert_ids), out)
    assert_same_results(again, out, x)


@pytest.mark.parametrize("normalize", ["before", "after", "never"])
def test_a_recorded_choice_of_minus_one_has_zero_weight(normalize):
    gate = gate_for(2, normalize=normalize)
    x = tokens(3)
    recorded = torch.tensor([[4, -1], [-1, 7], [-1, -1]], dtype=torch.int32)
    routing = gate.route(x, expert_ids=recorded)
    assert torch.equal(routing.plan.expert_ids, recorded)
    probs = routing.probs.detach()
    first, second = (probs[0, 4], probs[1, 7]) if normalize == "never" else (1, 1)
    weights = torch.tensor([[first, 0], [0, second], [0, 0]], dtype=torch.float64)
    torch.testing.assert_close(routing.weights, weights)
    with pytest.raises(RuntimeError, match="route: expert_ids must be int32, got int64"):
        gate.route(x, expert_ids=recorded.long())
    must = r"route: expert_ids must be \[T, K\] with T = 3, K = 2, got"
    for other in (recorded[:2], recorded[:, :1]):
        with pytest.raises(RuntimeError, match=must):
            gate.route(x, expert_ids=other)


def test_as_hf_tuple_is_transformers_order():
    gate = gate_for(2, normalize="before")
    x = tokens()
    logits, weights, experts = gate.route(x).as_hf_tuple()
    expected = x @ gate.wg.weight.T
    values, ids = expected.topk(2, dim=-1)
    assert_near((logits, weights), (expected, values.softmax(-1)), 1e-12)
    assert torch.equal(experts, ids)


def test_aux_loss_replaces_the_loss():
    def loss(routing):
        return losses.z_loss(routing.logits) + routing.weights.sum()

    layer = MOELayer(gate_for(2, aux_loss=loss), GroupedExperts(E, H, 7, dtype=torch.float64))
    x = tokens()
    layer(x)
    assert torch.equal(layer.l_aux, loss(layer.gate.route(x)))
    for wrong, got in ((lambda r: 0.1, "float"), (lambda r: r.probs.sum(0), r"\[12\]")):
        layer.gate.aux_loss = wrong
        with pytest.raises(RuntimeError, match=rf"aux_loss must return a tensor \[\], got {got}"):
            layer(x)


@pytest.mark.parametrize("scoring", ["sigmoid", "sqrtsoftplus"])
def test_the_loss_of_scores_that_do_not_sum_to_one(scoring):
    gate = gate_for(3, scoring=scoring)
    routing = gate.route(tokens())
    shares = routing.probs / routing.probs.sum(-1, keepdim=True)
    by_hand = E / 3 * (shares.mean(0) * routing.plan.load / T).sum()
    assert relative_error(routing.l_aux, by_hand) < 1e-12


def test_wall_clock_breakdown_times_gate_and_layer():
    layer = MOELayer(gate_for(2), GroupedExperts(E, H, 7, dtype=torch.float64))
    x = tokens()
    layer(x)
    assert layer.time_moe == layer.gate.gate_time == 0
    layer.wall_clock_breakdown = layer.gate.wall_clock_breakdown = True
    expected = layer(x)
    first = layer.time_moe
    assert 0 < layer.gate.gate_time < first
    layer(x)
    assert layer.time_moe > first
    with pytest.raises(RuntimeError):
        layer(x[:, 1:])
    assert torch.equal(layer(x), expected)
    of_gate, timer = layer.gate.timers("topk_gate"), layer.timers("moe")
    assert of_gate.elapsed(reset=False) > of_gate.mean()
    assert timer.elapsed(reset=True) == layer.time_moe
    for _ in range(2):
        timer.start()
        timer.stop()
    assert timer.elapsed(reset=False) == pytest.approx(2 * timer.mean())
    timer.start()
    timer.stop(reset=True)
    assert timer.elapsed(reset=False) == timer.mean()
    timer.reset()
    assert layer.timers("moe").elapsed() == 0
    assert torch.equal(copy.deepcopy(layer)(x), expected)
