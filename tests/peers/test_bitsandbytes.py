"""NF4 as bitsandbytes has it."""

import pytest
import torch
from bitsandbytes import functional

from moe_ext import QuantizedWeight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_theirs_bit_for_bit(dtype):
    weight = torch.randn(2 * 5, 192).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    theirs = functional.dequantize_4bit(packed, state)
    ours = QuantizedWeight.from_nf4(packed, state.absmax, (2, 5, 192))
    assert torch.equal(ours.dequantize(dtype).view_as(theirs), theirs)


def test_codes_of_floats_are_theirs():
    weight = torch.randn(2 * 5, 192)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    theirs = QuantizedWeight.from_nf4(packed, state.absmax, (2, 5, 192))
    ours = QuantizedWeight.quantize(weight.view(2, 5, 192), "nf4")
    assert torch.equal(ours.values, theirs.values)
    assert torch.equal(ours.scales, theirs.scales)
