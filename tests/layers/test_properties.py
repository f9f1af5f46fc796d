"""Properties of every gate option and input: NaN, infinity, no token, one expert."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from moe_ext import Experts, MOELayer, TopKGate
from moe_ext.deepspeed.gate import NOISE_SCALES
from moe_ext.ops import checks
from moe_ext.options import Balancing, DropPolicy, Normalize
from moe_ext.routing import choice_scores

# Equal examples on every run.
settings.register_profile(
    "moe_ext",
    deadline=None,
    derandomize=True,
    max_examples=400,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("moe_ext")

NOISE = st.sampled_from(list(NOISE_SCALES))


@st.composite
def gates(draw, **fixed) -> TopKGate:
    """A gate whose logits are its tokens, H = E."""
    groups, group_size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    E = groups * group_size
    used_groups = draw(st.integers(1, groups))
    options = {
        "k": st.integers(1, group_size * used_groups),
        "capacity_factor": st.floats(0.05, 20),
        "eval_capacity_factor": st.floats(0.05, 20),
        "min_capacity": st.sampled_from([0, 1, 8, 50]),
        "noisy_gate_policy": NOISE,
        "drop_tokens": st.booleans(),
        "use_rts": st.booleans(),
        "top2_2nd_expert_sampling": st.booleans(),
        "drop_policy": st.sampled_from([None, *get_args(DropPolicy)]),
        "order": st.sampled_from([None, *checks.ORDERS]),
        "scoring": st.sampled_from(checks.SCORINGS),
        "normalize": st.sampled_from([None, *get_args(Normalize)]),
        "scale": st.sampled_from([1.0, 0.25, 16.0]),
        "group_score": st.sampled_from(choice_scores.GROUP_SCORES),
        "expert_bias": st.booleans(),
        "balancing": st.sampled_from([None, *get_args(Balancing)]),
        "noise_in_eval": st.booleans(),
        "sampling_in_eval": st.booleans(),
        "noise_scale": st.sampled_from([None, 0.0, 0.3, 1.0, 2.0]),
    }
    values = {name: fixed[name] if name in fixed else draw(s) for name, s in options.items()}
    gate = TopKGate(
        E, E, **values, num_groups=groups, topk_groups=used_groups, router=nn.Identity()
    )
    if gate.expert_bias is not None:
        gate.expert_bias.copy_(torch.randn(E))
    return gate.train(draw(st.booleans()))


@st.composite
def logits_for(draw, E: int, special: bool = True) -> torch.Tensor:
    T = draw(st.sampled_from([0, 1, 2, 7, 40, 130]))
    seed = draw(st.integers(0, 2**31 - 1))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=generator, device="cpu")
    logits = logits.to(torch.get_default_device()) * draw(st.sampled_from([0.0, 1.0, 30.0]))
    # One expert that all tokens prefer.
    logits[:, draw(st.integers(0, E - 1))] += draw(st.sampled_from([0.0, 3.0]))
    if special and T:
        values = draw(st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 3e38]), max_size=6))
        for value in values:
            logits[draw(st.integers(0, T - 1)), draw(st.integers(0, E - 1))] = value
        if draw(st.booleans()):
            logits[draw(st.integers(0, T - 1))] = draw(st.sampled_from([math.nan, -math.inf]))
    return logits


@st.composite
def masks(draw, T: int) -> torch.Tensor | None:
    kind = draw(st.sampled_from(["none", "some", "all unused"]))
    if kind == "none":
        return None
    return torch.rand(T) < (0.6 if kind == "some" else -1)


@given(st.data())
def test_every_routing_keeps_the_contracts(data):
    gate = data.draw(gates())
    logits = data.draw(logits_for(gate.num_experts))
    used = data.draw(masks(len(logits)))
    got = gate.route(logits, used)
    plan, (T, K), E = got.plan, got.weights.shape, gate.num_experts
    assert (len(logits), gate.k) == (T, K)

    experts, slots = plan.expert_ids.long(), plan.slots.long()
    routed = torch.ones(T, dtype=torch.bool) if used is None else used
    assert (experts[~routed] == -1).all()
    assert ((experts[routed] >= 0) & (experts[routed] < E)).all()
    distinct = experts[routed].sort(dim=-1).values.diff(dim=-1)
    assert (distinct > 0).all()
    if gate.balancing != "forced":
        groups = experts[routed] // (E // gate.num_groups)
        used_groups = torch.nn.functional.one_hot(groups, gate.num_groups).amax(1).sum(-1)
        assert (used_groups <= gate.topk_groups).all()

    kept = slots >= 0
    load = torch.bincount(experts[experts >= 0], minlength=E)
    assert torch.equal(plan.load.long(), load)
    masked = (experts < 0).sum()
    dropped = ((experts >= 0) & ~kept).sum()
    assert kept.sum() + dropped + masked == T * K
    C = gate.capacity(T)
    rows = torch.bincount(experts[kept], minlength=E)
    assert torch.equal(rows, load if C is None else load.clamp(max=C))
    assert torch.equal(plan.kept().long(), rows)
    for e in range(E):
        mine = slots[kept & (experts == e)].sort().values
        assert torch.equal(mine, plan.offsets[e] + torch.arange(len(mine)))

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


@given(st.data())
def test_forms_say_the_same(data):
    gate = data.draw(gates(noisy_gate_policy=None)).eval()
    gate.sampling_in_eval = False
    logits = data.draw(logits_for(gate.num_experts, special=False))
    used = data.draw(masks(len(logits)))
    _, combine_weights, dispatch_mask, counts = gate(logits, used)
    _, C, E, indices, locations, weights, sparse_counts = gate(logits, used, True)
    assert combine_weights.shape == dispatch_mask.shape == (len(logits), E, int(C))
    assert torch.equal(counts, sparse_counts)
    rebuilt = torch.zeros_like(combine_weights)
    for k in range(gate.k):
        kept = indices[k] >= 0
        token = torch.arange(len(logits))[kept]
        rebuilt[token, indices[k][kept].long(), locations[k][kept].long()] += weights[k][kept]
    assert torch.equal(rebuilt, combine_weights)
    assert (dispatch_mask.sum(0) <= 1).all()


class Twice(Experts):
    def forward(self, rows, plan):
        return 2 * rows


@given(st.data())
def test_a_layer_and_its_gradient_equal_the_plain_loop(data):
    """With experts that double, a token's output is twice the sum of its weights times the token; a
    value that is not finite stays in its token."""
    gate = data.draw(gates(balancing=None))
    logits = data.draw(logits_for(gate.num_experts)).requires_grad_()
    used = data.draw(masks(len(logits)))
    layer = MOELayer(gate, Twice(gate.num_experts))
    seed = data.draw(st.integers(0, 99))
    torch.manual_seed(seed)
    out, aux = layer.forward_with_aux(logits, used)
    torch.manual_seed(seed)
    weights = gate.route(logits, used).weights
    clean = logits.detach().abs().amax(-1) < 1e3
    expected = 2 * logits * weights.sum(-1, keepdim=True)
    torch.testing.assert_close(out[clean], expected[clean], rtol=1e-5, atol=1e-4)
    grads = [
        torch.autograd.grad(o[clean].sum(), logits, retain_graph=True)[0] for o in (out, expected)
    ]
    assert grads[0][clean].isfinite().all()
    torch.testing.assert_close(grads[0][clean], grads[1][clean], rtol=1e-4, atol=1e-3)
    if clean.all():
        assert torch.autograd.grad(aux.l_aux + out.sum(), logits)[0].isfinite().all()


@given(st.data())
def test_a_bad_token_spoils_no_other(data):
    gate = data.draw(gates(drop_tokens=False))
    E = gate.num_experts
    logits = data.draw(logits_for(E, special=False))
    assume(len(logits))
    bad = data.draw(st.integers(0, len(logits) - 1))
    spoilt = logits.clone()
    spoilt[bad] = torch.tensor(
        data.draw(
            st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 0.0]), min_size=E, max_size=E)
        )
    )
    if gate.balancing == "sinkhorn" and gate.training:
        # Sinkhorn balances the batch: a token that takes part changes the others.
        spoilt[bad], logits[bad] = math.nan, math.inf
    others = torch.arange(len(logits)) != bad
    results = []
    for x in (logits, spoilt):
        torch.manual_seed(1)
        results.append(gate.route(x))
    a, b = results
    assert torch.equal(a.plan.expert_ids[others], b.plan.expert_ids[others])
    assert torch.equal(a.weights[others], b.weights[others])


BAD = {
    "k": [0, -1, 99, 1.5, "2", None],
    "capacity_factor": [0.0, -1.0, math.nan, math.inf, "1", None],
    "eval_capacity_factor": [0.0, math.nan],
    "min_capacity": [-1, 0.5, None],
    "noisy_gate_policy": ["jitter", 3, ["Jitter"]],
    "drop_policy": ["first", 0],
    "order": ["expert", True],
    "scoring": ["tanh", None],
    "normalize": [True, "always"],
    "scale": [math.nan, math.inf, "2", None],
    "num_groups": [0, 5, 2.0],
    "topk_groups": [0, 5, None],
    "group_score": ["mean", None],
    "balancing": ["bias", False],
    "noise_scale": [-1.0, math.nan, "a"],
    "ep_group": ["world", 0],
    "router": [5, nn.Linear],
    "aux_loss": [0.01, "z"],
    "drop_tokens": ["no", None, 0.5],
    "use_rts": ["x"],
    "top2_2nd_expert_sampling": ["no"],
    "expert_bias": ["no", torch.zeros(8)],
    "noise_in_eval": ["x"],
    "sampling_in_eval": [3],
}


@pytest.mark.parametrize("name", BAD)
def test_every_error_names_its_argument(name):
    for value in BAD[name]:
        with pytest.raises(ValueError, match=rf"^TopKGate: {name} must"):
            TopKGate(4, 8, **{name: value})
