"""What runs in `torch.onnx.export(..., dynamo=True)`: torch's operators, mostly of reference.py.

Of an expert's rows ONNX knows neither the number nor the place, so a product multiplies all rows by
every expert's weight: E / K times the work of the operator. Weights in a format have no form in
ONNX: an export names quantized_mm as what it does not know.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from . import composed, reference


def _grouped_mm(rows, weights, bias, offsets, load, capacity) -> Tensor:
    every = rows @ weights.transpose(1, 2)  # [E, R, N]
    if bias is not None:
        every = every + bias.unsqueeze(1)
    row = torch.arange(rows.shape[0], device=rows.device)
    begin, end = offsets[:-1], torch.minimum(offsets[:-1] + load, offsets[1:])
    owned = (row >= begin[:, None]) & (row < end[:, None])  # [E, R]
    return torch.where(owned.unsqueeze(-1), every, 0).sum(dim=0)


def _composed(name: str) -> Callable:
    return lambda *args: composed.OPERATORS[name](_run, *args)


# The reference without its checks of values, which ONNX cannot raise.
_PURE = "gate", "plan", "mask_weights", "dispatch", "combine", "route_dot", "activate"
FUNCTIONS: dict[str, Callable] = {
    **{name: inspect.unwrap(getattr(reference, name)) for name in _PURE},
    **{name: _composed(name) for name in ("balance", "feed_forward")},
    "grouped_mm": _grouped_mm,
}


def _run(name: str, *args):
    return FUNCTIONS[name](*args)
