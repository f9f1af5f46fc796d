"""Every routing rule: what it decides, by hand or by what it promises."""

import copy
import itertools
import math

import pytest
import torch
from cases import relative_error
from torch import nn

from moe_ext import (
    CosineRouter,
    GroupedExperts,
    MOELayer,
    TopKGate,
    losses,
    route,
    selection,
)

pytestmark = pytest.mark.usefixtures("poisoned")

T, E, H = 60, 12, 10
SCORES = {
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: nn.functional.softplus(x).sqrt(),
}


def gate_for(k=3, **options) -> TopKGate:
    """Without what is random, and without dropping where no capacity is asked for."""
    options = {
        "use_rts": False,
        "top2_2nd_expert_sampling": False,
        "min_capacity": 0,
        "drop_tokens": "capacity_factor" in options,
        "dtype": torch.float64,
    } | options
    return TopKGate(H, E, k, **options)


def tokens(number=T) -> torch.Tensor:
    return torch.randn(number, H, dtype=torch.float64)


def chosen(routing) -> torch.Tensor:
    return routing.plan.experts.long()


@pytest.mark.parametrize("scoring", SCORES)
@pytest.mark.parametrize("renormalise", ["never", "before", "after"])
@pytest.mark.parametrize("policy", ["random", "position", "probs"])
@pytest.mark.parametrize(("k", "scale"), [(1, 1.0), (2, 2.5), (5, 0.5)])
def test_weights(scoring, renormalise, policy, k, scale):
    gate = gate_for(
        k,
        capacity_factor=0.7,
        scoring=scoring,
        renormalise=renormalise,
        scale=scale,
        drop_policy=policy,
    )
    x = tokens().requires_grad_()
    routing = gate.route(x)
    probs = SCORES[scoring](x @ gate.wg.weight.T)
    kept = routing.plan.slots >= 0
    assert 0 < kept.sum() < kept.numel()
    weights = probs.gather(-1, chosen(routing))
    if renormalise == "before":
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights * kept
    if renormalise == "after":
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
    weights = weights * scale
    assert relative_error(routing.weights, weights) < 1e-12
    assert relative_error(routing.probs, probs) < 1e-12
    upstream = torch.randn_like(weights)
    grads = [torch.autograd.grad((w * upstream).sum(), x)[0] for w in (routing.weights, weights)]
    # A renormalised single choice has weight one and gradient zero.
    assert (grads[0] - grads[1]).norm() < 1e-12 * (grads[1].norm() + 1)


def test_softmax_before_dropping_is_the_softmax_over_the_chosen():
    gate = gate_for(4, renormalise="before")
    x = tokens()
    logits = (x @ gate.wg.weight.T).topk(4, dim=-1).values
    assert relative_error(gate.route(x).weights, logits.softmax(-1)) < 1e-12


def test_who_is_dropped_by_its_place():
    """First choices queue before second ones, or every token's choices one after the other."""
    logits = torch.tensor([[3.0, 2.0, 0.0]] * 3 + [[2.0, 3.0, 0.0]] * 3)
    # Of expert 1 the tokens 0..2 are first in the queue by token, 3..5 by choice.
    for order, kept_tokens in (("choice", [0, 3, 4, 5]), ("token", [0, 1, 2, 3])):
        plan = route(logits, 2, capacity=4, order=order).plan
        kept = ((plan.experts == 1) & (plan.slots >= 0)).any(-1).nonzero().flatten().tolist()
        assert kept == kept_tokens


@pytest.mark.parametrize("k", [1, 2, 4])
def test_random_token_selection_for_any_k(k):
    gate = gate_for(k, capacity_factor=0.5, drop_policy="random")
    x = tokens()
    torch.manual_seed(5)
    plan = gate.route(x).plan
    torch.manual_seed(5)
    uniform = torch.rand(T, E)
    for e in range(E):
        asked = plan.experts == e
        kept = (asked & (plan.slots >= 0)).any(-1)
        best = torch.where(asked.any(-1), uniform[:, e], -1).topk(int(kept.sum())).indices
        assert set(kept.nonzero().flatten().tolist()) == set(best.tolist())
        assert kept.sum() == min(gate.capacity(T), asked.sum())


@pytest.mark.parametrize("renormalise", ["never", "before", "after"])
def test_the_least_probable_are_dropped_by_their_score(renormalise):
    gate = gate_for(3, capacity_factor=0.5, drop_policy="probs", renormalise=renormalise)
    routing = gate.route(tokens())
    scores = routing.probs.gather(-1, chosen(routing))
    for e in range(E):
        asked, kept = chosen(routing) == e, routing.plan.slots >= 0
        best = scores[asked].sort(descending=True).values[: gate.capacity(T)]
        assert torch.equal(scores[asked & kept].sort(descending=True).values, best)


def test_a_sampled_second_expert_stays_in_the_groups():
    gate = gate_for(2, top2_2nd_expert_sampling=True, num_groups=4, groups_per_token=1)
    experts = chosen(gate.route(tokens(500)))
    assert torch.equal(experts[:, 0] // 3, experts[:, 1] // 3)


@pytest.mark.parametrize("by", ["max", "top2_sum"])
@pytest.mark.parametrize("scoring", SCORES)
@pytest.mark.parametrize("bias", [False, True])
def test_groups(by, scoring, bias):
    gate = gate_for(
        3,
        scoring=scoring,
        num_groups=4,
        groups_per_token=2,
        group_score=by,
        selection_bias=bias,
    )
    if bias:
        gate.expert_bias.copy_(torch.randn(E))
    x = tokens()
    logits = x @ gate.wg.weight.T
    scores = SCORES[scoring](logits) + (gate.expert_bias if bias else 0)
    for t in range(T):
        groups = scores[t].view(4, 3)
        worth = groups.amax(-1) if by == "max" else groups.topk(2).values.sum(-1)
        allowed = {3 * int(g) + i for g in worth.topk(2).indices for i in range(3)}
        best = sorted(allowed, key=lambda e: -scores[t, e])[:3]
        assert chosen(gate.route(x[t : t + 1]))[0].tolist() == best
    assert torch.equal(
        gate.route(x).weights, gate.route(x, experts=gate.route(x).plan.experts).weights
    )


def test_equal_groups_go_to_the_lower_one():
    zeros = torch.zeros(3, 256)
    mask = selection.group_mask(zeros, 64, 5, "max")
    assert torch.equal(mask, torch.arange(256).expand(3, 256) < 20)


def test_all_groups_are_no_limit():
    x = tokens()
    gate = gate_for(3, scoring="sigmoid")
    limited = gate_for(3, scoring="sigmoid", num_groups=4, groups_per_token=4)
    limited.load_state_dict(gate.state_dict())
    assert torch.equal(chosen(gate.route(x)), chosen(limited.route(x)))


def test_the_bias_selects_and_weighs_nothing():
    gate = gate_for(2, scoring="sigmoid", selection_bias=True)
    x = tokens()
    plain = gate.route(x)
    assert set(gate.state_dict()) == {"wg.weight", "expert_bias"}
    gate.expert_bias[7] = 5
    routing = gate.route(x)
    assert (chosen(routing)[:, 0] == 7).all()
    assert torch.equal(routing.probs, plain.probs)
    assert torch.equal(routing.weights, _renormalised(routing.probs.gather(-1, chosen(routing))))


def _renormalised(weights):
    return weights / weights.sum(-1, keepdim=True)


def test_updates_of_the_bias_balance_the_load():
    gate = gate_for(2, scoring="sigmoid", selection_bias=True)
    x = tokens(600) + 2 * torch.randn(H, dtype=torch.float64)
    before = gate.route(x).plan.load
    assert before.max() > 3 * 100
    for _ in range(400):
        gate.update_bias(gate.route(x).plan.load, rate=2e-3)
    after = gate.route(x).plan.load
    assert after.max() < 1.2 * 100
    assert after.min() > 0.8 * 100


def test_an_update_is_one_step_up_or_down():
    gate = gate_for(1, selection_bias=True)
    load = torch.tensor([5] * 4 + [4] * 4 + [6] * 4)
    gate.update_bias(load, rate=0.25)
    assert gate.expert_bias.tolist() == [0.0] * 4 + [0.25] * 4 + [-0.25] * 4
    assert load.tolist() == [5] * 4 + [4] * 4 + [6] * 4
    with pytest.raises(RuntimeError, match=r"load must be \[E\] with E = 12, got \[3\]"):
        gate.update_bias(load[:3])
    with pytest.raises(RuntimeError, match=r"load must be counts, integers, got torch\.float32"):
        gate.update_bias(load / 60)
    with pytest.raises(RuntimeError, match="update_bias needs selection_bias=True"):
        gate_for(1).update_bias(load)


def test_the_bias_stays_float32():
    gate = gate_for(1, selection_bias=True)
    gate.expert_bias.fill_(0.1001)
    value = gate.expert_bias.clone()
    for cast in (lambda: gate.bfloat16(), lambda: gate.half(), lambda: gate.double()):
        cast()
        assert gate.expert_bias.dtype == torch.float32
        assert torch.equal(gate.expert_bias, value)
    twin = copy.deepcopy(gate)
    twin.update_bias(torch.arange(E))
    assert torch.equal(gate.expert_bias, value)
    assert not torch.equal(twin.expert_bias, value)
    with torch.device("meta"):
        empty = gate_for(1, selection_bias=True)
    real = empty.to_empty(device=torch.get_default_device())
    real.reset_parameters()
    assert (real.expert_bias == 0).all()


def test_cosine_router():
    router = CosineRouter(H, E, proj_dim=7, dtype=torch.float64)
    gate = gate_for(2, router=router)
    x = tokens()
    logits = gate.route(x).logits
    by_hand = torch.empty(T, E, dtype=torch.float64)
    for t, e in itertools.product(range(T), range(E)):
        token = router.proj.weight @ x[t]
        cosine = token @ router.directions[e] / token.norm() / router.directions[e].norm()
        by_hand[t, e] = cosine / 0.5
    assert relative_error(logits, by_hand) < 1e-12
    assert relative_error(gate.route(3 * x).logits, logits) < 1e-12
    routing = gate.route(x)
    (routing.weights.square().sum() + routing.l_aux).backward()
    assert all(p.grad.abs().sum() > 0 for p in gate.parameters())
    assert set(gate.state_dict()) == {"wg.proj.weight", "wg.directions", "wg.log_scale"}
    with torch.no_grad():
        router.log_scale.fill_(math.log(1e6))
    assert gate.route(x).logits.abs().max() <= 100
    with torch.no_grad():
        router.log_scale.fill_(math.log(0.1))
    assert relative_error(gate.route(x).logits, by_hand * 0.05) < 1e-12
    gate.bfloat16()
    assert gate.route(x.float()).probs.dtype == torch.float32


def test_any_module_is_a_router():
    router = nn.Sequential(nn.Linear(H, 5), nn.Tanh(), nn.Linear(5, E))
    gate = TopKGate(H, E, 2, router=router)
    x = torch.randn(T, H)
    assert torch.equal(gate.route(x).logits, router(x))
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert torch.equal(gate.route(x).logits, router(x).float()) is False
        assert gate.route(x).logits.dtype == torch.float32


class Reopens(nn.Module):
    """A router that wants autocast."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(H, E)

    def forward(self, x):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return self.linear(x)


@pytest.mark.parametrize(
    "options",
    [{}, {"noisy_gate_policy": "RSample"}, {"selection_bias": True}, {"balancing": "sinkhorn"}],
)
def test_routers_of_other_dtypes(options):
    x = torch.randn(T, H)
    reopens = Reopens()
    routing = TopKGate(H, E, 2, router=reopens, **options).route(x)
    assert torch.equal(routing.logits, reopens(x).float())
    linear = nn.Linear(H, E)
    gate = TopKGate(H, E, 2, router=linear, **options).bfloat16()
    gate.route(x.bfloat16()).l_aux.backward()
    assert linear.weight.grad.dtype == linear.weight.dtype == torch.bfloat16
    assert linear.weight.grad.abs().sum() > 0
    logits = gate.route(x.bfloat16()).logits
    exact = x.bfloat16().float() @ linear.weight.float().T + linear.bias.float()
    assert relative_error(logits, exact) < 1e-6


@pytest.mark.parametrize(
    ("router", "got"),
    [(nn.Linear(H, E + 1), r"\[60, 13\]"), (nn.LSTM(H, E), "tuple"), (nn.Flatten(0), r"\[600\]")],
)
def test_routers_that_return_something_else(router, got):
    gate = TopKGate(H, E, router=router)
    with pytest.raises(RuntimeError, match=rf"router must return \[T, E\] = \[60, 12\], got {got}"):
        gate.route(torch.randn(T, H))


def test_options_may_be_changed_later():
    """As DeepSpeed's callers do: what is then decided is what a gate made so decides."""
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
        torch.manual_seed(1)
        before = changed.route(x)
        setattr(changed, name, value)
        results = []
        for gate in (made, changed):
            torch.manual_seed(1)
            results.append(gate.route(x))
        assert torch.equal(results[0].weights, results[1].weights)
        assert torch.equal(results[0].plan.slots, results[1].plan.slots)
        assert not torch.equal(before.weights, results[1].weights)


def test_noise_of_any_size():
    x = tokens()
    for scale in (0.0, 0.5, 1.0, 3.0):
        gate = gate_for(1, noisy_gate_policy="Jitter", noise_scale=scale)
        with torch.no_grad():
            gate.wg.weight.copy_(torch.eye(E, H))
        ratio = (gate.route(x).logits[:, :H] / x) - 1
        assert 0.97 * scale <= ratio.abs().max() <= scale * (1 + 1e-6)


def test_what_is_drawn_and_kept_in_float32():
    """Whatever torch's default is."""
    x = tokens()
    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            gate = gate_for(1, capacity_factor=0.5, drop_policy="random", selection_bias=True)
            with torch.no_grad():
                gate.wg.weight.copy_(torch.eye(E, H))
            assert gate.expert_bias.dtype == torch.float32
            torch.manual_seed(1)
            results.append((gate.route(x).plan.slots, selection.gumbel(x)))
        finally:
            torch.set_default_dtype(torch.float32)
    for slots, noise in results[1:]:
        assert torch.equal(slots, results[0][0])
        assert torch.equal(noise, results[0][1])


def test_a_zero_token_has_no_large_gradient():
    layer = MOELayer(
        TopKGate(H, E, 2, router=CosineRouter(H, E), drop_tokens=False), GroupedExperts(E, H, 7)
    )
    x = torch.randn(T, H)
    x[5] = 0
    x.requires_grad_()
    (layer(x).sum() + layer.l_aux).backward()
    assert x.grad[5].norm() < 1e3
    assert x.grad[4].norm() > 0


def test_a_group_holds_its_experts_of_no_score_too():
    logits = torch.tensor([[1.0, 0.5, 3.0, -math.inf], [-math.inf, -math.inf, math.nan, 0.0]])
    gate = TopKGate(
        4, 4, 2, num_groups=2, router=nn.Identity(), drop_tokens=False, min_capacity=0
    ).eval()
    routing = gate.route(logits)
    assert chosen(routing).tolist() == [[2, 3], [2, 3]]
    assert routing.weights[0].tolist() == [1, 0]


def test_small_scores_that_stand_alone_are_shared_out():
    logits = torch.full((1, 4), -20.0)
    for scoring in ("sigmoid", "sqrtsoftplus"):
        weights = route(logits, 2, scoring=scoring, renormalise="after").weights
        torch.testing.assert_close(weights, torch.full((1, 2), 0.5))


def test_a_gate_shows_what_is_not_default():
    text = str(gate_for(2, scoring="sigmoid", num_groups=3, groups_per_token=2))
    for option in ("k=2", "scoring='sigmoid'", "num_groups=3", "drop_tokens=False"):
        assert option in text
    assert "balancing" not in text


def test_sinkhorn_balances_the_choice():
    gate = gate_for(1, balancing="sinkhorn")
    x = tokens(600) + torch.randn(H, dtype=torch.float64)
    plain = gate.eval().route(x)
    balanced = gate.train().route(x)
    assert plain.plan.load.max() > 3 * 50
    assert balanced.plan.load.max() < 2 * 50
    assert torch.equal(balanced.probs, plain.probs)
    logits = x @ gate.wg.weight.T
    column_sums = selection.sinkhorn(logits, iterations=200).softmax(-1).sum(0)
    assert relative_error(column_sums, torch.full((E,), 50.0)) < 1e-6
    shift = selection.sinkhorn(logits) - logits
    assert (shift - shift[:1]).abs().max() < 1e-12


def test_sinkhorn_counts_only_tokens_that_take_part():
    logits = torch.randn(40, E, dtype=torch.float64)
    used = torch.rand(40) < 0.7
    other = logits.clone()
    other[~used] = torch.randn(int((~used).sum()), E, dtype=torch.float64) + 9
    a, b = (selection.sinkhorn(x, used) for x in (logits, other))
    assert torch.equal(a[used], b[used])
    assert torch.equal(b[~used], other[~used])
    for bad in (math.nan, math.inf):
        other = logits.clone()
        other[3, 5] = bad
        keeps = torch.arange(40) != 3
        assert torch.equal(
            selection.sinkhorn(other)[keeps], selection.sinkhorn(logits, keeps)[keeps]
        )
    other = logits.clone()
    other[:, 2] = -math.inf
    column_sums = selection.sinkhorn(other, iterations=200).softmax(-1).sum(0)
    assert column_sums[2] == 0
    assert relative_error(column_sums[3:], torch.full((E - 3,), 40 / (E - 1))) < 1e-6
    assert torch.equal(selection.sinkhorn(logits[:0]), logits[:0])
    assert torch.equal(selection.sinkhorn(logits, used & ~used), logits)


def test_a_gate_by_sinkhorn_leaves_unused_tokens_out():
    gate = gate_for(2, balancing="sinkhorn", top2_2nd_expert_sampling=True)
    x, used = tokens(), torch.rand(T) < 0.6
    other = torch.where(used.unsqueeze(-1), x, 5 + tokens())
    results = []
    for y in (x, other):
        torch.manual_seed(1)
        results.append(chosen(gate.route(y, used)))
    assert torch.equal(*results)


def test_expert_choice():
    """Every expert takes its best tokens: all ask all, and the least probable are dropped."""
    c = 2
    gate = gate_for(
        E, drop_policy="probs", renormalise="never", capacity_factor=c / E, drop_tokens=True
    )
    x = tokens().requires_grad_()
    layer = MOELayer(gate, GroupedExperts(E, H, 7, dtype=torch.float64))
    probs = (x @ gate.wg.weight.T).softmax(-1)
    C = c * T // E
    assert gate.capacity(T) == C
    out = torch.zeros_like(x)
    for e in range(E):
        best = probs[:, e].topk(C).indices
        everything = torch.zeros(C, dtype=torch.int32)
        alone = gate_for(1, dtype=torch.float64)
        plan = alone.route(x[best], experts=everything.view(-1, 1) + e).plan
        rows = layer.experts.routed(x[best], plan, torch.ones(C, 1, dtype=torch.float64))
        out = out.index_add(0, best, rows * probs[best, e].unsqueeze(-1))
    assert relative_error(layer(x), out) < 1e-12
    grads = [
        torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (layer(x), out)
    ]
    assert relative_error(*grads) < 1e-12


@pytest.mark.parametrize("k", [1, 3, E])
def test_forced_balance(k):
    gate = gate_for(k, balancing="forced")
    routing = gate.route(tokens(T + 1))
    load = routing.plan.load
    assert load.max() - load.min() <= 1
    assert load.sum() == (T + 1) * k
    assert (chosen(routing).sort(-1).values.diff(dim=-1) > 0).all()
    routing.weights.square().sum().backward()
    assert gate.wg.weight.grad.abs().sum() > 0


def test_weights_of_choices_with_next_to_no_score():
    """After dropping, DeepSpeed's smallest divisor; before, none that is seen."""
    logits = torch.tensor([[0.0, -25.0]])
    experts = torch.ones(1, 1, dtype=torch.int32)
    score = math.exp(-25)
    for renormalise, weight in (
        ("never", score),
        ("before", 1),
        ("after", score / torch.finfo(torch.float32).eps),
    ):
        routing = route(logits, 1, experts=experts, renormalise=renormalise)
        assert routing.weights.item() == pytest.approx(weight, rel=1e-5)
    assert route(logits, 1, experts=experts, renormalise="before", scale=2.5).weights == 2.5


@pytest.mark.parametrize("options", [{}, {"capacity_factor": 0.6}, {"balancing": "forced"}])
def test_a_recorded_routing_is_made_again(options):
    gate = gate_for(
        2, noisy_gate_policy="RSample", top2_2nd_expert_sampling=True, scale=1.5, **options
    )
    layer = MOELayer(gate, GroupedExperts(E, H, 7, dtype=torch.float64))
    x = tokens().requires_grad_()
    used = torch.rand(T) < 0.8
    gate.balancing = None
    out, aux = layer.forward_with_aux(x, used)
    gate.balancing = options.get("balancing")
    assert not torch.equal(layer.forward_with_aux(x, used)[1].experts, aux.experts)
    again, aux_again = layer.forward_with_aux(x, experts=aux.experts)
    assert torch.equal(again, out)
    for a, b in zip(aux, aux_again, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(layer(x, experts=aux.experts), out)
    grads = [torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (out, again)]
    assert relative_error(*grads) < 1e-12


@pytest.mark.parametrize("renormalise", ["before", "after", "never"])
def test_a_recording_may_leave_choices_out(renormalise):
    gate = gate_for(2, renormalise=renormalise)
    x = tokens(3)
    recorded = torch.tensor([[4, -1], [-1, 7], [-1, -1]], dtype=torch.int32)
    routing = gate.route(x, experts=recorded)
    assert torch.equal(routing.plan.experts, recorded)
    probs = routing.probs.detach()
    first, second = (probs[0, 4], probs[1, 7]) if renormalise == "never" else (1, 1)
    weights = torch.tensor([[first, 0], [0, second], [0, 0]], dtype=torch.float64)
    torch.testing.assert_close(routing.weights, weights)
    with pytest.raises(RuntimeError, match="route: experts must be int32, got int64"):
        gate.route(x, experts=recorded.long())
    for other in (recorded[:2], recorded[:, :1]):
        message = r"route: experts must be \[T, K\] with T = 3, K = 2, got"
        with pytest.raises(RuntimeError, match=message):
            gate.route(x, experts=other)


def test_gaussian_noise_is_on_the_logits():
    x = tokens(2000)
    for scale, deviation in ((0.3, 0.3), (None, 1 / E)):
        gate = gate_for(2, noisy_gate_policy="Gaussian", noise_scale=scale)
        noise = gate.route(x).logits - x @ gate.wg.weight.T
        assert abs(noise.std() / deviation - 1) < 0.03
        assert abs(noise.mean()) < 0.01
    assert relative_error(gate.eval().route(x).logits, x @ gate.wg.weight.T) < 1e-12


def test_jitter_of_ones_own_size():
    gate = gate_for(1, noisy_gate_policy="Jitter", noise_scale=0.2)
    with torch.no_grad():
        gate.wg.weight.copy_(torch.eye(E, H))
    logits = gate.route(torch.ones(3000, H, dtype=torch.float64)).logits[:, :H]
    assert 0.8 <= logits.min() < 0.81
    assert 1.19 < logits.max() <= 1.2


def test_rsample_draws_both_choices_at_once():
    """Noise of no size changes no choice, the second neither."""
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


def test_noise_in_evaluation_where_it_is_asked_for():
    x = tokens()
    for options, draws in (
        ({"noisy_gate_policy": "RSample"}, False),
        ({"noisy_gate_policy": "RSample", "noise_in_eval": True}, True),
        ({"noisy_gate_policy": "Gaussian", "noise_in_eval": True}, True),
        ({"noisy_gate_policy": "Jitter", "noise_in_eval": True}, True),
        ({"noisy_gate_policy": "Jitter", "sampling_in_eval": True}, False),
        ({"top2_2nd_expert_sampling": True}, False),
        ({"top2_2nd_expert_sampling": True, "sampling_in_eval": True}, True),
        ({"drop_policy": "random", "capacity_factor": 0.4, "eval_capacity_factor": 0.4}, False),
        (
            {
                "drop_policy": "random",
                "capacity_factor": 0.4,
                "eval_capacity_factor": 0.4,
                "sampling_in_eval": True,
            },
            True,
        ),
    ):
        gate = gate_for(2, **options).eval()
        a, b = gate.route(x), gate.route(x)
        assert torch.equal(a.weights, b.weights) != draws


def test_hugging_face_order():
    gate = gate_for(2, renormalise="before")
    x = tokens()
    logits, weights, experts = gate.route(x).as_hf_tuple()
    values, ids = (x @ gate.wg.weight.T).topk(2, dim=-1)
    assert relative_error(logits, x @ gate.wg.weight.T) < 1e-12
    assert relative_error(weights, values.softmax(-1)) < 1e-12
    assert torch.equal(experts, ids)


def test_a_loss_of_ones_own():
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


def test_timers():
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
    assert (
        layer.gate.timers("topk_gate").elapsed(reset=False) > layer.gate.timers("topk_gate").mean()
    )
    assert layer.timers("moe").elapsed(reset=True) == layer.time_moe
    timer = layer.timers("moe")
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
