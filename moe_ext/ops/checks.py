"""What each operator asks of its arguments, in the words of csrc/check.h and csrc/args.h.

The reference and the fakes call these, so that a wrong argument gives the same error on every
backend and at compile time as in the compiled kernels.
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
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Dims = Sequence[tuple[str, int | None]]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that weights, probabilities and sums have beside a tensor of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dropless_rows(num_routes: int, num_experts: int, align: int) -> int:
    """Rows of a plan without capacity: known from shapes, enough for any routing."""
    if align == 1:
        return num_routes
    used = torch.sym_min(num_experts, num_routes)
    return (num_routes + used * (align - 1)) // align * align


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
        if not isinstance(tensor, Tensor):
            self.fail(f"{name} must be a tensor, got {type(tensor).__name__}")
        fits = tensor.dim() == len(dims) and all(
            size is None or actual == size
            for actual, (_, size) in zip(tensor.shape, dims, strict=True)
        )
        if fits:
            return
        letters = ", ".join(letter for letter, _ in dims)
        known = ", ".join(f"{letter} = {size}" for letter, size in dims if size is not None)
        known = f" with {known}" if known else ""
        if like is not None:
            known += f" like the plan's {like[0]} {list(like[1].shape)}"
        self.fail(f"{name} must be [{letters}]{known}, got {list(tensor.shape)}")

    def dtype(self, name: str, tensor: Tensor, expected: torch.dtype) -> None:
        if tensor.dtype != expected:
            self.fail(f"{name} must be {_dtype_name(expected)}, got {_dtype_name(tensor.dtype)}")

    def same_dtype(self, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
        if tensor.dtype != other.dtype:
            self.fail(
                f"{name} must be {_dtype_name(other.dtype)} like {other_name}, "
                f"got {_dtype_name(tensor.dtype)}"
            )

    def floating(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in FLOATING:
            self.fail(
                f"{name} must be float32, float64, bfloat16 or float16, "
                f"got {_dtype_name(tensor.dtype)}"
            )

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
            listed = ", ".join(allowed[:-1]) + f" or {allowed[-1]}"
            self.fail(f"{name} must be {listed}, got {value}")


def gate(
    logits: Tensor,
    choice_scores: Tensor | None,
    k: int,
    scoring: str,
    normalize: bool,
    scale: float,
) -> None:
    check = Check("gate")
    check.shape("logits", logits, [("T", None), ("E", None)])
    check.floating("logits", logits)
    T, E = logits.shape
    if k < 1 or k > E:
        check.fail(f"k must be in 1..E with E = {E}, got {k}")
    check.int32_size("T * K", T * k)
    if choice_scores is not None:
        check.shape("choice_scores", choice_scores, [("T", T), ("E", E)])
        check.same_dtype("choice_scores", choice_scores, "logits", logits)
        check.same_device("choice_scores", choice_scores, "logits", logits)
    check.finite("scale", scale)
    check.one_of("scoring", scoring, SCORINGS)


def gate_backward(
    grad_weights: Tensor | None,
    grad_probs: Tensor | None,
    grad_importance: Tensor | None,
    probs: Tensor,
    expert_ids: Tensor,
    scoring: str,
    normalize: bool,
    scale: float,
) -> None:
    check = Check("gate_backward")
    check.shape("probs", probs, [("T", None), ("E", None)])
    check.floating("probs", probs)
    check.dtype("probs", probs, accumulate_dtype(probs.dtype))
    T, E = probs.shape
    check.shape("expert_ids", expert_ids, [("T", T), ("K", None)])
    check.dtype("expert_ids", expert_ids, torch.int32)
    check.same_device("expert_ids", expert_ids, "probs", probs)
    grads: list[tuple[str, Tensor | None, Dims]] = [
        ("grad_weights", grad_weights, [("T", T), ("K", expert_ids.shape[1])]),
        ("grad_probs", grad_probs, [("T", T), ("E", E)]),
        ("grad_importance", grad_importance, [("E", E)]),
    ]
    for name, grad, dims in grads:
        if grad is not None:
            check.shape(name, grad, dims)
            check.same_dtype(name, grad, "probs", probs)
            check.same_device(name, grad, "probs", probs)
    check.finite("scale", scale)
    check.one_of("scoring", scoring, SCORINGS)


def plan(
    expert_ids: Tensor,
    priority: Tensor | None,
    num_experts: int,
    capacity: int | None,
    order: str,
    align: int,
) -> None:
    check = Check("plan")
    check.shape("expert_ids", expert_ids, [("T", None), ("K", None)])
    check.dtype("expert_ids", expert_ids, torch.int32)
    T, K = expert_ids.shape
    check.int32_size("T * K", T * K)
    if priority is not None:
        check.shape("priority", priority, [("T", T), ("K", K)])
        check.dtype("priority", priority, torch.float32)
        check.same_device("priority", priority, "expert_ids", expert_ids)
    if num_experts < 1:
        check.fail(f"num_experts must be at least 1, got {num_experts}")
    check.int32_size("num_experts", num_experts)
    check.one_of("order", order, ORDERS)
    if align < 1:
        check.fail(f"align must be at least 1, got {align}")
    check.int32_size("align", align)
    if capacity is not None:
        if capacity < 0:
            check.fail(f"capacity must not be negative, got {capacity}")
        check.int32_size("capacity", capacity)
        if align != 1:
            check.fail(f"align must be 1 where there is a capacity, got {align}")
    rows = dropless_rows(T * K, num_experts, align) if capacity is None else num_experts * capacity
    check.int32_size("rows", rows)


def mask_weights(
    weights: Tensor,
    slots: Tensor,
    normalize: bool,
    eps: float,
    scale: float,
    op: str = "mask_weights",
) -> None:
    check = Check(op)
    check.shape("weights", weights, [("T", None), ("K", None)])
    check.floating("weights", weights)
    check.dtype("weights", weights, accumulate_dtype(weights.dtype))
    check.shape("slots", slots, [("T", None), ("K", None)])
    check.dtype("slots", slots, torch.int32)
    check.same_device("slots", slots, "weights", weights)
    T, K = slots.shape
    check.int32_size("T * K", T * K)
    check.shape("weights", weights, [("T", T), ("K", K)], ("slots", slots))
    check.finite("eps", eps)
    check.finite("scale", scale)


def mask_weights_backward(
    grad: Tensor, weights: Tensor, slots: Tensor, normalize: bool, eps: float, scale: float
) -> None:
    op = "mask_weights_backward"
    mask_weights(weights, slots, normalize, eps, scale, op)
    check = Check(op)
    check.shape("grad", grad, [("T", weights.shape[0]), ("K", weights.shape[1])])
    check.same_dtype("grad", grad, "weights", weights)
    check.same_device("grad", grad, "weights", weights)


def _routes(
    check: Check,
    matrices: Sequence[tuple[str, Tensor, str, str]],
    slots: Tensor,
    sources: Tensor,
    weights: Tensor | None,
) -> None:
    """slots [T, K] and sources [R] of a plan, the matrices that it moves, and weights [T, K].

    matrices: (name, tensor, "T" or "R", the letter of its width); the first gives dtype and device

    The plan is made first, so an argument that does not fit it is at fault.
    """
    name, like, *_ = matrices[0]
    check.shape("slots", slots, [("T", None), ("K", None)])
    check.dtype("slots", slots, torch.int32)
    check.same_device("slots", slots, name, like)
    T, K = slots.shape
    check.int32_size("T * K", T * K)
    check.shape("sources", sources, [("R", None)])
    check.dtype("sources", sources, torch.int32)
    check.same_device("sources", sources, name, like)
    check.int32_size("rows", sources.shape[0])
    of_plan = {"T": ("slots", slots), "R": ("sources", sources)}
    for moved, tensor, height, width in matrices:
        size = of_plan[height][1].shape[0]
        check.shape(moved, tensor, [(height, size), (width, None)], of_plan[height])
    if weights is not None:
        check.shape("weights", weights, [("T", T), ("K", K)], of_plan["T"])
        check.dtype("weights", weights, accumulate_dtype(like.dtype))
        check.same_device("weights", weights, name, like)


def dispatch(tokens: Tensor, slots: Tensor, sources: Tensor, weights: Tensor | None) -> None:
    check = Check("dispatch")
    check.shape("tokens", tokens, [("T", None), ("H", None)])
    check.floating("tokens", tokens)
    _routes(check, [("tokens", tokens, "T", "H")], slots, sources, weights)


def combine(rows: Tensor, slots: Tensor, sources: Tensor, weights: Tensor | None) -> None:
    check = Check("combine")
    check.shape("rows", rows, [("R", None), ("H", None)])
    check.floating("rows", rows)
    _routes(check, [("rows", rows, "R", "H")], slots, sources, weights)


def plan_values(expert_ids: Tensor, num_experts: int) -> None:
    """What the CPU checks beside shapes: an id is -1 or an expert's."""
    bad = ((expert_ids < -1) | (expert_ids >= num_experts)).nonzero()
    if len(bad):
        t, k = bad[0].tolist()
        Check("plan").fail(
            f"expert_ids must be in -1..E-1 with E = {num_experts}, "
            f"got {expert_ids[t, k]} at [{t}, {k}]"
        )


def route_values(op: str, slots: Tensor, sources: Tensor) -> None:
    """What the CPU checks beside shapes: every slot is -1 or the row that sources gives back."""
    R = sources.shape[0]
    route = torch.arange(slots.numel()).view(slots.shape)
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
    """What the CPU checks beside shapes: every source is -1 or the route that slots gives back."""
    N = slots.numel()
    has_route = (sources >= 0) & (sources < N)
    back = torch.cat([slots.reshape(-1), slots.new_full((1,), -1)])
    back = back[torch.where(has_route, sources, N)]
    row = torch.arange(sources.shape[0])
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


def route_dot(tokens: Tensor, rows: Tensor, slots: Tensor, sources: Tensor) -> None:
    _tokens_and_rows("route_dot", tokens, rows, slots, sources, None)


def combine_backward(
    tokens: Tensor, rows: Tensor, slots: Tensor, sources: Tensor, weights: Tensor
) -> None:
    _tokens_and_rows("combine_backward", tokens, rows, slots, sources, weights)


def _tokens_and_rows(
    op: str, tokens: Tensor, rows: Tensor, slots: Tensor, sources: Tensor, weights: Tensor | None
) -> None:
    check = Check(op)
    check.shape("tokens", tokens, [("T", None), ("H", None)])
    check.floating("tokens", tokens)
    check.shape("rows", rows, [("R", None), ("H", tokens.shape[1])])
    check.same_dtype("rows", rows, "tokens", tokens)
    check.same_device("rows", rows, "tokens", tokens)
    matrices = [("tokens", tokens, "T", "H"), ("rows", rows, "R", "H")]
    _routes(check, matrices, slots, sources, weights)


def groups(check: Check, name: str, like: Tensor, offsets: Tensor, load: Tensor) -> None:
    """offsets [E+1] and load [E] of a plan, beside a tensor that gives the device."""
    check.shape("load", load, [("E", None)])
    check.dtype("load", load, torch.int32)
    check.same_device("load", load, name, like)
    check.shape("offsets", offsets, [("E+1", load.shape[0] + 1)])
    check.dtype("offsets", offsets, torch.int32)
    check.same_device("offsets", offsets, name, like)


def group_values(op: str, offsets: list[int], load: list[int], num_rows: int) -> None:
    """What the CPU checks beside shapes: offsets rise from 0, no load is negative."""
    previous = 0
    for e, offset in enumerate(offsets):
        if offset < previous or offset > num_rows or (e == 0 and offset != 0):
            Check(op).fail(
                f"offsets must rise from 0 to at most R = {num_rows}, got {offset} at [{e}]"
            )
        previous = offset
    for e, count in enumerate(load):
        if count < 0:
            Check(op).fail(f"load must not be negative, got {count} at [{e}]")


def planned_capacity(check: Check, capacity: int | None, num_rows: int, num_experts: int) -> None:
    """A plan's capacity says what its offsets are: e * capacity."""
    if capacity is not None and capacity * num_experts != num_rows:
        check.fail(f"capacity must be R / E with R = {num_rows}, E = {num_experts}, got {capacity}")


def grouped_mm(
    rows: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    load: Tensor,
    capacity: int | None,
) -> None:
    check = Check("grouped_mm")
    check.shape("rows", rows, [("R", None), ("M", None)])
    check.floating("rows", rows)
    check.shape("weights", weights, [("E", None), ("N", None), ("M", rows.shape[1])])
    check.same_dtype("weights", weights, "rows", rows)
    check.same_device("weights", weights, "rows", rows)
    if bias is not None:
        check.shape("bias", bias, [("E", weights.shape[0]), ("N", weights.shape[1])])
        check.same_dtype("bias", bias, "rows", rows)
        check.same_device("bias", bias, "rows", rows)
    groups(check, "rows", rows, offsets, load)
    E = load.shape[0]
    check.shape("weights", weights, [("E", E), ("N", None), ("M", None)], ("load", load))
    planned_capacity(check, capacity, rows.shape[0], E)


def grouped_outer(
    left: Tensor, right: Tensor, offsets: Tensor, load: Tensor, capacity: int | None
) -> None:
    check = Check("grouped_outer")
    check.shape("left", left, [("R", None), ("N", None)])
    check.floating("left", left)
    check.shape("right", right, [("R", left.shape[0]), ("M", None)])
    check.same_dtype("right", right, "left", left)
    check.same_device("right", right, "left", left)
    groups(check, "left", left, offsets, load)
    planned_capacity(check, capacity, left.shape[0], load.shape[0])


def activate(
    pre_activation: Tensor,
    slots: Tensor,
    sources: Tensor,
    weights: Tensor | None,
    activation: str,
    op: str = "activate",
) -> int:
    """Returns F."""
    check = Check(op)
    check.shape("pre_activation", pre_activation, [("R", None), ("G", None)])
    check.floating("pre_activation", pre_activation)
    _routes(check, [("pre_activation", pre_activation, "R", "G")], slots, sources, weights)
    if activation not in ACTIVATIONS:
        check.fail(f"activation must be swiglu, geglu, gelu or relu, got {activation}")
    if activation not in GATED:
        return pre_activation.shape[1]
    if pre_activation.shape[1] % 2 != 0:
        check.fail(f"pre_activation must be [R, 2F], got [R, {pre_activation.shape[1]}]")
    return pre_activation.shape[1] // 2


def activate_backward(
    grad: Tensor,
    pre_activation: Tensor,
    slots: Tensor,
    sources: Tensor,
    weights: Tensor,
    activation: str,
) -> None:
    op = "activate_backward"
    F = activate(pre_activation, slots, sources, weights, activation, op)
    check = Check(op)
    check.shape("grad", grad, [("R", pre_activation.shape[0]), ("F", F)])
    check.same_dtype("grad", grad, "pre_activation", pre_activation)
    check.same_device("grad", grad, "pre_activation", pre_activation)


def feed_forward(
    tokens: Tensor,
    num_experts: int,
    up: Tensor,
    down: Tensor,
    activation: str,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> None:
    """The shapes of an expert's parameters; dtypes are the operators' matter, after autocast."""
    check = Check("feed_forward")
    check.shape("tokens", tokens, [("T", None), ("H", None)])
    if activation not in ACTIVATIONS:
        check.fail(f"activation must be swiglu, geglu, gelu or relu, got {activation}")
    E, H = ("E", num_experts), ("H", tokens.shape[1])
    check.shape("up", up, [E, ("G", None), H])
    G = up.shape[1]
    if activation in GATED and G % 2 != 0:
        check.fail(f"up must be [E, 2F, H], got {list(up.shape)}")
    check.shape("down", down, [E, H, ("F", G // 2 if activation in GATED else G)])
    if up_bias is not None:
        check.shape("up_bias", up_bias, [E, ("G", G)])
    if down_bias is not None:
        check.shape("down_bias", down_bias, [E, H])
