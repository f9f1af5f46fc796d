"""Error texts and the checks of values that shapes do not show.

A text names the operator, the argument, the contract and what came, in the words of csrc/check.h.
"""

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from .. import options

INT32_MAX = 2**31 - 1
SCORINGS = get_args(options.Scoring)
ORDERS = get_args(options.Order)
GATED = get_args(options.GatedActivation)
ACTIVATIONS = get_args(options.Activation)
FORMATS = get_args(options.WeightFormat)
NAMES = {"scoring": SCORINGS, "order": ORDERS, "activation": ACTIVATIONS, "format": FORMATS}
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Dims = Sequence[tuple[str, int | None]]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that weights, probabilities and sums have beside a tensor of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), which takes longer than to see that there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def is_transposed(weights: Tensor) -> bool:
    """Whether weights [E, N, M] are a view of [E, M, N]."""
    return weights.stride(1) < weights.stride(2)


def dropless_rows(num_routes: int, num_experts: int, align: int) -> int:
    """Rows of a plan without capacity: known from shapes, enough for any routing."""
    if align == 1:
        return num_routes
    used = torch.sym_min(num_experts, num_routes)
    return (num_routes + used * (align - 1)) // align * align


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def shape_of(value: object) -> list[int] | str:
    """The shape of a tensor; the type of anything else. For error texts."""
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__


def fits(tensor: Tensor, dims: Dims) -> bool:
    if tensor.dim() != len(dims):
        return False
    for actual, (_, size) in zip(tensor.shape, dims, strict=True):
        if size is not None and actual != size:
            return False
    return True


class Check:
    """Raises a RuntimeError that names the operator, the argument, the contract and what came."""

    def __init__(self, op: str) -> None:
        self.op = op

    def fail(self, text: str) -> None:
        raise RuntimeError(f"{self.op}: {text}")

    def shape(
        self, name: str, tensor: Tensor, dims: Dims, like: tuple[str, Tensor] | None = None
    ) -> None:
        """like: name and value of a plan's tensor that gives the sizes"""
        self.is_tensor(name, tensor)
        if not fits(tensor, dims):
            self.wrong_shape(name, tensor, dims, like)

    def is_tensor(self, name: str, value: object) -> None:
        if not isinstance(value, Tensor):
            self.fail(f"{name} must be a tensor, got {type(value).__name__}")

    def wrong_shape(
        self, name: str, tensor: Tensor, dims: Dims, like: tuple[str, Tensor] | None
    ) -> None:
        letters = ", ".join(letter for letter, _ in dims)
        known = ", ".join(f"{letter} = {size}" for letter, size in dims if size is not None)
        known = f" with {known}" if known else ""
        if like is not None:
            known += f" like the plan's {like[0]} {list(like[1].shape)}"
        self.fail(f"{name} must be [{letters}]{known}, got {list(tensor.shape)}")

    def dtype(self, name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
        if tensor.dtype not in allowed:
            listed = _listed([_dtype_name(dtype) for dtype in allowed])
            self.fail(f"{name} must be {listed}, got {_dtype_name(tensor.dtype)}")

    def same_dtype(self, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
        if tensor.dtype != other.dtype:
            self.fail(
                f"{name} must be {_dtype_name(other.dtype)} like {other_name}, "
                f"got {_dtype_name(tensor.dtype)}"
            )

    def floating(self, name: str, tensor: Tensor) -> None:
        self.dtype(name, tensor, *FLOATING)

    def same_device(self, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
        if tensor.device != other.device:
            self.fail(f"{name} must be on {other.device} like {other_name}, got {tensor.device}")

    def finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            self.fail(f"{name} must be finite, got {value}")

    def int32_size(self, what: str, size: int) -> None:
        # A size that is not known yet is checked by the kernel: here it would become a guard.
        if isinstance(size, int) and size > INT32_MAX:
            self.fail(f"{what} must be below 2147483648, got {size}")

    def one_of(self, name: str, value: str, allowed: Sequence[str]) -> None:
        if value not in allowed:
            self.fail(f"{name} must be {_listed(allowed)}, got {value}")


_HAS_FLAG = hasattr(torch.compiler, "_is_exporting_flag")


def is_exporting() -> bool:
    """Whether torch.export traces; torch.compiler's own says so of torch.compile too in 2.10."""
    return torch.compiler._is_exporting_flag if _HAS_FLAG else torch.compiler.is_exporting()


def is_exporting_to_onnx() -> bool:
    return is_exporting() and torch.onnx.is_in_onnx_export()


NO_TORCHSCRIPT = (
    "moe_ext does not run in TorchScript (torch.jit.trace, torch.jit.script, torch.onnx.export "
    "with dynamo=False); use torch.export, torch.compile, or torch.onnx.export with dynamo=True"
)


def refuse_torchscript(*_) -> None:
    """The `__prepare_scriptable__` of modules, which torch.jit.script calls."""
    raise RuntimeError(NO_TORCHSCRIPT)


def expert_values(op: str, expert_ids: Tensor, num_experts: int) -> None:
    """On the CPU an id must be -1 or an expert's."""
    if is_exporting_to_onnx():  # its graphs do not raise
        return
    bad = ((expert_ids < -1) | (expert_ids >= num_experts)).nonzero()
    if len(bad):
        t, k = bad[0].tolist()
        Check(op).fail(
            f"expert_ids must be in -1..E-1 with E = {num_experts}, "
            f"got {expert_ids[t, k]} at [{t}, {k}]"
        )


def route_values(op: str, slots: Tensor, sources: Tensor) -> None:
    """On the CPU every slot must be -1 or the row that sources gives back."""
    R = sources.shape[0]
    route = torch.arange(slots.numel(), device=slots.device).view(slots.shape)
    has_row = (slots >= 0) & (slots < R)
    # A last entry stands for every slot without a row.
    back = torch.cat([sources, sources.new_full((1,), -1)])[torch.where(has_row, slots, R)]
    bad = ((slots != -1) & ~(has_row & (back == route))).nonzero()
    if len(bad):
        t, k = bad[0].tolist()
        slot = int(slots[t, k])
        if not -1 <= slot < R:
            Check(op).fail(f"slots must be in -1..R-1 with R = {R}, got {slot} at [{t}, {k}]")
        Check(op).fail(
            f"slots and sources must be of one plan, got slot {slot} at [{t}, {k}], "
            "which sources gives to another route"
        )


def source_values(op: str, slots: Tensor, sources: Tensor) -> None:
    """On the CPU every source must be -1 or the route that slots gives back."""
    N = slots.numel()
    has_route = (sources >= 0) & (sources < N)
    back = torch.cat([slots.reshape(-1), slots.new_full((1,), -1)])
    back = back[torch.where(has_route, sources, N)]
    row = torch.arange(sources.shape[0], device=sources.device)
    bad = ((sources != -1) & ~(has_route & (back == row))).nonzero()
    if len(bad):
        r = int(bad[0])
        route = int(sources[r])
        if not -1 <= route < N:
            Check(op).fail(f"sources must be in -1..T*K-1 with T*K = {N}, got {route} at [{r}]")
        Check(op).fail(
            f"slots and sources must be of one plan, got route {route} at sources[{r}], "
            "which slots gives to another row"
        )


def owned_rows(op: str, offsets: Tensor, load: Tensor, num_rows: int) -> list[tuple[int, int]]:
    """The range of rows that routes own, for every expert; both tensors are read at once.

    Offsets must rise from 0, and no load may be negative.
    """
    numbers = torch.cat([offsets, load]).tolist()
    bounds, counts = numbers[: len(offsets)], numbers[len(offsets) :]
    previous = 0
    for e, offset in enumerate(bounds):
        if offset < previous or offset > num_rows or (e == 0 and offset != 0):
            Check(op).fail(
                f"offsets must rise from 0 to at most R = {num_rows}, got {offset} at [{e}]"
            )
        previous = offset
    for e, count in enumerate(counts):
        if count < 0:
            Check(op).fail(f"load must not be negative, got {count} at [{e}]")
    ends = zip(bounds[:-1], bounds[1:], counts, strict=True)
    return [(begin, begin + min(count, end - begin)) for begin, end, count in ends]


def planned_capacity(check: Check, capacity: int | None, num_rows: int, num_experts: int) -> None:
    """A plan's capacity says what its offsets are: e * capacity."""
    if capacity is not None and capacity * num_experts != num_rows:
        check.fail(f"capacity must be R / E with R = {num_rows}, E = {num_experts}, got {capacity}")
