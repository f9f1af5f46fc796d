"""The losses: their formulas, and that splitting a batch does not change them."""

import functools

import pytest
import torch
import torch.distributed as dist
from cases import assert_near, relative_error
from processes import on_ranks

from moe_ext import TopKGate, losses

T, E, H, K = 48, 6, 10, 2


def routing_of(x):
    options = {"drop_tokens": False, "top2_2nd_expert_sampling": False, "dtype": torch.float64}
    gate = TopKGate(H, E, K, **options)
    torch.manual_seed(3)
    torch.nn.init.normal_(gate.wg.weight)
    return gate.route(x)


def all_choices(routing, **options):
    tokens, k = routing.weights.shape
    load = options.pop("load", routing.plan.load)
    return losses.load_balance_loss(routing.importance, load, tokens, k, **options)


def first_choices(routing):
    load = losses.expert_load(routing.plan.expert_ids[:, :1], E)
    return losses.load_balance_loss(routing.importance, load, len(routing.weights), 1)


def per_sequence(routing, sequences=4):
    return losses.sequence_balance_loss(routing.probs, routing.plan.expert_ids, sequences)


def z(routing):
    return losses.z_loss(routing.logits)


def importance(routing):
    return losses.importance_loss(routing.importance)


ALL = [all_choices, first_choices, per_sequence, z, importance]


def tokens(number=T):
    return torch.randn(number, H, dtype=torch.float64)


def by_hand(loss, routing):
    probs, experts = routing.probs, routing.plan.expert_ids
    if loss is z:
        return sum(row.exp().sum().log() ** 2 for row in routing.logits) / len(probs)
    if loss is importance:
        sums = probs.sum(0)
        return sums.var(unbiased=False) / sums.mean() ** 2
    if loss is per_sequence:
        parts = zip(probs.chunk(4), experts.chunk(4), strict=True)
        return sum(balance_by_hand(p, e, K) for p, e in parts) / 4
    return balance_by_hand(probs, experts, K if loss is all_choices else 1)


def balance_by_hand(probs, experts, counted):
    total = 0
    for e in range(E):
        asked = (experts[:, :counted] == e).double().sum() / len(experts)
        total = total + asked * probs[:, e].mean()
    return E / counted * total


def gradient_by_x(loss, x):
    x = x.clone().requires_grad_()
    value = loss(routing_of(x))
    return value.detach(), torch.autograd.grad(value, x)[0]


@pytest.mark.parametrize("loss", ALL)
def test_a_loss_and_its_gradient_are_its_formula(loss):
    x = tokens()
    expected = gradient_by_x(functools.partial(by_hand, loss), x)
    assert_near(gradient_by_x(loss, x), expected, 1e-12)


@pytest.mark.parametrize("loss", ALL)
def test_zero_tokens(loss):
    routing = routing_of(tokens(0))
    assert loss(routing).item() == 0
    loss(routing).backward()


def test_an_even_router_has_loss_one_and_the_worst_one_e():
    even = torch.full((E,), T / E, dtype=torch.float64)
    assert losses.load_balance_loss(even, even.long(), T, 1) == pytest.approx(1)
    assert losses.load_balance_loss(even, K * even.long(), T, K) == pytest.approx(1)
    assert losses.importance_loss(even) == pytest.approx(0)
    one = torch.tensor([T] + [0] * (E - 1), dtype=torch.float64)
    assert losses.load_balance_loss(one, one.long(), T, 1) == pytest.approx(E)
    assert losses.importance_loss(one) == pytest.approx(E - 1)


@pytest.mark.parametrize("loss", ALL)
def test_losses_do_not_depend_on_the_number_of_tokens(loss):
    """n equal micro-batches at weight 1 / n, or n copies in one batch, have the loss of one."""
    x = tokens()
    value, grad = gradient_by_x(loss, x)
    whole = functools.partial(loss, sequences=12) if loss is per_sequence else loss
    copies, copies_grad = gradient_by_x(whole, x.repeat(3, 1))
    assert_near((copies, copies_grad.view(3, T, H).sum(0)), (value, grad), 1e-12)


@pytest.mark.parametrize("loss", ["z", "per sequence", "common load"])
def test_micro_batches_of_one_batch_average_to_it(loss):
    x = tokens()
    common = routing_of(x).plan.load
    parts = 4
    whole, part = {
        "z": (z, z),
        "per sequence": (per_sequence, functools.partial(per_sequence, sequences=1)),
        "common load": (all_choices, functools.partial(all_choices, load=common, load_tokens=T)),
    }[loss]
    values, grads = zip(*(gradient_by_x(part, piece) for piece in x.chunk(parts)), strict=True)
    mean = sum(values) / parts, torch.cat(grads) / parts
    assert_near(mean, gradient_by_x(whole, x), 1e-12)


@on_ranks(2)
def test_the_loss_of_the_global_batch_is_that_of_one_process(rank):
    """The ranks' mean loss and gradient are those of the whole batch, for any split of tokens."""
    torch.manual_seed(0)
    x, loss = tokens(), functools.partial(all_choices, group=dist.group.WORLD)
    for split in ([T // 2, T // 2], [T - 5, 5], [T, 0], [0, 1]):
        begin, size = sum(split[:rank]), sum(split)
        value, grad = gradient_by_x(loss, x[begin : begin + split[rank]])
        whole = torch.zeros_like(x)
        whole[begin : begin + split[rank]] = grad
        for tensor in (value, whole):
            dist.all_reduce(tensor)
        expected = gradient_by_x(all_choices, x[:size])
        assert_near((value / 2, whole[:size] / 2), expected, 1e-12)


@on_ranks(2)
def test_the_loss_of_a_global_batch_in_micro_batches(rank):
    """Two ranks with two micro-batches each; the load counts both micro-batches."""
    torch.manual_seed(0)
    x = tokens()
    routings = [routing_of(part) for part in x.chunk(2)[rank].chunk(2)]
    load = sum(routing.plan.load for routing in routings)
    options = {"load": load, "load_tokens": T // 2, "group": dist.group.WORLD}
    value = sum(all_choices(routing, **options).detach() for routing in routings) / 4
    dist.all_reduce(value)
    assert relative_error(value, all_choices(routing_of(x))) < 1e-12


def test_shares_of_tiny_scores_are_finite():
    tiny = torch.full((2, 4), 1e-30)
    assert torch.equal(losses.shares(tiny), torch.full((2, 4), 0.25))
    assert torch.equal(losses.shares(torch.zeros(2, 4)), torch.zeros(2, 4))


def test_losses_of_a_wrong_shape_are_an_error():
    routing, nobody = routing_of(tokens()), dist.GroupMember.NON_GROUP_MEMBER
    probs, load, many = routing.probs, routing.plan.load, torch.ones(4, E)
    for loss, message in (
        (lambda: losses.load_balance_loss(probs, load, T, K), r"alike, got \[48, 6\] and \[6\]"),
        (
            lambda: losses.load_balance_loss(many, many, T, K, group=nobody),
            r"load must be \[E\] with a group, got \[4, 6\]",
        ),
        (lambda: losses.importance_loss(probs), r"importance must be \[E\], got \[48, 6\]"),
        (lambda: per_sequence(routing, 5), "num_sequences must divide T = 48, got 5"),
        (lambda: per_sequence(routing, 0), "num_sequences must divide T = 48, got 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            loss()


def test_sequence_balance_loss_averages_over_sequences():
    routing = routing_of(tokens())
    assert torch.equal(losses.z_loss(routing.logits.view(4, -1, E)), z(routing))
    probs, expert_ids = routing.probs.view(4, -1, E), routing.plan.expert_ids.view(4, -1, K)
    assert torch.equal(losses.sequence_balance_loss(probs, expert_ids, 4), per_sequence(routing))


def test_expert_load_ignores_minus_one():
    experts = torch.tensor([[0, 2], [2, -1], [-1, -1]], dtype=torch.int32)
    assert losses.expert_load(experts, 4).tolist() == [1, 0, 2, 0]
    assert losses.expert_load(experts[None], 4).tolist() == [[1, 0, 2, 0]]
