"""activate and its gradient."""

import pytest
import torch
from cases import DTYPES, SIZES, assert_within, plans, values, weights_for
from torch.nn import functional as F

import moe_ext
from moe_ext.ops import checks, reference

pytestmark = pytest.mark.usefixtures("poisoned")

# exp of the CPU's vector loops is good to two roundings, silu of it to four.
ROUNDINGS = 8


def width(activation: str, ffn: int) -> int:
    return 2 * ffn if activation in checks.GATED else ffn


@pytest.mark.parametrize("activation", checks.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "K", "E", "ffn"), SIZES)
def test_matches_reference(device, T, K, E, ffn, dtype, activation):
    weights = weights_for(dtype, T, K, device=device)
    for plan in plans(T, K, E, device)[:: 1 if T < 100 else 3]:
        routes, empty = (plan.slots, plan.sources), plan.sources < 0
        pre_activation = values(
            len(plan.sources), width(activation, ffn), dtype=dtype, device=device
        )
        grad = values(len(plan.sources), ffn, dtype=dtype, device=device)
        # A row that no route owns is not even read.
        pre_activation[empty], grad[empty] = torch.nan, torch.nan

        # |fn(x)| and |fn'(x) x| are at most about |x|: torch's gelu is a difference of the like.
        gate, *up = pre_activation.double().nan_to_num().abs().split(max(ffn, 1), dim=-1)
        size = gate * up[0] if up else gate
        weight, _ = reference._of_rows(weights.double(), plan.sources)
        for w in (None, weights):
            out = moe_ext.activate(pre_activation, plan, activation, w)
            wide = None if w is None else w.double()
            exact = reference.activate(pre_activation.double(), *routes, wide, activation)
            assert out.dtype == dtype
            assert (out[empty] == 0).all()
            assert_within(out, exact, size if w is None else size * weight, ROUNDINGS)

        got = torch.ops.moe_ext.activate_backward(
            grad, pre_activation, *routes, weights, activation
        )
        args = grad.double(), pre_activation.double(), *routes, weights.double(), activation
        grad_pre_activation, active, grad_weights = reference.activate_backward(*args)
        upstream = grad.double().nan_to_num().abs()
        terms = weight * upstream * (gate + 1)
        terms = torch.cat([terms * up[0], terms], dim=-1) if up else terms
        assert_within(got[0], grad_pre_activation, terms, ROUNDINGS)
        assert_within(got[1], active, size * weight, ROUNDINGS)
        dots, _ = reference._rows_of_routes((upstream * size).sum(-1, keepdim=True), plan.slots)
        assert_within(got[2], grad_weights, dots.squeeze(-1), ffn + ROUNDINGS)
        assert (got[2][plan.slots < 0] == 0).all()
        assert all((rows[empty] == 0).all() for rows in got[:2])


@pytest.mark.parametrize("activation", checks.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number(device, activation, dtype):
    """Very large, very small, infinite: as torch has it, and NaN for NaN."""
    x = torch.tensor([0.0, -0.0, 1e-30, 3e-8, 20, -20, 87.4, -87.4, 88.5, -88.5, 3e38, -3e38])
    x = torch.cat([x, torch.tensor([torch.inf, -torch.inf, torch.nan])]).to(dtype).to(device)
    gated = activation in checks.GATED
    pre_activation = torch.stack([torch.cat([x, torch.ones_like(x)]) if gated else x])
    plan = moe_ext.make_plan(torch.zeros(1, 1, dtype=torch.int32, device=device), 1)
    out = moe_ext.activate(pre_activation, plan, activation)[0].double()
    function = {"swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu, "relu": F.relu}[activation]
    expected = function(x.double())
    # torch's formula for gelu gives NaN at -inf where ours does, and 0 for large negative numbers.
    assert torch.equal(out.isnan(), expected.isnan())
    # Half of a subnormal number may be rounded either way.
    info = torch.finfo(dtype)
    atol = max(info.smallest_normal * info.eps, 1e-36)
    expected = expected.to(dtype).double()
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=atol, equal_nan=True)


def test_relu_has_torchs_slope(device):
    plan = moe_ext.make_plan(torch.zeros(1, 1, dtype=torch.int32, device=device), 1)
    x = torch.tensor([[-1.0, 0.0, 2.0, torch.nan]], device=device, requires_grad=True)
    mine = torch.autograd.grad(moe_ext.activate(x, plan, "relu").sum(), x)[0]
    assert torch.equal(mine, torch.autograd.grad(F.relu(x).sum(), x)[0])


@pytest.mark.parametrize("activation", checks.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_rounded_once(device, activation, dtype):
    """What approximations add is a twentieth of the rounding at most, tails included."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()].view(-1, 64).to(device)
    gated = activation in checks.GATED
    ones = torch.ones_like(numbers)
    pre_activation = torch.cat([numbers, ones], dim=1) if gated else numbers
    plan = moe_ext.make_plan(numbers.new_zeros(len(numbers), 1, dtype=torch.int32), 1)
    weights = numbers.new_ones(len(numbers), 1, dtype=torch.float32)

    x = numbers.double()
    if activation == "relu":
        value, slope, slope_terms = x.clamp(min=0), (x > 0).double(), torch.ones_like(x)
    elif activation == "swiglu":
        sigmoid = x.sigmoid()
        value, slope_terms = x * sigmoid, sigmoid * (1 + x.abs() * (-x).sigmoid())
        slope = sigmoid * (1 + x * (-x).sigmoid())
    else:
        below = torch.special.erfc(-x / 2**0.5) / 2
        density = torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
        value, slope, slope_terms = x * below, below + x * density, below + x.abs() * density
    out = moe_ext.activate(pre_activation, plan, activation)
    routes = plan.slots, plan.sources
    grad, active, _ = torch.ops.moe_ext.activate_backward(
        ones, pre_activation, *routes, weights, activation
    )
    # exp of a number above 88.7 is infinite in float32, a reciprocal of one above 87.3 too small to
    # be normal: what is left of silu is lost.
    info = torch.finfo(dtype)
    rounding, least = 1.05 * info.eps / 2, max(info.smallest_normal * info.eps, 1e-36)
    for got, exact, size in ((out, value, value), (active, value, value)):
        assert ((got.double() - exact).abs() <= rounding * size.abs() + least).all()
    grad = grad[:, :64].double()
    assert ((grad - slope).abs() <= rounding * slope_terms + least).all()
