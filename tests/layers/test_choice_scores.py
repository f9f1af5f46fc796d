"""Scores used for top-k selection: noise, groups, a bias, Sinkhorn."""

import copy
import math
from functools import partial

import pytest
import torch
from cases import all_equal, relative_error, with_seed
from rules import SCORES, E, H, T, chosen, gate_for, tokens
from torch import nn

from moe_ext import TopKGate
from moe_ext.routing import choice_scores

pytestmark = pytest.mark.usefixtures("poisoned")

NOISE = "RSample", "Gaussian", "Jitter"


def test_a_sampled_second_expert_stays_in_the_groups():
    gate = gate_for(2, top2_2nd_expert_sampling=True, num_groups=4, topk_groups=1)
    experts = chosen(gate.route(tokens(500)))
    assert torch.equal(experts[:, 0] // 3, experts[:, 1] // 3)


@pytest.mark.parametrize("by", ["max", "top2_sum"])
@pytest.mark.parametrize("scoring", SCORES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("used", [2, 4])
def test_a_token_chooses_within_its_best_groups(by, scoring, bias, used):
    options = {"scoring": scoring, "group_score": by, "expert_bias": bias}
    gate = gate_for(3, num_groups=4, topk_groups=used, **options)
    if bias:
        gate.expert_bias.copy_(torch.randn(E))
    x = tokens()
    logits = x @ gate.wg.weight.T
    scores = SCORES[scoring](logits) + (gate.expert_bias if bias else 0)
    for t in range(T):
        groups = scores[t].view(4, 3)
        worth = groups.amax(-1) if by == "max" else groups.topk(2).values.sum(-1)
        allowed = {3 * int(g) + i for g in worth.topk(used).indices for i in range(3)}
        best = sorted(allowed, key=lambda e: -scores[t, e])[:3]
        assert chosen(gate.route(x[t : t + 1]))[0].tolist() == best
    assert torch.equal(
        gate.route(x).weights, gate.route(x, expert_ids=gate.route(x).plan.expert_ids).weights
    )


def test_equal_groups_go_to_the_lower_one():
    zeros = torch.zeros(3, 256)
    mask = choice_scores.group_mask(zeros, 64, 5, "max")
    assert torch.equal(mask, torch.arange(256).expand(3, 256) < 20)


def test_expert_bias_stays_float32():
    """A step of 0.001 is lost in 16 bits."""
    gate = TopKGate(H, E, 2, expert_bias=True)
    state = {name: value.bfloat16() for name, value in gate.state_dict().items()}
    with torch.device("meta"):
        gate = TopKGate(H, E, 2, expert_bias=True)
    gate.load_state_dict(state, assign=True)
    assert gate.expert_bias.dtype == gate.bfloat16().expert_bias.dtype == torch.float32
    gate.expert_bias.fill_(0.5)
    gate.update_bias(torch.arange(E))
    assert (gate.expert_bias != 0.5).any()
    gate.expert_bias = gate.expert_bias.to("meta")
    message = "expert_bias must be on cpu like the tokens, got meta; .* offload_buffers=False"
    with pytest.raises(RuntimeError, match=message):
        gate.route(torch.randn(4, H))


def test_expert_bias_changes_the_choice_not_the_weights():
    gate = gate_for(2, scoring="sigmoid", expert_bias=True)
    x = tokens()
    plain = gate.route(x)
    assert set(gate.state_dict()) == {"wg.weight", "expert_bias"}
    gate.expert_bias[7] = 5
    routing = gate.route(x)
    assert (chosen(routing)[:, 0] == 7).all()
    assert torch.equal(routing.probs, plain.probs)
    weights = routing.probs.gather(-1, chosen(routing))
    assert torch.equal(routing.weights, weights / weights.sum(-1, keepdim=True))


def test_updates_of_the_bias_balance_the_load():
    gate = gate_for(2, scoring="sigmoid", expert_bias=True)
    x = tokens(600) + 2 * tokens(1)
    before = gate.route(x).plan.load
    assert before.max() > 3 * 100
    for _ in range(400):
        gate.update_bias(gate.route(x).plan.load, rate=2e-3)
    after = gate.route(x).plan.load
    assert after.max() < 1.2 * 100
    assert after.min() > 0.8 * 100


def test_an_update_is_one_step_up_or_down():
    gate = gate_for(1, expert_bias=True)
    load = torch.tensor([5] * 4 + [4] * 4 + [6] * 4)
    gate.update_bias(load, rate=0.25)
    assert gate.expert_bias.tolist() == [0.0] * 4 + [0.25] * 4 + [-0.25] * 4
    assert load.tolist() == [5] * 4 + [4] * 4 + [6] * 4
    with pytest.raises(RuntimeError, match=r"load must be \[E\] with E = 12, .* got \[3\]"):
        gate.update_bias(load[:3])
    with pytest.raises(RuntimeError, match=r"load must be counts, integers, got torch\.float32"):
        gate.update_bias(load / 60)
    with pytest.raises(RuntimeError, match="as exp_counts of a layer that was called, got None"):
        gate.update_bias(None)
    with pytest.raises(RuntimeError, match="update_bias needs expert_bias=True"):
        gate_for(1).update_bias(load)


def test_the_bias_stays_float32():
    gate = gate_for(1, expert_bias=True)
    gate.expert_bias.fill_(0.1001)
    value = gate.expert_bias.clone()
    for cast in (gate.bfloat16, gate.half, gate.double):
        cast()
        assert gate.expert_bias.dtype == torch.float32
        assert torch.equal(gate.expert_bias, value)
    twin = copy.deepcopy(gate)
    twin.update_bias(torch.arange(E))
    assert torch.equal(gate.expert_bias, value)
    assert not torch.equal(twin.expert_bias, value)
    with torch.device("meta"):
        empty = gate_for(1, expert_bias=True)
    real = empty.to_empty(device=torch.get_default_device())
    real.reset_parameters()
    assert (real.expert_bias == 0).all()


def test_draws_are_float32(request):
    """Draws do not depend on torch's default dtype."""
    x = tokens()
    results = []
    request.addfinalizer(partial(torch.set_default_dtype, torch.float32))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        gate = gate_for(1, capacity_factor=0.5, drop_policy="random", expert_bias=True)
        nn.init.eye_(gate.wg.weight)
        assert gate.expert_bias.dtype == torch.float32
        results.append((with_seed(gate.route, x).plan.slots, choice_scores.gumbel(x)))
    assert all(all_equal(result, results[0]) for result in results[1:])


def test_an_expert_with_score_minus_inf_stays_in_its_group():
    logits = torch.tensor([[1.0, 0.5, 3.0, -math.inf], [-math.inf, -math.inf, math.nan, 0.0]])
    gate = TopKGate(4, 4, 2, num_groups=2, router=nn.Identity(), drop_tokens=False)
    routing = gate.eval().route(logits)
    assert chosen(routing).tolist() == [[2, 3], [2, 3]]
    assert routing.weights[0].tolist() == [1, 0]


def test_sinkhorn_balances_the_choice():
    gate = gate_for(1, balancing="sinkhorn")
    x = tokens(600) + tokens(1)
    plain = gate.eval().route(x)
    balanced = gate.train().route(x)
    assert plain.plan.load.max() > 3 * 50
    assert balanced.plan.load.max() < 2 * 50
    assert torch.equal(balanced.probs, plain.probs)
    logits = x @ gate.wg.weight.T
    column_sums = choice_scores.sinkhorn(logits, iterations=200).softmax(-1).sum(0)
    assert relative_error(column_sums, torch.full((E,), 50.0)) < 1e-6
    shift = choice_scores.sinkhorn(logits) - logits
    assert (shift - shift[:1]).abs().max() < 1e-12


def test_sinkhorn_counts_only_tokens_that_take_part():
    logits = torch.randn(40, E, dtype=torch.float64)
    used = torch.rand(40) < 0.7
    other = logits.clone()
    other[~used] = torch.randn(int((~used).sum()), E, dtype=torch.float64) + 9
    a, b = (choice_scores.sinkhorn(x, used) for x in (logits, other))
    assert torch.equal(a[used], b[used])
    assert torch.equal(b[~used], other[~used])
    keeps = torch.arange(40) != 3
    expected = choice_scores.sinkhorn(logits, keeps)[keeps]
    for bad in (math.nan, math.inf):
        other = logits.clone()
        other[3, 5] = bad
        assert torch.equal(choice_scores.sinkhorn(other)[keeps], expected)
    other = logits.clone()
    other[:, 2] = -math.inf
    column_sums = choice_scores.sinkhorn(other, iterations=200).softmax(-1).sum(0)
    assert column_sums[2] == 0
    assert relative_error(column_sums[3:], torch.full((E - 3,), 40 / (E - 1))) < 1e-6
    assert torch.equal(choice_scores.sinkhorn(logits[:0]), logits[:0])
    assert torch.equal(choice_scores.sinkhorn(logits, used & ~used), logits)


def test_a_gate_by_sinkhorn_leaves_unused_tokens_out():
    gate = gate_for(2, balancing="sinkhorn", top2_2nd_expert_sampling=True)
    x, used = tokens(), torch.rand(T) < 0.6
    other = torch.where(used.unsqueeze(-1), x, 5 + tokens())
    assert torch.equal(*(chosen(with_seed(gate.route, y, used)) for y in (x, other)))


def test_gaussian_noise_is_on_the_logits():
    x = tokens(2000)
    for scale, deviation in ((0.3, 0.3), (None, 1 / E)):
        gate = gate_for(2, noisy_gate_policy="Gaussian", noise_scale=scale)
        noise = gate.route(x).logits - x @ gate.wg.weight.T
        assert abs(noise.std() / deviation - 1) < 0.03
        assert abs(noise.mean()) < 0.01
    assert relative_error(gate.eval().route(x).logits, x @ gate.wg.weight.T) < 1e-12


def test_noise_scale_sets_the_size_of_jitter():
    x = tokens()
    for scale, size in ((None, 0.01), (0.0, 0.0), (0.5, 0.5), (3.0, 3.0)):
        gate = gate_for(1, noisy_gate_policy="Jitter", noise_scale=scale)
        nn.init.eye_(gate.wg.weight)
        noise = gate.route(x).logits[:, :H] / x - 1
        for end in (noise.max(), -noise.min()):
            assert 0.97 * size <= end <= size + 1e-6


def test_rsample_draws_both_choices_at_once():
    """Noise of size zero changes no choice."""
    gate = gate_for(2, noisy_gate_policy="RSample", noise_scale=0.0, top2_2nd_expert_sampling=True)
    x = tokens()
    assert torch.equal(chosen(gate.route(x)), chosen(gate.eval().route(x)))


@pytest.mark.parametrize("k", [1, 3])
def test_rsample_draws_from_the_softmax(k):
    gate = gate_for(k, noisy_gate_policy="RSample")
    x = tokens(1).expand(20_000, H)
    routing = gate.route(x)
    share = torch.bincount(chosen(routing)[:, 0], minlength=E) / 20_000
    assert (share - routing.probs[0]).abs().max() < 0.015


def test_only_the_second_expert_is_sampled():
    gate = TopKGate(H, E, k=2, drop_tokens=False)
    x = torch.randn(200, H)
    x[3] = math.nan
    drawn, plain = gate.route(x).plan.expert_ids, gate.eval().route(x).plan.expert_ids
    assert torch.equal(drawn[:, 0], plain[:, 0])
    assert not torch.equal(drawn[:, 1], plain[:, 1])
    assert drawn[3].tolist() == [0, 1]


def test_the_second_expert_is_sampled_by_balanced_scores():
    gate = TopKGate(H, E, k=2, drop_tokens=False, balancing="sinkhorn")
    routing = with_seed(gate.route, torch.randn(200, H) + torch.randn(H))
    balanced = choice_scores.sinkhorn(routing.logits)
    first = balanced.argmax(-1, keepdim=True)
    noisy = balanced + with_seed(choice_scores.gumbel, balanced)
    second = noisy.scatter(1, first, -math.inf).argmax(-1, keepdim=True)
    assert torch.equal(routing.plan.expert_ids.long(), torch.cat([first, second], 1))


SECOND = {"top2_2nd_expert_sampling": True}
RANDOM = {"drop_policy": "random", "capacity_factor": 0.4, "eval_capacity_factor": 0.4}


@pytest.mark.parametrize(
    ("options", "draws_in_eval"),
    [
        *(({"noisy_gate_policy": noise}, False) for noise in NOISE),
        *(({"noisy_gate_policy": noise, "noise_in_eval": True}, True) for noise in NOISE),
        ({"noisy_gate_policy": "Jitter", "sampling_in_eval": True}, False),
        *((options, False) for options in (SECOND, RANDOM)),
        *((options | {"sampling_in_eval": True}, True) for options in (SECOND, RANDOM)),
    ],
)
def test_a_gate_draws_in_training_and_where_asked_in_evaluation(options, draws_in_eval):
    gate, x = gate_for(2, **options), tokens()
    for training, draws in ((True, True), (False, draws_in_eval)):
        a, b = (gate.train(training).route(x) for _ in range(2))
        assert torch.equal(a.weights, b.weights) != draws
