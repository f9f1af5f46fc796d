"""Weights in 8 and 4 bits: what their codes stand for, and what a module of them can do."""

import copy
import io
import pickle
import re

import pytest
import torch
from cases import KINDS, quantized, relative_error, same, values

import moe_ext
from moe_ext import QuantizedWeight
from moe_ext.formats import FORMATS, codes
from moe_ext.parallel.sharding import divide


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_numbers_of_a_format_are_kept(kind):
    """Quantizing what was dequantized gives it back: codes are the nearest, scales large enough."""
    weight = quantized(kind, 2, 5, 256)
    numbers = weight.dequantize()
    again = QuantizedWeight.quantize(numbers, **kind)
    # A group with a zero point may not reach both ends of its codes.
    bound = 0.06 if "zero_points" in kind else 1e-6
    assert relative_error(again.dequantize(), numbers) < bound


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_defaults_of_dtype_and_device_change_no_code(kind, default):
    weight = values(2, 16, 256, dtype=torch.float32)
    before = QuantizedWeight.quantize(weight, **kind)
    numbers = before.dequantize()
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            after = QuantizedWeight.quantize(weight, **kind)
            assert torch.equal(before.dequantize(), numbers)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(after.dequantize(), numbers)


LARGEST_ERRORS = [0.01, 0.1, 0.1, 0.12, 0.11, 0.09, 0.12, 0.1]


@pytest.mark.parametrize(("kind", "most"), list(zip(KINDS, LARGEST_ERRORS, strict=True)), ids=str)
def test_the_error_of_normal_weights(kind, most):
    weight = values(2, 64, 512, dtype=torch.float32)
    found = QuantizedWeight.quantize(weight, **kind)
    assert found.shape == weight.shape
    assert relative_error(found.dequantize(), weight) < most
    allowed = 0.53 if found.format == "int8" else 0.29
    assert found.nbytes <= allowed * 2 * weight.numel()


def test_codes_by_hand():
    """Every code of a group in turn, the first of a pair in the lower half of its byte."""
    ramp = torch.arange(32, dtype=torch.uint8) % 16
    packed = codes.pack(ramp)
    assert packed[:2].tolist() == [0x10, 0x32]
    assert torch.equal(codes.unpack(packed), ramp)
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    blocks, scales = packed.view(1, 1, 1, 16), torch.tensor([[[129]]], dtype=torch.uint8)
    weight = QuantizedWeight.from_mxfp4(blocks, scales)
    assert weight.dequantize().flatten().tolist() == [4 * x for x in e2m1 * 2]
    assert weight.values.data_ptr() == blocks.data_ptr()
    scale = torch.tensor([[[0.5]]]).bfloat16()
    zeros = torch.tensor([[[3]]], dtype=torch.uint8)
    whole = packed.view(1, 1, 16)
    symmetric = QuantizedWeight(whole, scale, format="int4")
    assert symmetric.dequantize().flatten().tolist() == [(x - 8) / 2 for x in range(16)] * 2
    shifted = QuantizedWeight(whole, scale, zeros, format="int4")
    assert shifted.dequantize().flatten().tolist() == [(x - 3) / 2 for x in range(16)] * 2


def test_nf4_as_bitsandbytes_packs_it():
    """The first number of a byte is in its upper half, and blocks of 64 follow each other."""
    ramp = torch.arange(2 * 3 * 64) * 7 % 16
    packed = (ramp[::2] << 4 | ramp[1::2]).to(torch.uint8).unsqueeze(1)
    absmax = torch.rand(6) + 0.5
    found = QuantizedWeight.from_nf4(packed, absmax, (2, 3, 64)).dequantize()
    table = torch.tensor(FORMATS["nf4"].numbers)
    assert torch.equal(found.flatten(), table[ramp] * absmax.repeat_interleave(64))
    with pytest.raises(ValueError, match="192 bytes and 6 maxima, not 192 and 5"):
        QuantizedWeight.from_nf4(packed, absmax[1:], (2, 3, 64))
    with pytest.raises(ValueError, match="blocks of 64 cross rows of 96 numbers"):
        QuantizedWeight.from_nf4(packed, absmax, (2, 2, 96))
    absmax[2], packed[64:96] = 0, 0x77  # a block of zeros
    found = QuantizedWeight.from_nf4(packed, absmax, (2, 3, 64)).dequantize()
    assert torch.equal(found.flatten()[128:192], torch.zeros(64))


@pytest.mark.parametrize("exponent", [0, 1, 127, 254])
def test_powers_of_two(exponent):
    scales = torch.full((1, 1, 1), exponent, dtype=torch.uint8)
    packed = torch.full((1, 1, 16), 0x22, dtype=torch.uint8)  # ones
    weight = QuantizedWeight(packed, scales, format="mxfp4")
    assert weight.dequantize().unique().item() == 2.0 ** (exponent - 127)
    plan = moe_ext.make_plan(torch.zeros(1, 1, dtype=torch.int32), 1)
    row = torch.zeros(1, 32)
    row[0, 5] = 1
    if exponent:  # a subnormal scale may count as zero
        assert moe_ext.grouped_mm(row, weight, plan).item() == 2.0 ** (exponent - 127)


def test_mxfp4_goes_to_the_even_of_two_neighbours():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 4).view(1, 1, 32)
    found = QuantizedWeight.quantize(ties, "mxfp4").dequantize()
    expected = torch.tensor([0, 1, 1, 2, 2, 4, 4, 6.0] * 4)
    assert torch.equal(found.flatten(), expected)


def test_a_weight_is_a_module_of_frozen_parameters():
    experts = moe_ext.GroupedExperts(2, 64, 32)
    experts.quantize("int4", 32, zero_points=True, activations="int8")
    names = [f"{w}.{n}" for w in ("gate_up_proj", "down_proj") for n in codes.Codes._fields]
    assert sorted(experts.state_dict()) == sorted(names)
    assert not any(p.requires_grad for p in experts.parameters())
    stored = pickle.loads(pickle.dumps(experts))
    assert "int4, group_size=32, zero points, activations='int8'" in repr(stored)
    saved = io.BytesIO()
    torch.save(experts.state_dict(), saved)
    saved.seek(0)
    other = moe_ext.GroupedExperts(2, 64, 32).quantize("int4", 32, zero_points=True)
    other.load_state_dict(torch.load(saved))
    assert torch.equal(other.down_proj.dequantize(), experts.down_proj.dequantize())
    on_meta = copy.deepcopy(experts).to("meta")
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_dtype_does_not_change_a_weight(kind):
    weight = quantized(kind, 2, 3, 128)
    before = copy.deepcopy(weight.state_dict())
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert same(weight.to(dtype).state_dict(), before)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_weight_on_meta_has_its_sizes(kind):
    found = QuantizedWeight.quantize(torch.empty(2, 3, 128, device="meta"), **kind)
    on_meta, expected = (
        {name: (x.shape, x.dtype) for name, x in weight.state_dict().items()}
        for weight in (found, quantized(kind, 2, 3, 128))
    )
    assert on_meta == expected


@pytest.mark.parametrize("size", [(0, 3, 64), (2, 0, 64)])
def test_empty_weights(size):
    found = QuantizedWeight.quantize(torch.empty(size), "int8")
    assert found.dequantize().shape == size


def test_experts_are_quantized_once():
    experts = moe_ext.GroupedExperts(2, 64, 32).quantize("int8")
    with pytest.raises(ValueError, match=r"GroupedExperts\.gate_up_proj is quantized already"):
        experts.quantize("int4")


def test_ranks_have_their_parts():
    experts = moe_ext.GroupedExperts(4, 64, 32).quantize("int4", 32)
    parts = [divide(experts, rank, 2) for rank in range(2)]
    for name in ("gate_up_proj", "down_proj"):
        numbers = [getattr(part, name).dequantize() for part in parts]
        assert torch.equal(torch.cat(numbers), getattr(experts, name).dequantize())


WEIGHT = quantized({"format": "int4", "group_size": 32, "zero_points": True}, 2, 3, 64)


def changed(**tensors) -> dict:
    return {**WEIGHT.codes()._asdict(), "format": "int4", **tensors}


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (changed(values=WEIGHT.values[0]), "values must be [E, N, bytes] of uint8, got [3, 32]"),
        (changed(values=WEIGHT.values.int()), "values must be [E, N, bytes] of uint8"),
        (changed(scales=WEIGHT.scales[:1]), "scales must be [E, N, groups] of torch.bfloat16"),
        (changed(scales=WEIGHT.scales.float()), "of torch.bfloat16 with E, N = [2, 3], got"),
        (changed(zeros=WEIGHT.zeros[..., :0]), "zeros must be [2, 3, 1] of uint8, got [2, 3, 0]"),
        (changed(scales=WEIGHT.scales[..., :0]), "a scale for 32 or 64 or 128 numbers of a row"),
        (changed(values=WEIGHT.values[..., :24]), "not 2 for 48"),
        (changed(scales=WEIGHT.scales * torch.nan), "finite and not zero, got nan at [0, 0, 0]"),
        (changed(scales=WEIGHT.scales * torch.inf), "finite and not zero, got "),
        (changed(scales=WEIGHT.scales * 0), "finite and not zero, got "),
        (changed(format="int5"), "format must be one of ('int8', 'int4', 'mxfp4', 'nf4')"),
        (changed(activations="fp8"), "activations must be one of (None, 'int8')"),
    ],
)
def test_tensors_that_do_not_belong_together(given, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        QuantizedWeight(**given)


@pytest.mark.parametrize(
    ("weight", "options", "error"),
    [
        (torch.ones(2, 3, 48), {"format": "int4"}, "rows of 48 numbers do not divide into groups"),
        (torch.ones(2, 3, 64), {"format": "int4", "group_size": 48}, "has groups of 32 or 64 or"),
        (torch.ones(2, 3, 64), {"format": "nf4", "zero_points": True}, "int4 alone has zero"),
        (torch.ones(3, 64), {"format": "int8"}, "weight must be [E, N, M], got [3, 64]"),
        (torch.full((1, 2, 64), torch.nan), {"format": "int8"}, "infinities or NaN"),
    ],
)
def test_what_cannot_be_quantized(weight, options, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        QuantizedWeight.quantize(weight, **options)


def test_a_state_that_does_not_fit_changes_nothing():
    weight = quantized({"format": "mxfp4"}, 2, 3, 64)
    before = copy.deepcopy(weight.state_dict())
    misfits = {"scales": before["scales"].float(), "values": before["values"][:, :2]}
    for name, tensor in misfits.items():
        with pytest.raises(RuntimeError, match=name):
            weight.load_state_dict(before | {name: tensor})
    with pytest.raises(RuntimeError, match="zeros must not be beside the others"):
        weight.load_state_dict(before | {"zeros": before["scales"]}, strict=False)
    with pytest.raises(RuntimeError, match="scales must be beside the others"):
        weight.load_state_dict({"values": 255 - before["values"]}, strict=False)
    bad = before["scales"].clone()
    bad[1, 2, 0] = 255
    with pytest.raises(RuntimeError, match="finite and not zero"):
        weight.load_state_dict(before | {"scales": bad, "values": 255 - before["values"]})
    assert same(weight.state_dict(), before)


def test_formats_have_as_many_numbers_as_codes():
    for format in FORMATS.values():
        assert len(format.numbers) == (16 if format.bits == 4 else 0)
