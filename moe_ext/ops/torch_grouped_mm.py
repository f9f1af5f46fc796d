"""grouped_mm and grouped_outer where a device has several ways to compute them.

    native     torch's grouped_mm, which reads the experts' bounds on the device
    own        our kernels for tensor cores: tensor_cores.py
    batched    one batched product over [E, C, ...], where there is a capacity
    loop       torch's grouped_mm where it reads the bounds back and takes expert after expert
    reference  the same by reference.py, for what torch's does not take

No row that a route does not own may be let into a product: what such rows hold may be anything, and
a NaN in one row of a 16-bit product has been seen to spoil its neighbours (oneDNN with AMX). The
operators replace such rows, and those of the result. Where they are zero already and nobody reads
those of the result, as inside of feed_forward, `INSIDE` has the same products without a copy.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import codes
from . import reference, tensor_cores
from .contracts import checked

# Whose grouped_mm does not loop over the experts, by major compute capability: torch 2.10 on.
NATIVE_MAJORS = (9, 10)
LEAST_TOO_MANY = 1024  # of groups, for its kernel
_TAKEN = (torch.float32, torch.bfloat16, torch.float16)


def choose(
    rows: Tensor, widths: tuple[int, ...], num_experts: int, capacity: int | None
) -> tuple[str, str]:
    """The path of a product of `rows`, and why it is not an earlier one of the list.

    widths: of both operands' rows or of a weight, N and M
    """
    why_not_own = tensor_cores.why_not(rows, tuple(width for width in widths if width != 1))
    if num_experts == 0:
        why_not_own = "there are no experts"
    if rows.device.type == "cpu":
        if why_not_own is None:
            return "own", "the kernels are emulated"
        return "reference", "without a compiled library the reference runs"
    why: str | None
    takes = False
    if rows.device.type != "cuda":
        why = f"torch has no grouped_mm of its own on {rows.device.type}"
    elif rows.dtype not in _TAKEN:
        why = f"torch's grouped_mm does not take {rows.dtype}"
    # A single column, as a bias has, is widened with zeros.
    elif any(width > 1 and width * rows.element_size() % 16 for width in widths):
        why = f"torch's grouped_mm takes rows of a multiple of 16 bytes, not {widths} values"
    elif why := _why_it_loops(rows):
        takes = True
    elif num_experts >= LEAST_TOO_MANY:
        why = f"torch's kernel takes fewer than {LEAST_TOO_MANY} experts, not {num_experts}"
    if why is None:
        return "native", ""
    if why_not_own is None:
        return "own", why
    why = f"{why}, {why_not_own}"
    if capacity is not None:
        return "batched", why
    return "loop" if takes else "reference", f"{why}, and a plan without capacity has no batches"


def _why_it_loops(rows: Tensor) -> str | None:
    major, minor = torch.cuda.get_device_capability(rows.device)
    if major not in NATIVE_MAJORS:
        return f"torch's grouped_mm loops on compute capability {major}.{minor}"
    if rows.dtype != torch.bfloat16:
        return f"torch's grouped_mm loops for {rows.dtype}"
    return None


def path_of(name: str, args: tuple) -> tuple[str, str]:
    """`choose` for the arguments of an operator."""
    first, second, capacity = args[0], args[1], args[-1]
    if name == "grouped_mm":
        return choose(first, tuple(second.shape[1:]), second.shape[0], capacity)
    if name == "quantized_mm":
        format, transposed = args[-4:-2]
        wide = second.shape[2] * 8 // codes.FORMATS[format].bits
        width = wide if transposed else second.shape[1]
        why = tensor_cores.why_not_packed(first, second, width)
        return ("reference", why) if why else ("own", "torch has no product of packed weights")
    return choose(first, (first.shape[1], second.shape[1]), args[3].shape[0], capacity)


@checked
def grouped_mm(rows, weights, bias, offsets, load, capacity):
    path, _ = path_of("grouped_mm", (rows, weights, capacity))
    mm, _ = PRODUCTS[path]
    if path in WITHOUT_COPIES:
        return mm(rows, weights, bias, offsets, load, capacity)
    owned = _owned(offsets, load, rows.shape[0])
    rows = torch.where(owned, rows, 0)
    return torch.where(owned, mm(rows, weights, bias, offsets, load, capacity), 0)


@checked
def grouped_outer(left, right, offsets, load, capacity):
    path, _ = path_of("grouped_outer", (left, right, offsets, load, capacity))
    _, outer = PRODUCTS[path]
    if path not in WITHOUT_COPIES:
        owned = _owned(offsets, load, left.shape[0])
        left, right = torch.where(owned, left, 0), torch.where(owned, right, 0)
    return outer(left, right, offsets, load, capacity)


@checked
def quantized_mm(rows, *args):
    """By our kernels for tensor cores, or by the reference."""
    path, _ = path_of("quantized_mm", (rows, *args))
    if path == "reference":
        return reference.quantized_mm(rows, *args)
    *others, int8_rows, capacity = args
    if int8_rows:
        rows = codes.round_rows(rows.float()).to(rows.dtype)
    return tensor_cores.operator("quantized_mm")(rows, *others, False, capacity)


def _experts_of_rows(offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Every row's number and its expert, the last one beyond all. [R]"""
    row = torch.arange(num_rows, dtype=torch.int32, device=offsets.device)
    expert = torch.searchsorted(offsets[1:], row, right=True)
    return row, expert.clamp(max=offsets.shape[0] - 2)


def _owned(offsets: Tensor, load: Tensor, num_rows: int) -> Tensor:
    """Whether a route owns a row. [R, 1]"""
    row, expert = _experts_of_rows(offsets, num_rows)
    owned = (row - offsets[expert] < load[expert]) & (row < offsets[-1])
    return owned.unsqueeze(-1)


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


def _grouped_mm(rows, weights, bias, offsets, load, capacity):
    R, (_, N, M) = rows.shape[0], weights.shape
    if 0 in (R, N, M):
        return reference.grouped_mm(rows, weights, bias, offsets, load, capacity)
    rows, weights = _padded(rows, 1).contiguous(), _padded(_padded(weights, 1), 2)
    if not _is_readable(weights):
        weights = weights.clone(memory_format=torch.contiguous_format)
    out = F.grouped_mm(rows, weights.transpose(1, 2), offs=offsets[1:])[:, :N].contiguous()
    if bias is not None:
        out = out + bias[_experts_of_rows(offsets, R)[1]]
    return out


def _grouped_outer(left, right, offsets, load, capacity):
    N, M = left.shape[1], right.shape[1]
    if 0 in (left.shape[0], N, M):
        return left.new_zeros(load.shape[0], N, M)
    left, right = _padded(left, 1).contiguous(), _padded(right, 1).contiguous()
    out = F.grouped_mm(left.t(), right, offs=offsets[1:])
    torch.ops.moe_ext.zero_empty_groups.default(out, offsets)
    return out[:, :N, :M].contiguous()


def _own_mm(rows, weights, bias, offsets, load, capacity):
    N = weights.shape[1]
    if rows.shape[1] == 1 or N == 1:
        rows, weights = _padded(rows, 1), _padded(_padded(weights, 1), 2)
        bias = bias if bias is None else _padded(bias, 1)
    run = tensor_cores.operator("grouped_mm")
    return run(rows, weights, bias, offsets, load, capacity)[:, :N].contiguous()


def _own_outer(left, right, offsets, load, capacity):
    N, M = left.shape[1], right.shape[1]
    run = tensor_cores.operator("grouped_outer")
    out = run(_padded(left, 1), _padded(right, 1), offsets, load, capacity)
    return out[:, :N, :M].contiguous()


def _batched_mm(rows, weights, bias, offsets, load, capacity):
    E, N, M = weights.shape
    out = torch.bmm(rows.view(E, capacity, M), weights.transpose(1, 2))
    if bias is not None:
        out = out + bias.unsqueeze(1)
    return out.view(rows.shape[0], N)


def _batched_outer(left, right, offsets, load, capacity):
    left, right = (rows.reshape(len(load), capacity, rows.shape[1]) for rows in (left, right))
    return torch.bmm(left.transpose(1, 2), right)


def of_all_rows(rows, weights, bias, offsets, load, capacity):
    """grouped_mm for ONNX, which knows neither the number nor the place of an expert's rows: every
    weight multiplies all rows, E times the work."""
    every = rows @ weights.transpose(1, 2)  # [E, R, N]
    if bias is not None:
        every = every + bias.unsqueeze(1)
    row = torch.arange(rows.shape[0], device=rows.device)
    begin, end = offsets[:-1], torch.minimum(offsets[:-1] + load, offsets[1:])
    owned = (row >= begin[:, None]) & (row < end[:, None])  # [E, R]
    return torch.where(owned.unsqueeze(-1), every, 0).sum(dim=0)


# The grouped_mm and the grouped_outer of each path.
PRODUCTS: dict[str, tuple[Callable, Callable]] = {
    "native": (_grouped_mm, _grouped_outer),
    "own": (_own_mm, _own_outer),
    "batched": (_batched_mm, _batched_outer),
    "loop": (_grouped_mm, _grouped_outer),
    "reference": (reference.grouped_mm, reference.grouped_outer),
}

# They leave out by themselves what no route owns.
WITHOUT_COPIES = ("own", "reference")

OPERATORS: dict[str, Callable] = {
    "grouped_mm": grouped_mm,
    "quantized_mm": quantized_mm,
    "grouped_outer": grouped_outer,
}
INSIDE: dict[str, Callable] = {
    "grouped_mm": lambda *args: PRODUCTS[path_of("grouped_mm", args)[0]][0](*args),
    "grouped_outer": lambda *args: PRODUCTS[path_of("grouped_outer", args)[0]][1](*args),
}


def products(rows: Tensor) -> str:
    """How grouped_mm, grouped_outer and feed_forward multiply such rows."""
    return "torch's GEMM"


def zero_empty_groups(sums: Tensor, offsets: Tensor) -> None:
    """Zero sums[e] where expert e has no row, in place. sums: [E, N, M]."""
    sums.masked_fill_((offsets.diff() <= 0)[:, None, None], 0)
