"""dispatch, combine and route_dot: the three derivatives of one form; gradients of all that takes
a plan."""

import math
from functools import partial

import pytest
import torch
from cases import DTYPES, SIZES, assert_within, masked_experts, plans, values, weights_for
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import moe_ext
from moe_ext.ops import checks, reference

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(("T", "K", "E", "H"), SIZES)
def test_one_form(device, T, K, E, H):
    """<dispatch(x, w), y> = <x, combine(y, w)> = <w, route_dot(x, y)>, by hand as well."""
    for plan in plans(T, K, E, device):
        R = len(plan.sources)
        x = values(T, H, dtype=torch.float64, device=device)
        y = values(R, H, dtype=torch.float64, device=device)
        w = weights_for(torch.float64, T, K, device=device)
        form = x.new_zeros(())
        for t, k in (plan.slots >= 0).nonzero().tolist():
            form += w[t, k] * (x[t] @ y[plan.slots[t, k]])
        scale = max(1.0, math.sqrt(T * K * H))
        for product in (
            (moe_ext.dispatch(x, plan, w) * y).sum(),
            (x * moe_ext.combine(y, plan, w)).sum(),
            (w * moe_ext.route_dot(x, y, plan)).sum(),
        ):
            assert (product - form).abs() < 1e-12 * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("H", [67, 512])
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(device, dtype, H):
    """Subnormal numbers, infinities and NaN too, by weights that leave ties and overflow."""
    numbers = torch.arange(1 << 16, device=device).to(torch.int16)
    x = F.pad(numbers, (0, -len(numbers) % H)).view(dtype).view(-1, H)
    T = len(x)
    plan = moe_ext.make_plan(torch.zeros(T, 1, dtype=torch.int32, device=device), 1)
    for weight in (1.0, 1.5, -0.625, 1 / 3, 257.0):
        w = torch.full((T, 1), weight, device=device)
        expected = (x.float() * w).to(dtype)
        for actual in (moe_ext.dispatch(x, plan, w), moe_ext.combine(x, plan, w)):
            # Zeros may differ in sign: a sum that begins with zero has no -0.
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "K", "E", "H"), SIZES)
def test_matches_reference(device, T, K, E, H, dtype, weighted):
    for plan in plans(T, K, E, device):
        R = len(plan.sources)
        x, y = values(T, H, dtype=dtype, device=device), values(R, H, dtype=dtype, device=device)
        w = weights_for(dtype, T, K, device=device) if weighted else None
        wide = None if w is None else w.double()
        routes = (plan.slots, plan.sources)

        rows = moe_ext.dispatch(x, plan, w)
        exact = reference.dispatch(x.double(), *routes, wide)
        assert rows.dtype == dtype
        if weighted:
            assert_within(rows, exact, exact.abs(), additions=1)
        else:
            assert torch.equal(rows.double(), exact)

        # The bound is too small for sums that are rounded to 16 bits at every addition.
        tokens = moe_ext.combine(y, plan, w)
        exact = reference.combine(y.double(), *routes, wide)
        terms = reference.combine(y.double().abs(), *routes, wide)
        assert tokens.dtype == dtype
        assert_within(tokens, exact, terms, additions=2 * K)

        dots = moe_ext.route_dot(x, y, plan)
        exact = reference.route_dot(x.double(), y.double(), *routes)
        terms = reference.route_dot(x.double().abs(), y.double().abs(), *routes)
        assert dots.dtype == checks.accumulate_dtype(dtype)
        assert_within(dots, exact, terms, additions=H + 1)

        if weighted:
            both = torch.ops.moe_ext.combine_backward(x, y, *routes, w)
            assert torch.equal(both[0], rows)
            assert torch.equal(both[1], dots)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dispatch_copies_bits(device, dtype):
    """An unweighted row is the token, NaN and all; an empty row is +0."""
    T, H, E = 40, 9, 4
    x = values(T, H, dtype=dtype, device=device)
    x[3, 2], x[4, 0], x[5, 1] = math.nan, -math.inf, -0.0
    plan = moe_ext.make_plan(masked_experts(T, 2, E, device), E, 30)
    rows = moe_ext.dispatch(x, plan)
    filled = plan.sources >= 0
    expected = x[plan.sources[filled].long() // 2]
    assert torch.equal(rows[filled].view(torch.uint8), expected.view(torch.uint8))
    assert (rows[~filled].view(torch.uint8) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [1024, 1003])
def test_rows_that_outgrow_the_caches(dtype, H, request):
    """Rows are the same bits whether they are written around the caches or not."""
    K, E = 2, 8
    T = 90 if request.config.cusim else 1 + (50 << 20) // (K * H * dtype.itemsize)
    x, w = values(T, H, dtype=dtype), weights_for(dtype, T, K)
    y = values(T * K, H, dtype=dtype)
    ids = torch.arange(T * K).int().view(T, K) % E
    ids[T // 3, 1] = -1
    plan = moe_ext.make_plan(ids, E)
    token, empty = plan.sources.long() // K, plan.sources < 0
    rows = moe_ext.dispatch(x, plan)
    assert torch.equal(rows[~empty], x[token[~empty]])
    assert (rows[empty] == 0).all()
    weighed = moe_ext.dispatch(x, plan, w)
    of_rows = w.flatten()[plan.sources.long()].unsqueeze(1)
    assert torch.equal(weighed[~empty], (x[token] * of_rows).to(dtype)[~empty])
    assert (weighed[empty] == 0).all()
    dispatched, dots = torch.ops.moe_ext.combine_backward(x, y, plan.slots, plan.sources, w)
    assert torch.equal(dispatched, weighed)
    assert torch.equal(dots, moe_ext.route_dot(x, y, plan))


def test_a_dropped_route_adds_nothing_whatever_its_weight(device):
    T, E, H = 30, 3, 5
    plan = moe_ext.make_plan(masked_experts(T, 2, E, device), E, 4)
    y = values(len(plan.sources), H, dtype=torch.float32, device=device)
    w = weights_for(torch.float32, T, 2, device=device)
    poisoned = torch.where(plan.slots < 0, math.nan, w)
    assert torch.equal(moe_ext.combine(y, plan, poisoned), moe_ext.combine(y, plan, w))
    grad = moe_ext.route_dot(values(T, H, dtype=torch.float32, device=device), y, plan)
    assert (grad[plan.slots < 0] == 0).all()


# Functions of a plan and tensors, and the tensors' sizes.
DIFFERENTIABLE = {
    "dispatch": (lambda plan, x: moe_ext.dispatch(x, plan), "TH"),
    "dispatch, weighted": (lambda plan, x, w: moe_ext.dispatch(x, plan, w), "TH TK"),
    "combine": (lambda plan, y: moe_ext.combine(y, plan), "RH"),
    "combine, weighted": (lambda plan, y, w: moe_ext.combine(y, plan, w), "RH TK"),
    "route_dot": (lambda plan, x, y: moe_ext.route_dot(x, y, plan), "TH RH"),
    "combine_backward": (
        lambda plan, x, y, w: torch.ops.moe_ext.combine_backward(x, y, plan.slots, plan.sources, w),
        "TH RH TK",
    ),
    "grouped_mm": (lambda plan, y, w, b: moe_ext.grouped_mm(y, w, plan, b), "RH ENH EN"),
    **{
        f"{name} of {sizes}": (
            lambda plan, y, w=None, name=name: moe_ext.activate(y, plan, name, w),
            sizes,
        )
        for name in ("swiglu", "geglu", "gelu")
        for sizes in ("RG", "RG TK")
    },
}


@pytest.mark.parametrize(("function", "sizes"), DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
@pytest.mark.parametrize(("T", "K", "E", "H"), [(5, 2, 3, 3), (1, 1, 1, 1), (2, 3, 3, 2)])
def test_gradients(device, T, K, E, H, function, sizes):
    for plan in plans(T, K, E, device):
        size = {"T": T, "K": K, "E": E, "H": H, "R": len(plan.sources), "N": 2, "G": 4}
        shapes = ([size[letter] for letter in letters] for letters in sizes.split())
        leaves = [values(*shape, dtype=torch.float64, device=device) for shape in shapes]
        leaves = tuple(leaf.requires_grad_() for leaf in leaves)
        of_plan = partial(function, plan)
        assert gradcheck(of_plan, leaves, check_batched_grad=len(plan.sources) > 0)
        assert gradgradcheck(of_plan, leaves, fast_mode=True)  # one random direction


@pytest.mark.parametrize("function", [moe_ext.dispatch, moe_ext.combine])
def test_each_gradient_alone(device, function):
    """Both of combine come from one pass over the incoming gradient, each alone from its own
    operator."""
    plan = moe_ext.make_plan(masked_experts(20, 2, 3, device), 3, 8)
    number = 20 if function is moe_ext.dispatch else len(plan.sources)
    x = values(number, 5, dtype=torch.float32, device=device)
    w = weights_for(torch.float32, 20, 2, device=device)
    grad = torch.randn_like(function(x, plan, w))

    def gradients(*needed):
        leaves = [t.clone().requires_grad_(need) for t, need in zip((x, w), needed, strict=True)]
        function(leaves[0], plan, leaves[1]).backward(grad)
        return [leaf.grad for leaf in leaves]

    both = gradients(True, True)
    assert torch.equal(gradients(True, False)[0], both[0])
    assert torch.equal(gradients(False, True)[1], both[1])
