"""grouped_mm and its gradient grouped_outer."""

import pytest
import torch
from cases import DTYPES, SIZES, plans, random_experts, relative_error, values
from torch.autograd import gradcheck, gradgradcheck

import moe_ext
from moe_ext import reference

pytestmark = pytest.mark.usefixtures("poisoned")


def owned(plan: moe_ext.Plan) -> torch.Tensor:
    return plan.sources >= 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "K", "E", "H"), SIZES)
def test_matches_reference(device, T, K, E, H, dtype):
    N = 6
    eps = torch.finfo(dtype).eps
    for plan in plans(T, K, E, device):
        R = len(plan.sources)
        groups = (plan.offsets, plan.load)
        x, g = values(R, H, dtype=dtype, device=device), values(R, N, dtype=dtype, device=device)
        w = values(E, N, H, dtype=dtype, device=device)
        # What no route owns is not even read.
        x[~owned(plan)], g[~owned(plan)] = torch.nan, torch.nan

        out = moe_ext.grouped_mm(x, w, plan)
        exact = reference.grouped_mm(x.double(), w.double(), *groups)
        assert out.dtype == dtype
        assert (out[~owned(plan)] == 0).all()
        assert relative_error(out, exact) < 2 * eps * H**0.5

        strided = values(E, H, N, dtype=dtype, device=device).transpose(1, 2)
        exact = reference.grouped_mm(x.double(), strided.double(), *groups)
        assert relative_error(moe_ext.grouped_mm(x, strided, plan), exact) < 2 * eps * H**0.5

        outer = torch.ops.moe_ext.grouped_outer(g, x, *groups)
        exact = reference.grouped_outer(g.double(), x.double(), *groups)
        assert outer.dtype == dtype
        assert relative_error(outer, exact) < 2 * eps * (R + 1) ** 0.5


def test_is_a_product_per_row(device):
    T, K, E, M, N = 20, 2, 4, 5, 3
    plan = moe_ext.make_plan(random_experts(T, K, E, device), E, 8)
    x = values(len(plan.sources), M, dtype=torch.float64, device=device)
    w = values(E, N, M, dtype=torch.float64, device=device)
    out = moe_ext.grouped_mm(x, w, plan)
    for t, k in (plan.slots >= 0).nonzero().tolist():
        row = plan.slots[t, k]
        torch.testing.assert_close(out[row], w[plan.experts[t, k]] @ x[row])


@pytest.mark.parametrize(("T", "K", "E"), [(5, 2, 3), (1, 1, 1), (3, 2, 4)])
def test_gradients(device, T, K, E):
    for plan in plans(T, K, E, device):
        R = len(plan.sources)
        x = values(R, 3, dtype=torch.float64, device=device).requires_grad_()
        w = values(E, 2, 3, dtype=torch.float64, device=device).requires_grad_()

        def function(x, w, plan=plan):
            return moe_ext.grouped_mm(x, w, plan)

        assert gradcheck(function, (x, w), check_batched_grad=R > 0)
        assert gradgradcheck(function, (x, w))


def test_autocast_casts_as_mm_does(device):
    plan = moe_ext.make_plan(random_experts(9, 1, 2, device), 2)
    x, w = torch.randn(9, 8, device=device), torch.randn(2, 4, 8, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = moe_ext.grouped_mm(x, w, plan)
        wide = moe_ext.grouped_mm(x.double(), w.double(), plan)
    assert out.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    assert torch.equal(out, moe_ext.grouped_mm(x.bfloat16(), w.bfloat16(), plan))
