"""Properties of every gate option and input: NaN, infinity, no token, one expert."""

import math
import random
from typing import get_args

import pytest
import torch
from cases import with_seed
from torch import nn

from moe_ext import Experts, MOELayer, TopKGate
from moe_ext.deepspeed.gate import NOISE_SCALES
from moe_ext.ops import checks
from moe_ext.options import Balancing, DropPolicy, Normalize
from moe_ext.routing import choice_scores

FACTORS = 0.05, 0.3, 0.5, 0.8, 1.0, 1.25, 20.0
SPECIAL = math.nan, math.inf, -math.inf, 3e38


@pytest.fixture(params=range(300))
def draw(request) -> random.Random:
    """The generator of an example."""
    return random.Random(request.param)


def gate_from(draw: random.Random, **fixed) -> TopKGate:
    """A gate whose logits are its tokens, H = E."""
    groups, group_size = draw.randint(1, 4), draw.randint(1, 4)
    E = groups * group_size
    used_groups = draw.randint(1, groups)
    choices = {
        "k": range(1, group_size * used_groups + 1),
        "capacity_factor": FACTORS,
        "eval_capacity_factor": FACTORS,
        "min_capacity": [0, 1, 8],
        "noisy_gate_policy": list(NOISE_SCALES),
        "drop_policy": [None, *get_args(DropPolicy)],
        "order": [None, *checks.ORDERS],
        "scoring": checks.SCORINGS,
        "normalize": [None, *get_args(Normalize)],
        "scale": [1.0, 0.25, 16.0],
        "group_score": choice_scores.GROUP_SCORES,
        "balancing": [None, *get_args(Balancing)],
        "noise_scale": [None, 0.0, 0.3, 1.0, 2.0],
    }
    flags = "drop_tokens", "use_rts", "top2_2nd_expert_sampling", "expert_bias"
    choices |= dict.fromkeys((*flags, "noise_in_eval", "sampling_in_eval"), (False, True))
    options = {name: draw.choice(values) for name, values in choices.items()} | fixed
    options |= {"num_groups": groups, "topk_groups": used_groups, "router": nn.Identity()}
    gate = TopKGate(E, E, **options)
    if gate.expert_bias is not None:
        gate.expert_bias.copy_(torch.randn(E))
    return gate.train(draw.choice([False, True]))


def logits_from(draw: random.Random, E: int, special: bool = True) -> torch.Tensor:
    T = draw.choice([0, 1, 2, 7, 40, 130])
    logits = torch.randn(T, E) * draw.choice([0.0, 1.0, 30.0])
    # One expert that all tokens prefer.
    logits[:, draw.randrange(E)] += draw.choice([0.0, 3.0])
    if special and T:
        for _ in range(draw.randint(0, 6)):
            logits[draw.randrange(T), draw.randrange(E)] = draw.choice(SPECIAL)
        if draw.random() < 0.5:
            logits[draw.randrange(T)] = draw.choice([math.nan, -math.inf])
    return logits


def mask_from(draw: random.Random, T: int) -> torch.Tensor | None:
    return draw.choice([None, torch.rand(T) < 0.6, torch.zeros(T, dtype=torch.bool)])


def test_every_routing_keeps_the_contracts(draw):
    gate = gate_from(draw)
    logits = logits_from(draw, gate.num_experts)
    used = mask_from(draw, len(logits))
    got = gate.route(logits, used)
    plan, (T, K), E = got.plan, got.weights.shape, gate.num_experts
    assert (len(logits), gate.k) == (T, K)

    experts, slots = plan.expert_ids.long(), plan.slots.long()
    routed = torch.ones(T, dtype=torch.bool) if used is None else used
    assert (experts[~routed] == -1).all()
    assert ((experts[routed] >= 0) & (experts[routed] < E)).all()
    assert (experts[routed].sort(dim=-1).values.diff(dim=-1) > 0).all()  # they are distinct
    if gate.balancing != "forced":
        groups = experts[routed] // (E // gate.num_groups)
        used_groups = nn.functional.one_hot(groups, gate.num_groups).amax(1).sum(-1)
        assert (used_groups <= gate.topk_groups).all()

    kept = slots >= 0
    load = torch.bincount(experts[experts >= 0], minlength=E)
    assert torch.equal(plan.load.long(), load)
    assert (experts[kept] >= 0).all()
    C = gate.capacity(T)
    rows = torch.bincount(experts[kept], minlength=E)
    assert torch.equal(rows, load if C is None else load.clamp(max=C))
    assert torch.equal(plan.kept().long(), rows)
    rule = gate.rule if gate.training else gate.eval_rule
    queued, queue = (x.t() if rule.order == "choice" else x for x in (slots, experts))
    for e in range(E):
        asked = queued[queue == e]
        mine = asked[asked >= 0]
        assert torch.equal(mine, plan.offsets[e] + torch.arange(len(mine)))
        if rule.drop_policy == "position":
            assert (asked[len(mine) :] < 0).all()

    assert (got.weights[~kept] == 0).all()
    sums = logits.logsumexp(-1)
    clean = sums.isfinite() & (logits.abs().amax(-1) < 1e30)
    assert got.weights[clean].isfinite().all()
    assert (got.weights[clean] >= 0).all()
    assert got.l_aux.dim() == 0
    if clean.all():
        assert got.l_aux.isfinite()
    if gate.normalize in ("before", "after") or (gate.normalize is None and gate.k > 1):
        total = got.weights.sum(-1)[clean]
        assert (total <= gate.scale * (1 + 1e-5)).all()


def test_forms_say_the_same(draw):
    gate = gate_from(draw, noisy_gate_policy=None).eval()
    gate.sampling_in_eval = False
    logits = logits_from(draw, gate.num_experts, special=False)
    used = mask_from(draw, len(logits))
    _, combine_weights, dispatch_mask, counts = gate(logits, used)
    for lists in (gate(logits, used, sparse_routes=True), gate(logits, used, use_tutel=True)):
        _, C, E, indices, locations, weights, counts_beside_lists = lists
        assert combine_weights.shape == dispatch_mask.shape == (len(logits), E, int(C))
        assert torch.equal(counts, counts_beside_lists)
        rebuilt = torch.zeros_like(combine_weights)
        for k in range(gate.k):
            kept = indices[k] >= 0
            token = torch.arange(len(logits))[kept]
            rebuilt[token, indices[k][kept].long(), locations[k][kept].long()] += weights[k][kept]
            assert (weights[k][~kept] == 0).all()
            assert (locations[k][~kept] == 0).all()
        assert torch.equal(rebuilt, combine_weights)
    assert (dispatch_mask.sum(0) <= 1).all()


class Twice(Experts):
    def forward(self, rows, plan):
        return 2 * rows


def test_a_layer_and_its_gradient_equal_the_plain_loop(draw):
    """With experts that double, a token's output is twice the sum of its weights times the token; a
    value that is not finite stays in its token."""
    gate = gate_from(draw, balancing=None)
    logits = logits_from(draw, gate.num_experts).requires_grad_()
    used = mask_from(draw, len(logits))
    layer = MOELayer(gate, Twice(gate.num_experts))
    out, aux = with_seed(layer.forward_with_aux, logits, used)
    weights = with_seed(gate.route, logits, used).weights
    clean = logits.detach().abs().amax(-1) < 1e3
    expected = 2 * logits * weights.sum(-1, keepdim=True)
    torch.testing.assert_close(out[clean], expected[clean], rtol=1e-5, atol=1e-4)
    grad, by_hand = (
        torch.autograd.grad(x[clean].sum(), logits, retain_graph=True)[0][clean]
        for x in (out, expected)
    )
    assert grad.isfinite().all()
    torch.testing.assert_close(grad, by_hand, rtol=1e-4, atol=1e-3)
    if clean.all():
        assert torch.autograd.grad(aux.l_aux + out.sum(), logits)[0].isfinite().all()


def test_a_bad_token_spoils_no_other(draw):
    gate = gate_from(draw, drop_tokens=False)
    E = gate.num_experts
    logits = logits_from(draw, E, special=False)
    if len(logits) == 0:
        return
    bad = draw.randrange(len(logits))
    spoilt = logits.clone()
    spoilt[bad] = torch.tensor(draw.choices([math.nan, math.inf, -math.inf, 0.0], k=E))
    if gate.balancing == "sinkhorn" and gate.training:
        # Sinkhorn balances the batch: a token that takes part changes the others.
        spoilt[bad], logits[bad] = math.nan, math.inf
    others = torch.arange(len(logits)) != bad
    a, b = (with_seed(gate.route, x) for x in (logits, spoilt))
    assert torch.equal(a.plan.expert_ids[others], b.plan.expert_ids[others])
    assert torch.equal(a.weights[others], b.weights[others])
