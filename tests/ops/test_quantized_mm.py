"""Products with weights in 8 and 4 bits."""

import copy
import itertools

import pytest
import torch
from cases import KINDS, assert_near, call_operator, plans, quantized, relative_error, values
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import moe_ext
from moe_ext import Plan, QuantizedWeight
from moe_ext.formats import FORMATS

# E, N, M: fewer lines than are read at a time, a rest behind whole steps, an odd count of groups.
SIZES = [(3, 2, 128), (2, 37, 384), (3, 130, 640), (3, 136, 640)]
ROUNDING = {torch.float32: 2e-6, torch.float64: 2e-6, torch.bfloat16: 5e-3, torch.float16: 8e-4}


def one_expert(rows: Tensor) -> Plan:
    return moe_ext.make_plan(rows.new_zeros(len(rows), 1, dtype=torch.int32), 1)


def assert_product(
    weight: QuantizedWeight, rows: Tensor, plan: Plan, bias=None, *, transposed=False, i8=False
) -> Tensor:
    """The operator has the reference's result, which is returned."""
    rule = weight.format, transposed, i8, plan.capacity
    args = rows, *weight.codes(), bias, plan.offsets, plan.load, *rule
    (found,) = call_operator("quantized_mm", args)
    (expected,) = call_operator("quantized_mm", args, "reference")
    assert found.dtype == rows.dtype
    # Rounding of rows may go the other way where two whole numbers are as near.
    assert relative_error(found, expected) < ROUNDING[rows.dtype] + (5e-4 if i8 else 0)
    return found


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_products_are_those_with_the_numbers(kind, size, dtype, device, poisoned):
    E, N, M = size
    weight = quantized(kind, *size, device)
    for T, i8, transposed in itertools.product((1, 2, 9, 70), (False, True), (False, True)):
        for plan in plans(T, 2, E, device)[:4]:
            R = plan.sources.shape[0]
            rows = values(R, N if transposed else M, dtype=dtype, device=device)
            bias = None if transposed else values(E, N, dtype=dtype, device=device)
            found = assert_product(weight, rows, plan, bias, transposed=transposed, i8=i8)
            if i8 or dtype != torch.float64:
                continue
            numbers = weight.dequantize(dtype)
            numbers = numbers.mT if transposed else numbers
            exact = moe_ext.grouped_mm(rows, numbers, plan, bias)
            assert relative_error(found, exact) < 1e-6


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", [(2, 24, 144), (2, 7, 33), (3, 16, 16), (1, 5, 4487), (2, 3, 0)])
def test_lines_of_8_bits_end_anywhere(size, dtype, device):
    E, N, M = size
    weight = quantized({"format": "int8"}, *size, device)
    for T, transposed in itertools.product((1, 5, 70), (False, True)):
        plan = moe_ext.make_plan(torch.arange(T, device=device).int().unsqueeze(1) % E, E)
        rows = values(T, N if transposed else M, dtype=dtype, device=device)
        assert_product(weight, rows, plan, transposed=transposed)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_long_lines_are_multiplied_in_parts(kind, dtype, device):
    weight = quantized(kind, 1, 9, 4480, device)
    rows = values(7, 4480, dtype=dtype, device=device)
    assert_product(weight, rows, one_expert(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_of_long_lines_do_not_depend_on_the_others(kind, dtype):
    """Lines go by parts of the rows in groups, whose parts depend on how many rows there are."""
    weight = quantized(kind, 1, 41, 4480)
    rows = values(16, 4480, dtype=dtype)
    most = assert_product(weight, rows, one_expert(rows))
    for n in (5, 9):
        assert torch.equal(assert_product(weight, rows[:n], one_expert(rows[:n])), most[:n])


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_least_number_of_8_bits(dtype, device):
    """quantize does not make a -128, but a checkpoint may have it."""
    weight = quantized({"format": "int8"}, 1, 9, 144, device)
    weight.values[0, 3, 70] = weight.values[0, 8, 143] = 0x80
    for T, i8, transposed in itertools.product((1, 7, 70), (False, True), (False, True)):
        rows = values(T, 9 if transposed else 144, dtype=dtype, device=device)
        assert_product(weight, rows, one_expert(rows), transposed=transposed, i8=i8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_that_is_not_finite_cannot_be_rounded(kind, value, device):
    """All its products are NaN, those of other rows are not."""
    weight = quantized(kind | {"activations": "int8"}, 1, 6, 256, device)
    for T in (3, 70):
        rows = values(T, 256, dtype=torch.float32, device=device)
        rows[1, 200] = value
        is_nan = moe_ext.grouped_mm(rows, weight, one_expert(rows)).isnan()
        assert is_nan[1].all()
        assert is_nan.sum() == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_scale_that_is_not_finite_stays_in_its_line(kind, dtype, device):
    """The operator does not look at scales; rows of 3 groups end within a register."""
    group = kind.get("group_size") or FORMATS[kind["format"]].groups[0] or 64
    weight = quantized(kind, 1, 6, 3 * group, device)
    weight.scales[0, 1] = 255 if weight.scales.dtype == torch.uint8 else torch.nan
    weight.values[0, 1] = 0x77  # of one sign, so that an infinite scale would not end in NaN
    for T in (1, 2, 7, 70):
        rows = values(T, 3 * group, dtype=dtype, device=device).abs() + 0.1
        out = moe_ext.grouped_mm(rows, weight, one_expert(rows))
        assert out.isnan().any(0).tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_does_not_depend_on_the_others(dtype, activations, device):
    """Up to the rows that are multiplied as codes are read."""
    for kind in KINDS:
        weight = quantized(kind | {"activations": activations}, 1, 40, 384, device)
        rows = values(4, 384, dtype=dtype, device=device)
        most = moe_ext.grouped_mm(rows, weight, one_expert(rows))
        for n in (1, 2, 3):
            out = moe_ext.grouped_mm(rows[:n], weight, one_expert(rows[:n]))
            assert torch.equal(out, most[:n])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_of_rows_and_biases(kind, device):
    E, N, M = 3, 6, 128
    weight = quantized(kind, E, N, M, device)
    plan = plans(5, 2, E, device)[0]
    rows = values(10, M, dtype=torch.float64, device=device).requires_grad_()
    bias = values(E, N, dtype=torch.float64, device=device).requires_grad_()
    numbers = weight.dequantize(torch.float64)
    results = [moe_ext.grouped_mm(rows, w, plan, bias) for w in (weight, numbers)]
    upstream = torch.randn_like(results[0])
    grads = [torch.autograd.grad(out, (rows, bias), upstream) for out in results]
    assert_near(*grads, 1e-6)

    def function(rows, bias):
        return moe_ext.grouped_mm(rows, weight, plan, bias)

    assert gradcheck(function, (rows, bias), fast_mode=True)
    assert gradgradcheck(function, (rows, bias), fast_mode=True)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "kind", [{"format": "int8"}, {"format": "int4", "group_size": 32, "zero_points": True}], ids=str
)
def test_experts_are_those_with_the_numbers(kind, bias, before):
    """Outputs and gradients, also where one weight alone is frozen."""
    T, E, H, F = 9, 3, 64, 32
    options = {"dtype": torch.float64, "score_before_experts": before}
    experts = moe_ext.GroupedExperts(E, H, F, bias=bias, **options)
    frozen = copy.deepcopy(experts).quantize(**kind)
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            getattr(experts, name).copy_(getattr(frozen, name).dequantize())
    half = copy.deepcopy(experts)
    moe_ext.formats.replace_parameter(half, "down_proj", copy.deepcopy(frozen.down_proj))
    tokens = values(T, H, dtype=torch.float64).requires_grad_()
    weights = torch.rand(T, 2, dtype=torch.float64, requires_grad=True)
    for plan in plans(T, 2, E)[:4]:
        results = []
        for module in (experts, frozen, half):
            out = module.routed(tokens, plan, weights)
            leaves = [tokens, weights, *([module.gate_up_proj_bias] if bias else [])]
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for found in results[1:]:
            assert_near(found, results[0], 1e-6)


def test_autocast_casts_tokens_alone():
    weight = quantized({"format": "int4", "group_size": 32}, 2, 8, 64)
    plan = plans(3, 1, 2)[0]
    rows = values(3, 64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = moe_ext.grouped_mm(rows, weight, plan)
    assert torch.equal(out, moe_ext.grouped_mm(rows.bfloat16(), weight, plan))
