"""grouped_mm and grouped_outer by torch's own products, where no kernel of ours is compiled.

    native   torch's grouped_mm, which reads the experts' bounds on the device
    batched  one batched product over [E, C, ...], where there is a capacity
    loop     the reference, a product for every expert: the bounds are read back to the host

No row that a route does not own is let into a product: what such rows hold may be anything, and a
NaN in one row of a 16-bit product has been seen to spoil its neighbours (oneDNN with AMX).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference
from .contracts import checked

# Whose grouped_mm does not loop over the experts, by major compute capability: torch 2.10 on.
NATIVE_MAJORS = (9, 10)


def choose(rows: Tensor, widths: tuple[int, ...], capacity: int | None) -> tuple[str, str]:
    """The path of a product of `rows`, and why it is not an earlier one of the list.

    widths: of both operands' rows or of a weight, N and M
    """
    why = _why_not_native(rows, widths)
    if why is None:
        return "native", ""
    if rows.device.type == "cpu":
        return "loop", "without a compiled library the reference runs"
    if capacity is not None:
        return "batched", why
    return "loop", f"{why}, and a plan without capacity has no batches"


def _why_not_native(rows: Tensor, widths: tuple[int, ...]) -> str | None:
    if rows.device.type != "cuda":
        return f"torch has no grouped_mm of its own on {rows.device.type}"
    major, minor = torch.cuda.get_device_capability(rows.device)
    if major not in NATIVE_MAJORS:
        return f"torch's grouped_mm loops on compute capability {major}.{minor}"
    if rows.dtype != torch.bfloat16:
        return f"torch's grouped_mm takes bfloat16, not {rows.dtype}"
    # A single column, as a bias has, is widened with zeros.
    if any(width > 1 and width * rows.element_size() % 16 for width in widths):
        return f"torch's grouped_mm takes rows of a multiple of 16 bytes, not {widths} values"
    return None


@checked
def grouped_mm(
    rows: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    load: Tensor,
    capacity: int | None,
) -> Tensor:
    path, _ = choose(rows, weights.shape[1:], capacity)
    return MM[path](rows, weights, bias, offsets, load, capacity)


@checked
def grouped_outer(
    left: Tensor, right: Tensor, offsets: Tensor, load: Tensor, capacity: int | None
) -> Tensor:
    path, _ = choose(left, (left.shape[1], right.shape[1]), capacity)
    return OUTER[path](left, right, offsets, load, capacity)


def _owners(offsets: Tensor, load: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The expert of every row [R], and whether a route owns it [R, 1]."""
    row = torch.arange(num_rows, dtype=torch.int32, device=offsets.device)
    expert = torch.searchsorted(offsets[1:], row, right=True).clamp(max=load.shape[0] - 1)
    place = row - offsets[expert]
    owned = (place < load[expert]) & (row < offsets[-1])
    return expert, owned.unsqueeze(-1)


def _padded(matrix: Tensor, dim: int) -> Tensor:
    """A single column of torch's grouped_mm as eight, the others zero."""
    if matrix.shape[dim] > 1:
        return matrix
    return torch.cat(
        [matrix, matrix.new_zeros(*matrix.shape[:dim], 7, *matrix.shape[dim + 1 :])], dim
    )


def _is_readable(weights: Tensor) -> bool:
    """By torch's grouped_mm: dense one way or the other, everything at multiples of 16 bytes."""
    strides = [stride * weights.element_size() for stride in weights.stride() if stride != 1]
    is_aligned = weights.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides)
    return is_aligned and 1 in weights.stride()[1:]


def _native_mm(rows, weights, bias, offsets, load, capacity):
    R, (_, N, M) = rows.shape[0], weights.shape
    if 0 in (R, N, M):
        return reference.grouped_mm(rows, weights, bias, offsets, load, capacity)
    expert, owned = _owners(offsets, load, R)
    rows = torch.where(owned, rows, 0)
    rows, weights = _padded(rows, 1).contiguous(), _padded(_padded(weights, 1), 2)
    if not _is_readable(weights):
        weights = weights.clone(memory_format=torch.contiguous_format)
    out = F.grouped_mm(rows, weights.transpose(1, 2), offs=offsets[1:])[:, :N]
    if bias is not None:
        out = out + bias[expert]
    return torch.where(owned, out, 0)


def _native_outer(left, right, offsets, load, capacity):
    N, M = left.shape[1], right.shape[1]
    if 0 in (left.shape[0], N, M):
        return left.new_zeros(load.shape[0], N, M)
    _, owned = _owners(offsets, load, left.shape[0])
    left, right = torch.where(owned, left, 0), torch.where(owned, right, 0)
    left, right = _padded(left, 1).contiguous(), _padded(right, 1).contiguous()
    out = F.grouped_mm(left.t(), right, offs=offsets[1:])[:, :N, :M]
    return torch.where((offsets.diff() > 0)[:, None, None], out, 0)


def _batched_mm(rows, weights, bias, offsets, load, capacity):
    E, N, M = weights.shape
    _, owned = _owners(offsets, load, rows.shape[0])
    rows = torch.where(owned, rows, 0)
    out = torch.bmm(rows.view(E, capacity, M), weights.transpose(1, 2))
    if bias is not None:
        out = out + bias.unsqueeze(1)
    return torch.where(owned, out.view(rows.shape[0], N), 0)


def _batched_outer(left, right, offsets, load, capacity):
    _, owned = _owners(offsets, load, left.shape[0])
    left, right = torch.where(owned, left, 0), torch.where(owned, right, 0)
    left, right = (rows.view(len(load), capacity, rows.shape[1]) for rows in (left, right))
    return torch.bmm(left.transpose(1, 2), right)


MM = {"native": _native_mm, "batched": _batched_mm, "loop": reference.grouped_mm}
OUTER = {"native": _native_outer, "batched": _batched_outer, "loop": reference.grouped_outer}

OPERATORS: dict[str, Callable] = {"grouped_mm": grouped_mm, "grouped_outer": grouped_outer}
