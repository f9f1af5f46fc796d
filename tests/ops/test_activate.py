"""activate and its gradient."""

import pytest
import torch
from cases import DTYPES, FUNCTIONS, SIZES, assert_within, plans, values, weights_for
from torch import Tensor

import moe_ext
from moe_ext.ops import checks, reference

pytestmark = pytest.mark.usefixtures("poisoned")

# exp of the CPU's vector loops is good to two roundings, silu of it to four.
ROUNDINGS = 8


def joined(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """A pre-activation of gates and, where the activation has them, ups."""
    if activation == "swiglu_oai":
        return torch.stack([gate, up], dim=-1).flatten(-2)
    return torch.cat([gate, up], dim=-1) if activation in checks.GATED else gate


def times_one(activation: str, gate: Tensor) -> Tensor:
    """A pre-activation whose gates are multiplied by one."""
    return joined(activation, gate, torch.full_like(gate, activation != "swiglu_oai"))


@pytest.mark.parametrize("activation", checks.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "K", "E", "ffn"), SIZES)
def test_matches_reference(device, T, K, E, ffn, dtype, activation):
    weights = weights_for(dtype, T, K, device=device)
    for plan in plans(T, K, E, device)[:: 1 if T < 100 else 3]:
        routes, empty = (plan.slots, plan.sources), plan.sources < 0
        widths = (2 * ffn if activation in checks.GATED else ffn, ffn)
        pre_activation, grad = (
            values(len(plan.sources), width, dtype=dtype, device=device) for width in widths
        )
        # A row that no route owns is not even read.
        pre_activation[empty], grad[empty] = torch.nan, torch.nan

        # |fn(x)| and |fn'(x) x| are at most about |x|: torch's gelu is a difference of the like.
        sizes = pre_activation.double().nan_to_num().abs()
        gated, squares = activation in checks.GATED, activation == "relu2"
        gate, up = reference._gate_and_up(sizes, activation) if gated else (sizes, 1)
        up = up + 1 if activation == "swiglu_oai" else up
        gate = gate**2 if squares else gate
        size = gate * up
        weight, _ = reference._of_rows(weights.double(), plan.sources)
        for w in (None, weights):
            out = moe_ext.activate(pre_activation, plan, activation, w)
            wide = None if w is None else w.double()
            exact = reference.activate(pre_activation.double(), *routes, wide, activation)
            assert out.dtype == dtype
            assert (out[empty] == 0).all()
            assert_within(out, exact, size if w is None else size * weight, ROUNDINGS)

        args = grad, pre_activation, *routes, weights, activation
        got = torch.ops.moe_ext.activate_backward(*args)
        args = grad.double(), pre_activation.double(), *routes, weights.double(), activation
        grad_pre_activation, active, grad_weights = reference.activate_backward(*args)
        upstream = grad.double().nan_to_num().abs()
        terms = weight * upstream * (2 * gate.sqrt() if squares else gate + 1)
        terms = joined(activation, terms * up, terms)
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
    pre_activation = times_one(activation, x)[None]
    plan = moe_ext.make_plan(torch.zeros(1, 1, dtype=torch.int32, device=device), 1)
    out = moe_ext.activate(pre_activation, plan, activation)[0].double()
    expected = FUNCTIONS[activation](x.double())
    # torch's formula for gelu gives NaN at -inf where ours does, and 0 for large negative numbers.
    assert torch.equal(out.isnan(), expected.isnan())
    # Half of a subnormal number may be rounded either way.
    info = torch.finfo(dtype)
    atol = max(info.smallest_normal * info.eps, 1e-36)
    expected = expected.to(dtype).double()
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=atol, equal_nan=True)


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_relu_has_torchs_slope(device, activation):
    plan = moe_ext.make_plan(torch.zeros(1, 1, dtype=torch.int32, device=device), 1)
    x = torch.tensor([[-1.0, 0.0, 2.0, torch.nan]], device=device, requires_grad=True)
    mine = torch.autograd.grad(moe_ext.activate(x, plan, activation).sum(), x)[0]
    theirs = torch.autograd.grad(FUNCTIONS[activation](x).sum(), x)[0]
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_gpt_oss(device, dtype):
    """Gates and factors by turns, both clamped; at a limit the slope is 1, beyond it 0."""
    special = torch.tensor([-9.0, -7, -6.75, -1, 0, 1, 6.75, 7, 9, 1000, torch.inf])
    pairs = torch.cartesian_prod(special, torch.cat([special, -special]))
    pairs = pairs.to(dtype).to(device).requires_grad_()
    plan = moe_ext.make_plan(torch.zeros(1, 1, dtype=torch.int32, device=device), 1)
    out = moe_ext.activate(pairs.view(1, -1), plan, "swiglu_oai")[0]
    gate, up = pairs.double().unbind(-1)
    # Not clamp, whose slope at a limit is 1 up to torch 2.13 and 0 in 2.15.
    gate = torch.where(gate <= 7, gate, 7)
    expected = FUNCTIONS["swiglu"](1.702 * gate) / 1.702
    expected = expected * (torch.where(up.abs() <= 7, up, up.sign() * 7) + 1)
    rtol = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=1e-7)
    mine, theirs = (torch.autograd.grad(y.double().sum(), pairs) for y in (out, expected))
    torch.testing.assert_close(mine, theirs, rtol=rtol, atol=2 * rtol)


@pytest.mark.parametrize("activation", checks.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_rounded_once(device, activation, dtype):
    """What approximations add is a twentieth of the rounding at most, tails included."""
    numbers = torch.arange(1 << 16).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()].view(-1, 64).to(device)
    pre_activation = times_one(activation, numbers)
    plan = moe_ext.make_plan(numbers.new_zeros(len(numbers), 1, dtype=torch.int32), 1)
    weights = numbers.new_ones(len(numbers), 1, dtype=torch.float32)

    x = numbers.double()
    if activation == "relu":
        value, slope, slope_terms = x.clamp(min=0), (x > 0).double(), torch.ones_like(x)
    elif activation == "relu2":
        value, slope, slope_terms = x.clamp(min=0) ** 2, 2 * x.clamp(min=0), 2 * x.abs()
    elif activation in ("swiglu", "swiglu_oai"):
        scale, limit = (1.702, 7) if activation == "swiglu_oai" else (1, torch.inf)
        clamped = x.clamp(max=limit)
        y = scale * clamped
        sigmoid = y.sigmoid()
        value, slope_terms = clamped * sigmoid, sigmoid * (1 + y.abs() * (-y).sigmoid())
        slope = torch.where(x <= limit, sigmoid * (1 + y * (-y).sigmoid()), 0)
    else:
        below = torch.special.erfc(-x / 2**0.5) / 2
        density = torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
        value, slope, slope_terms = x * below, below + x * density, below + x.abs() * density
    out = moe_ext.activate(pre_activation, plan, activation)
    routes = plan.slots, plan.sources
    args = torch.ones_like(numbers), pre_activation, *routes, weights, activation
    grad, active, _ = torch.ops.moe_ext.activate_backward(*args)
    # exp of a number above 88.7 is infinite in float32, a reciprocal of one above 87.3 too small to
    # be normal: what is left of silu is lost.
    info = torch.finfo(dtype)
    rounding, least = 1.05 * info.eps / 2, max(info.smallest_normal * info.eps, 1e-36)
    fits = value <= info.max
    for got in (out, active):
        assert ((got.double() - value).abs() <= rounding * value.abs() + least)[fits].all()
        assert (got[value > info.max * (1 + info.eps)] == torch.inf).all()
    grad = reference._gate_and_up(grad, activation)[0] if activation in checks.GATED else grad
    grad = grad.double()
    fits = slope.abs() <= info.max
    assert ((grad - slope).abs() <= rounding * slope_terms + least)[fits].all()
