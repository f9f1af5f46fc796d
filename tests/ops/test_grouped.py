"""grouped_mm and its gradient grouped_outer."""

import itertools
import re
from functools import partial

import pytest
import torch
from cases import DTYPES, SIZES, plans, random_experts, relative_error, values

import moe_ext
from moe_ext.ops import checks, reference, torch_grouped_mm

pytestmark = pytest.mark.usefixtures("poisoned")


def owned(plan: moe_ext.Plan) -> torch.Tensor:
    return plan.sources >= 0


def rounding(dtype: torch.dtype, terms: int) -> float:
    """A relative error that a sum of so many terms may have: in 16 bit it is made in float32 and
    rounded once, with its bias a second time."""
    eps = torch.finfo(dtype).eps
    return 2 * eps if eps > 1e-4 else 2 * eps * terms**0.5


def groups(plan: moe_ext.Plan) -> tuple:
    return plan.offsets, plan.load, plan.capacity


def assert_product(rows, weights, bias, plan, bound, grouped_mm=torch.ops.moe_ext.grouped_mm):
    """A grouped_mm has the reference's result, in the dtype of the rows; it is returned."""
    out = grouped_mm(rows, weights, bias, *groups(plan))
    wide = [x if x is None else x.double() for x in (rows, weights, bias)]
    assert out.dtype == rows.dtype
    assert out.is_contiguous()
    assert (out[~owned(plan)] == 0).all()
    exact = reference.grouped_mm(*wide, *groups(plan))
    # In a product of few numbers terms may cancel out: their usual size counts.
    sizes = reference.grouped_mm(*(x if x is None else x.abs() for x in wide), *groups(plan))
    size = max(exact.norm(), sizes.norm() / max(rows.shape[1], 1) ** 0.5)
    assert (out - exact).norm() <= bound * size
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "K", "E", "H"), SIZES)
def test_matches_reference(device, T, K, E, H, dtype):
    N, fresh = 6, partial(values, dtype=dtype, device=device)
    for plan in plans(T, K, E, device):
        R = len(plan.sources)
        x, g, w, bias = fresh(R, H), fresh(R, N), fresh(E, N, H), fresh(E, N)
        # A row that no route owns is not even read.
        x[~owned(plan)], g[~owned(plan)] = torch.nan, torch.nan

        for weights, b in ((w, None), (w, bias), (fresh(E, H, N).mT, None)):
            assert_product(x, weights, b, plan, rounding(dtype, H + 1))

        outer = torch.ops.moe_ext.grouped_outer(g, x, *groups(plan))
        exact = reference.grouped_outer(g.double(), x.double(), *groups(plan))
        assert outer.dtype == dtype
        assert relative_error(outer, exact) < rounding(dtype, R + 1)


# An expert with more rows than a tile, of a number that is no multiple of anything, beside a small
# one and one without rows; more columns than a tile.
@pytest.mark.parametrize("dtype", DTYPES)
def test_more_than_a_tile(device, dtype):
    M, N = 40, 1100
    experts = torch.tensor([0] * 601 + [2] * 3 + [3] * 40, dtype=torch.int32, device=device)
    plan = moe_ext.make_plan(experts.unsqueeze(1), 5)
    fresh = partial(values, dtype=dtype, device=device)
    x, w, bias = fresh(len(experts), M), fresh(5, N, M), fresh(5, N)
    out, of_turned = (moe_ext.grouped_mm(x, y, plan, bias) for y in (w, w.mT.contiguous().mT))
    outer = torch.ops.moe_ext.grouped_outer(out, x, *groups(plan))
    for e in range(5):
        mine = slice(int(plan.offsets[e]), int(plan.offsets[e + 1]))
        exact = x[mine].double() @ w[e].double().T + bias[e].double()
        assert relative_error(out[mine], exact) < rounding(dtype, 1)
        assert relative_error(of_turned[mine], exact) < rounding(dtype, 1)
        exact = out[mine].double().T @ x[mine].double()
        assert relative_error(outer[e], exact) < rounding(dtype, M)


WIDTHS = [(64, 96), (5, 7), (130, 77), (1, 33), (3, 0), (9, 256), (40, 600), (6, 2100), (3, 70)]
WIDTHS += [(29, 603), (3, 128)]  # a panel of more than a register, fewer lines than go at once
# Blocks of a sum, of rows, of columns; lines whose addresses collide.
WIDTHS += [(64, 1024), (200, 2100), (2048, 40), (300, 1024), (300, 2048)]
# Columns that share a register, in a part of a sum and in its last one, or none; long odd lines.
WIDTHS += [(33, 801), (36, 1061), (48, 130), (16, 0), (20, 3)]
# Several blocks of the longest sums.
LONG = [(70, 8300), (70, 8320), (30, 8300)]

ANY = 1000  # rows


def orders(dtype, M, is_dense) -> tuple[int, ...]:
    """The most rows that own loops multiply in each order of their sums; then a library does."""
    owned = torch.ops.moe_ext.products(torch.empty(0, dtype=dtype))
    if owned == "own loops on AMX tiles":
        return (ANY,) if is_dense else (6, ANY)
    if owned == "own loops" and dtype == torch.bfloat16:  # in registers
        return (max(2, min(27, M // (18 if M < 256 else 14))), ANY) if is_dense else (ANY,)
    # An Intel CPU with AVX-512.
    if found := re.match(r"own loops; where .* for up to (\d+) and", owned):
        few = min(max(min(M // 64, 6), M // 128), 16)
        fours = min(M, 64, (2**17 - 1) // max(M, 1))
        return (few, fours, ANY) if is_dense else (int(found[1]),)
    most, flat = ANY, ANY
    if owned != "own loops":
        found = re.match(r"own loops up to (\d+) rows of an expert(?:, up to (\d+))?", owned)
        most, flat = (int(found[1]), int(found[2] or 16)) if found else (0, 0)
    if not is_dense or dtype != torch.float32 or most <= 16:  # without blocks
        return (most if is_dense else min(most, flat),)
    few = 22 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 10
    return min(max(4, min(64, M // 16)), few), most


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "M"), [*WIDTHS, *LONG])
def test_rows_have_the_results_that_they_have_beside_others(dtype, N, M, request):
    numbers, all_rows = (*range(1, 20), 24, 25, 31, 47, 48, 49, 65, 96, 97, 240, 257), 300
    if (N, M) in LONG:
        numbers, all_rows = (1, 2, 15, 16, 17, 31, 32, 33), 65
    if request.config.cusim:  # whose products take long: more rows than a tile of 64, of 128
        numbers, all_rows = (1, 2, 17, 49, 65), 130
    w, strided = values(2, N, M, dtype=dtype), values(2, M, N, dtype=dtype).mT
    apart = values(2, N, M + 3, dtype=dtype)[..., :M]
    bias, many = values(2, N, dtype=dtype), values(all_rows, M, dtype=dtype)

    def product(n, weights, b):
        plan = moe_ext.make_plan(torch.ones(n, 1, dtype=torch.int32), 2)
        return assert_product(many[:n], weights, b, plan, rounding(dtype, M + 1))

    for weights, b in [*itertools.product((w, strided), (None, bias)), (apart, bias)]:
        borders = orders(dtype, M, weights.stride(2) == 1)
        of_most = [product(max(1, min(most, all_rows)), weights, b) for most in borders]
        for n in numbers:
            out = product(n, weights, b)
            same = next((s for most, s in zip(borders, of_most, strict=True) if n <= most), out)
            assert torch.equal(out, same[:n])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "M"), [(150, 800), (33, 40), (72, 1)])
def test_outer_products_of_many_rows(device, dtype, N, M, request):
    """More than are summed at a time, to lines and columns of several blocks."""
    n, M = (130, min(M, 170)) if request.config.cusim else (4500, M)
    plan = moe_ext.make_plan(torch.zeros(n, 1, dtype=torch.int32, device=device), 1)
    x, g = values(n, M, dtype=dtype, device=device), values(n, N, dtype=dtype, device=device)
    outer = torch.ops.moe_ext.grouped_outer(g, x, *groups(plan))
    exact = (g.double().T @ x.double()).unsqueeze(0)
    assert relative_error(outer, exact) < rounding(dtype, n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_over_very_many_rows(dtype, request):
    """Equal terms: added one by one, all are rounded in the same direction."""
    n, H = 130 if request.config.cusim else 1 << 18, 8
    x, bias = torch.full((n, H), 0.1, dtype=dtype), torch.zeros(1, H, dtype=dtype)
    w = torch.eye(H, dtype=dtype).unsqueeze(0)
    up, down, up_bias, down_bias = (t.clone().requires_grad_() for t in (w, w, bias, bias))
    plan = moe_ext.make_plan(torch.zeros(n, 1, dtype=torch.int32), 1)
    weights = torch.ones(n, 1, dtype=checks.accumulate_dtype(dtype))
    moe_ext.feed_forward(x, plan, weights, up, down, "relu", up_bias, down_bias).backward(x)
    one, bound = x[0, 0].double(), torch.finfo(dtype).eps / 2 + 1e-4
    for grad in (up_bias.grad, down_bias.grad):
        assert relative_error(grad, (n * one).expand(1, H)) < bound
    if dtype.itemsize > 2 or "torch's GEMM" not in torch.ops.moe_ext.products(x):
        for grad in (up.grad, down.grad):
            assert relative_error(grad, (n * one * one).expand(1, H, H)) < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "M"), [(7, 5), (40, 70), (130, 88), (50, 96), (21, 333), (48, 130)])
def test_nan_stays_in_its_row_and_column(device, dtype, N, M):
    """Also where loops read or write beyond the last whole register of a line."""
    fresh = partial(values, dtype=dtype, device=device)
    for n in (1, 5, 15, 20, 30, 70):
        plan = moe_ext.make_plan(torch.zeros(n, 1, dtype=torch.int32, device=device), 1)
        x, g, w, strided = fresh(n, M), fresh(n, N), fresh(1, N, M), fresh(1, M, N).mT
        row, line, column = n // 2, N // 2, M // 2
        x[row], w[0, line], strided[0, line] = torch.nan, torch.nan, torch.nan
        wanted = torch.zeros(n, N, dtype=torch.bool, device=device)
        wanted[row], wanted[:, line] = True, True
        for weights in (w, strided):
            out = torch.ops.moe_ext.grouped_mm(x, weights, None, *groups(plan))
            assert torch.equal(out.isnan(), wanted)
        x, g[:, line] = fresh(n, M), torch.nan
        x[:, column] = torch.nan
        wanted = torch.zeros(1, N, M, dtype=torch.bool, device=device)
        wanted[:, line], wanted[:, :, column] = True, True
        outer = torch.ops.moe_ext.grouped_outer(g, x, *groups(plan))
        assert torch.equal(outer.isnan(), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "M"), WIDTHS)
def test_outer_products_of_few_rows(dtype, N, M):
    for n in (*range(1, 17), 20, 21, 31, 49, 97, 129):
        plan = moe_ext.make_plan(torch.ones(n, 1, dtype=torch.int32), 2)
        left, right = values(n, N, dtype=dtype), values(n, M, dtype=dtype)
        outer = torch.ops.moe_ext.grouped_outer(left, right, *groups(plan))
        exact = left.double().T @ right.double()
        assert (outer[0] == 0).all()
        assert relative_error(outer[1], exact) < rounding(dtype, n + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "M"), [(1024, 2048), (700, 3001), (700, 3040)])
def test_outer_products_that_outgrow_the_caches(dtype, N, M, request):
    """Rows that are aligned to cache lines are written around the caches."""
    if request.config.cusim:
        N, M = N // 16, M // 16
    counts = torch.tensor([3, 0, 9, 130 if request.config.cusim else 300, 30])
    E = 5 if request.config.cusim else 2 + (50 << 20) // (N * M * dtype.itemsize)
    plan = moe_ext.make_plan(
        torch.arange(E).repeat_interleave(counts.repeat(E)[:E]).int().view(-1, 1), E
    )
    x, g = (values(len(plan.sources), width, dtype=dtype) for width in (M, N))
    outer = torch.ops.moe_ext.grouped_outer(g, x, *groups(plan))
    for e, (begin, end) in enumerate(itertools.pairwise(plan.offsets.tolist())):
        left, right = g[begin:end].double().T, x[begin:end].double()
        # float32 on tensor cores is three products of tf32, whose errors are larger: four times.
        bound = 4 * rounding(dtype, end - begin + 1) * (left.abs() @ right.abs())
        bound += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # subnormal numbers
        assert ((outer[e].double() - left @ right).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_mode_on_all_threads(device, dtype, request):
    plan = moe_ext.make_plan(random_experts(900, 2, 8, device), 8)
    x = values(1800, 40, dtype=dtype, device=device)
    w = values(8, 30, 40, dtype=dtype, device=device).requires_grad_()
    expected = moe_ext.grouped_mm(x, w, plan).detach()
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)
    with torch.inference_mode():
        inside = moe_ext.make_plan(plan.expert_ids, 8)
        assert torch.equal(moe_ext.grouped_mm(x.clone(), w, inside), expected)
        assert torch.equal(moe_ext.grouped_mm(x, w.clone(), plan), expected)


def test_gradient_lies_as_its_weight(device):
    plan = moe_ext.make_plan(random_experts(9, 2, 3, device), 3)
    x = torch.randn(18, 5, device=device)
    for lies in ((3, 4, 5), (3, 5, 4)):
        w = torch.randn(lies, device=device, requires_grad=True)
        used = w if lies[1] == 4 else w.transpose(1, 2)
        (grad,) = torch.autograd.grad(moe_ext.grouped_mm(x, used, plan).square().sum(), used)
        assert grad.stride() == used.stride()


def test_autocast_casts_as_mm_does(device):
    plan = moe_ext.make_plan(random_experts(9, 1, 2, device), 2)
    x, w, bias = (torch.randn(size, device=device) for size in ((9, 8), (2, 4, 8), (2, 4)))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = moe_ext.grouped_mm(x, w, plan, bias)
        wide = moe_ext.grouped_mm(x.double(), w.double(), plan, bias.double())
        assert out.dtype == torch.bfloat16
        assert wide.dtype == torch.float64
        with pytest.raises(RuntimeError, match="weights must be bfloat16 like rows, got float64"):
            moe_ext.grouped_mm(x, w.double(), plan)
    assert torch.equal(out, moe_ext.grouped_mm(x.bfloat16(), w.bfloat16(), plan, bias.bfloat16()))


# torch's own products stand in where no kernel of ours is compiled.


def _from_odd_address(tensor: torch.Tensor) -> torch.Tensor:
    """As a parameter in a flat buffer, behind one of an odd size."""
    flat = tensor.new_empty(tensor.numel() + 1)[1:]
    return flat.copy_(tensor.flatten()).view(tensor.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["native", "batched", "reference"])
@pytest.mark.parametrize(("T", "K", "E", "H"), SIZES)
def test_torchs_products(monkeypatch, device, T, K, E, H, path, dtype):
    monkeypatch.setattr(torch_grouped_mm, "choose", lambda *args: (path, ""))
    # torch takes rows of a multiple of 16 bytes, or a single column as zeros are put beside it.
    M, N = 8 * (H % 50 + 1), 8
    fresh = partial(values, dtype=dtype, device=device)
    product = partial(assert_product, grouped_mm=torch_grouped_mm.grouped_mm)
    for plan in plans(T, K, E, device):
        if path == "batched" and plan.capacity is None:
            continue
        R = len(plan.sources)
        x, g, w, bias = fresh(R, M), fresh(R, N), fresh(E, N, M), fresh(E, N)
        x[~owned(plan)], g[~owned(plan)] = torch.nan, torch.nan
        expanded = torch.where(owned(plan), 1.0, torch.nan).to(x)[:, None].expand(R, M)
        for rows, weights, b in (
            (x, w, None),
            (x, w, bias),
            (x, fresh(E, M, N).mT, None),
            (x, w[:, :1], bias[:, :1]),
            (x[:, :1], w[:, :, :1], None),
            (expanded, w, None),
            (x, _from_odd_address(w), None),
            (x, torch.cat([w, w[..., :1]], dim=-1)[..., :M], None),
            (x.t().contiguous().t(), w, None),
        ):
            product(rows, weights, b, plan, 2 * rounding(dtype, M))
        for left, right in ((g, x), (g, x[:, :1]), (g[:, :1], x), (g.t().contiguous().t(), x)):
            outer = torch_grouped_mm.grouped_outer(left, right, *groups(plan))
            exact = reference.grouped_outer(left.double(), right.double(), *groups(plan))
            assert outer.is_contiguous()
            assert relative_error(outer, exact) < 2 * rounding(dtype, R + 1)


@pytest.mark.parametrize("path", ["native", "batched", "loop", "reference"])
def test_torchs_products_check_their_arguments(monkeypatch, path):
    monkeypatch.setattr(torch_grouped_mm, "choose", lambda *args: (path, ""))
    plan = moe_ext.make_plan(random_experts(8, 1, 2), 2, 4)
    x, w = torch.randn(8, 8), torch.randn(2, 8, 8)
    for bias, message in (
        (torch.randn(2, 8).double(), "grouped_mm: bias must be float32 like rows, got float64"),
        (torch.randn(2, 1), r"grouped_mm: bias must be \[E, N\] with E = 2, N = 8"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch_grouped_mm.grouped_mm(x, w, bias, *groups(plan))
    with pytest.raises(RuntimeError, match="grouped_outer: right must be float32 like left"):
        torch_grouped_mm.grouped_outer(x, x.double(), *groups(plan))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "M"), [(1, 1), (5, 3), (16, 24), (8, 0)])
def test_sums_of_no_rows_are_zeroed(device, dtype, N, M):
    sums = values(6, N, M, dtype=dtype, device=device)
    offsets = torch.tensor([0, 0, 3, 3, 3, 7, 7], dtype=torch.int32, device=device)
    expected = sums * torch.tensor([0, 1, 0, 0, 1, 0], dtype=dtype, device=device)[:, None, None]
    torch.ops.moe_ext.zero_empty_groups(sums, offsets)
    assert torch.equal(sums, expected)
