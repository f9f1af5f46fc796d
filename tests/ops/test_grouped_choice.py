"""Who multiplies the experts' rows on a device."""

import pytest
import torch

from moe_ext.ops import tensor_cores, torch_grouped_mm


class Fake:
    """A tensor's answers, of a device that is not here."""

    def __init__(self, device, dtype):
        self.device, self.dtype = torch.device(device), dtype

    def element_size(self):
        return self.dtype.itemsize


LOOP, NONE = "loops on compute capability 8.6", "without capacity has no batches"
TOO_MANY = "fewer than 1024 experts"


@pytest.mark.parametrize(
    ("gpu", "dtype", "widths", "E", "capacity", "path", "why"),
    [
        ((9, 0), torch.bfloat16, (8, 16), 4, None, "native", ""),
        ((10, 0), torch.bfloat16, (8, 16), 1023, 4, "native", ""),
        ((9, 0), torch.bfloat16, (8, 16), 1024, 4, "batched", TOO_MANY),
        ((9, 0), torch.bfloat16, (8, 16), 1024, None, "reference", TOO_MANY),
        ((8, 6), torch.bfloat16, (8, 16), 4, 4, "batched", LOOP),
        ((8, 6), torch.bfloat16, (8, 16), 4, None, "loop", NONE),
        ((7, 5), torch.float16, (8, 16), 4, None, "loop", NONE),
        ((12, 0), torch.bfloat16, (8, 16), 4, 4, "batched", "capability 12.0"),
        ((9, 0), torch.float16, (8, 16), 4, 4, "batched", "loops for torch.float16"),
        ((9, 0), torch.float32, (8, 16), 4, None, "loop", "loops for torch.float32"),
        ((9, 0), torch.float64, (8, 16), 4, None, "reference", "not take torch.float64"),
        ((9, 0), torch.bfloat16, (12, 16), 4, 4, "batched", "not (12, 16) values"),
        ((9, 0), torch.bfloat16, (12, 16), 4, None, "reference", "not (12, 16) values"),
        ((9, 0), torch.bfloat16, (16, 1), 4, None, "native", ""),  # of a bias
        ("mps", torch.float32, (8, 16), 4, 4, "batched", "no grouped_mm of its own on mps"),
        ("cpu", torch.float32, (8, 16), 4, 4, "reference", "the reference runs"),
    ],
)
def test_the_path_of_a_device(monkeypatch, gpu, dtype, widths, E, capacity, path, why):
    """gpu: a compute capability, or the name of another device"""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu)
    monkeypatch.setattr(tensor_cores, "is_built", lambda device_type: False)
    operand = Fake("cuda" if isinstance(gpu, tuple) else gpu, dtype)
    chosen, reason = torch_grouped_mm.choose(operand, widths, E, capacity)
    assert chosen == path
    assert why in reason


@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.parametrize(
    ("capability", "dtype", "widths", "E", "path", "why"),
    [
        ((8, 0), torch.bfloat16, (8, 16), 4, "own", "loops on compute capability 8.0"),
        ((8, 9), torch.float16, (8, 16), 2000, "own", "loops on compute capability 8.9"),
        ((12, 0), torch.float32, (4, 12), 4, "own", "loops on compute capability 12.0"),
        ((9, 0), torch.float16, (8, 16), 4, "own", "loops for torch.float16"),
        ((9, 0), torch.float32, (8, 1), 4, "own", "loops for torch.float32"),
        ((9, 0), torch.bfloat16, (8, 16), 1024, "own", TOO_MANY),
        ((9, 0), torch.bfloat16, (8, 16), 4, "native", ""),
        ((7, 5), torch.float16, (8, 16), 4, "loop", "compute capability 8.0, not 7.5"),
        ((8, 0), torch.float64, (8, 16), 4, "reference", "ours do not take torch.float64"),
        ((8, 0), torch.bfloat16, (12, 16), 4, "reference", "16 bytes, not (12, 16) values"),
    ],
)
def test_who_has_tensor_cores(monkeypatch, capability, dtype, widths, E, capacity, path, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(tensor_cores, "is_built", lambda device_type: True)
    chosen, reason = torch_grouped_mm.choose(Fake("cuda", dtype), widths, E, capacity)
    without_batches = path in ("own", "native") or capacity is None
    assert chosen == (path if without_batches else "batched")
    assert why in reason
