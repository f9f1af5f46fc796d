"""The experts' operators: against the reference, and what they leave alone."""

import functools
import itertools
import re

import pytest
import torch
from cases import DTYPES, assert_near, call_operator, plans, relative_error, values, weights_for

import moe_ext
from moe_ext.ops import checks, registry, torch_grouped_mm

# T, K, E, H, F: nothing, one token and expert, sizes that end within registers, more rows and
# columns than a tile, few rows of an expert beside many, one column, and sums of several blocks.
SIZES = [
    (0, 2, 3, 8, 4),
    (1, 1, 1, 6, 5),
    (5, 2, 3, 4, 0),
    (37, 3, 5, 19, 7),
    (700, 2, 3, 70, 600),
    (9, 8, 8, 64, 48),
    (70, 2, 3, 1, 40),
    (300, 1, 1, 2100, 16),
]


def operands(T, K, E, H, F, dtype, device, *, activation="swiglu", bias=True, turned=False):
    """tokens and weights, up, down and their biases."""
    G = 2 * F if activation in checks.GATED else F

    def weight(N, M):
        if turned:
            return values(E, M, N, dtype=dtype, device=device).mT / max(M, 1) ** 0.5
        return values(E, N, M, dtype=dtype, device=device) / max(M, 1) ** 0.5

    biases = [values(E, N, dtype=dtype, device=device) if bias else None for N in (G, H)]
    weights = weights_for(dtype, T, K, device=device)
    return values(T, H, dtype=dtype, device=device), weights, weight(G, H), weight(H, F), *biases


def arguments(plan, tensors, activation="swiglu", before=False):
    tokens, *rest = tensors
    placed = plan.slots, plan.sources, plan.offsets, plan.load
    return tokens, *placed, *rest, activation, before, plan.capacity


def of_backward(args, pre_activation, needs=(True, True, True)):
    """Arguments of feed_forward_backward, with a random gradient."""
    return torch.randn_like(args[0]), args[0], pre_activation, *args[1:], *needs


def plans_and_arguments(size, dtype, device):
    """Every plan of a size, and arguments of feed_forward with other options for each."""
    T, K, E, *_ = size
    for i, plan in enumerate(plans(T, K, E, device)):
        options = {"bias": i % 2 == 0, "turned": i % 3 == 0}
        activation, before = checks.ACTIVATIONS[i % 4], i % 5 == 0
        tensors = operands(*size, dtype, device, activation=activation, **options)
        yield plan, arguments(plan, tensors, activation, before)


def assert_close(op, args):
    dtype = args[0].dtype
    found, expected = call_operator(op, args), call_operator(op, args, "reference")
    # Both round to the operands' dtype between products.
    bound = 30 * torch.finfo(dtype).eps
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == other.shape
        if op == "feed_forward" and i == 1 and one.is_cuda and len(other):
            # Torch's products leave other rows of the pre-activation as they are.
            one, other = one[args[2] >= 0], other[args[2] >= 0]
        if other.numel() == 1:  # its terms are about 1 and may cancel
            assert (one - other).abs() < bound * other.abs().clamp(min=1)
        else:
            assert relative_error(one, other) < bound
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_reference(size, dtype, device, poisoned, request):
    if request.config.cusim:  # which takes long
        size = (min(size[0], 100), *size[1:])
    for _, args in plans_and_arguments(size, dtype, device):
        _, pre_activation = assert_close("feed_forward", (*args, True))
        assert_close("feed_forward", (*args, False))
        assert_close("feed_forward_backward", of_backward(args, pre_activation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
# Few experts and many, whose rows threads can share evenly; one whose rows are added up in blocks.
@pytest.mark.parametrize("size", [(700, 2, 3, 70, 600), (3200, 2, 32, 24, 40), (2500, 1, 1, 8, 6)])
def test_the_reference_on_threads(size, threads, dtype, poisoned, request):
    """Threads share an expert's products, or take whole experts that have many rows."""
    if request.config.cusim:
        pytest.skip("the CPU's operators alone have threads")
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    for _, args in plans_and_arguments(size, dtype, "cpu"):
        _, pre_activation = assert_close("feed_forward", (*args, True))
        assert_close("feed_forward_backward", of_backward(args, pre_activation))


def leaves_what_is_not_its_own(grouped_mm, rows, weights, *, offs):
    """torch's grouped_mm; it may leave as they are rows beyond the last group, and sums of none."""
    out = grouped_mm(rows, weights, offs=offs)
    if weights.dim() == 3:
        out[int(offs[-1]) :] = torch.nan
    else:
        out[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["native", "batched"])
@pytest.mark.parametrize("T", [5, 60])
def test_torchs_products_inside_need_no_copies(monkeypatch, device, poisoned, path, dtype, T):
    """Their operands are zero where no route is, and nobody reads what they make of it."""
    calls, inside = [], torch_grouped_mm.INSIDE
    product = functools.partial(leaves_what_is_not_its_own, torch.nn.functional.grouped_mm)
    monkeypatch.setattr(registry, "product_inside", lambda name, _: inside.get(name))
    monkeypatch.setattr(torch_grouped_mm, "choose", lambda *args: calls.append(args) or (path, ""))
    monkeypatch.setattr("torch.nn.functional.grouped_mm", product)
    bound = 30 * torch.finfo(dtype).eps
    for plan, args in plans_and_arguments((T, 3, 8, 24, 16), dtype, device):
        if path == "batched" and plan.capacity is None:
            continue
        out, pre_activation = registry.COMPOSED["feed_forward"](*args, True)
        expected, right = call_operator("feed_forward", (*args, True), "reference")
        owned = plan.sources >= 0
        assert_near((out, pre_activation[owned]), (expected, right[owned]), bound)
        back = of_backward(args, pre_activation)
        found = registry.COMPOSED["feed_forward_backward"](*back)
        fakes = registry.fake("feed_forward_backward")(*back)
        assert [x.stride() for x in found] == [x.stride() for x in fakes]
        back = (*back[:2], right, *back[3:])
        assert_near(found, call_operator("feed_forward_backward", back, "reference"), bound)
    assert calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [5, 300])
def test_a_row_that_lacks_its_token_counts_as_zero(T, dtype, request):
    """No plan of ours has one, but it must not take another row's token."""
    if request.config.cusim:
        pytest.skip("the CPU's operators alone promise it")
    plan = plans(T, 2, 3, "cpu")[0]
    for turned in False, True:
        tensors = operands(T, 2, 3, 40, 24, dtype, "cpu", turned=turned)
        args = list(arguments(plan, tensors))
        row = int(plan.offsets[1]) - 1
        args[1], args[2] = plan.slots.masked_fill(plan.slots == row, -1), plan.sources.clone()
        args[2][row] = -1
        assert int((args[1] < 0).sum()) == 1
        _, pre_activation = assert_close("feed_forward", (*args, True))
        assert_close("feed_forward_backward", of_backward(args, pre_activation))


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)))
def test_gradients_that_are_not_needed_are_empty(needs, device):
    plan = plans(9, 2, 3, device)[0]
    tensors = operands(9, 2, 3, 8, 4, torch.float32, device)
    args = arguments(plan, tensors)
    _, pre_activation = call_operator("feed_forward", (*args, True))
    back = of_backward(args, pre_activation, needs)
    tokens, up, down, up_bias, down_bias, weights = assert_close("feed_forward_backward", back)
    of_tokens, of_up, of_down = needs
    assert [tokens.numel() > 0, weights.numel() > 0] == [of_tokens, True]
    assert [grad.numel() > 0 for grad in (up, up_bias)] == [of_up] * 2
    assert [grad.numel() > 0 for grad in (down, down_bias)] == [of_down] * 2


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_nan_stays_with_its_token(activation, device):
    """Tokens of the same experts have the results that they have beside numbers."""
    plan = plans(40, 2, 3, device)[0]
    tensors = operands(40, 2, 3, 16, 8, torch.float32, device, activation=activation)
    tokens = tensors[0].clone()
    tokens[7] = torch.nan
    others = torch.arange(40, device=device) != 7

    def out(tokens):
        args = arguments(plan, (tokens, *tensors[1:]), activation)
        return call_operator("feed_forward", (*args, False))[0]

    assert out(tokens)[7].isnan().all()
    assert torch.equal(out(tokens)[others], out(tensors[0])[others])


def test_a_pre_activation_that_was_not_kept_is_computed_again(device):
    plan = plans(9, 2, 3, device)[0]
    tensors = [x.requires_grad_() for x in operands(9, 2, 3, 8, 4, torch.float64, device)]
    grads = []
    for keeps in (True, False):
        out, _ = torch.ops.moe_ext.feed_forward(*arguments(plan, tensors), keeps)
        grads.append(torch.autograd.grad(out.square().sum(), tensors))
    torch.testing.assert_close(*grads)


def test_the_gradient_of_a_kept_pre_activation(device):
    plan = plans(9, 2, 3, device)[0]
    tensors = [x.requires_grad_() for x in operands(9, 2, 3, 8, 4, torch.float64, device)]
    tokens, _, up, _, up_bias, _ = tensors
    out, kept = torch.ops.moe_ext.feed_forward(*arguments(plan, tensors), True)
    by_hand = moe_ext.grouped_mm(moe_ext.dispatch(tokens, plan), up, plan, up_bias)
    torch.testing.assert_close(kept, by_hand)
    leaves = tokens, up, up_bias
    for of_out in (False, True):
        loss = out.sum() if of_out else 0
        found, expected = (
            torch.autograd.grad(loss + y.square().sum(), leaves, retain_graph=True)
            for y in (kept, by_hand)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.checks_values
def test_a_plan_that_does_not_fit_itself_is_named(device):
    plan = plans(9, 2, 3, device)[0]
    if device.type != "cpu":
        pytest.skip("values are checked on the CPU")
    tensors = operands(9, 2, 3, 8, 4, torch.float32, device)
    for name, message in (
        ("slots", "slots must be in -1..R-1 with R = 18, got 99 at [0, 0]"),
        ("sources", "slots and sources must be of one plan, got slot 0 at "),
        ("offsets", "offsets must rise from 0 to at most R = 18, got 99 at [0]"),
        ("load", "load must not be negative, got -5 at [0]"),
    ):
        wrong = getattr(plan, name).clone()
        wrong.view(-1)[0] = -5 if name == "load" else 99
        misfit = plan._replace(**{name: wrong})
        with pytest.raises(RuntimeError, match=re.escape(message)):
            moe_ext.feed_forward(tensors[0], misfit, *tensors[1:4], "swiglu")
