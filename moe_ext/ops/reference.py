"""The operators in plain PyTorch: their definition, and the code that runs without a kernel.

Written to be read and to be right, not to be fast. Output shapes follow from input shapes. Off the
CPU nothing is read back to the host, except in `grouped_mm` and `grouped_outer`, which loop over
the experts' rows.

Letters: T tokens, K choices, E experts, R rows, H hidden, N and M the widths of an expert's weight.
A route is a (token, choice) pair, numbered t * K + k. Ids, slots, sources, offsets and load are
int32.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import codes
from . import checks, composed
from .contracts import checked


def stable_order(keys: Tensor, descending: bool = False) -> Tensor:
    """The indices of a stable sort along the last dimension."""
    # In ONNX torch.sort becomes TopK, which is stable; there is none for a stable torch.sort.
    how: dict = {} if checks.is_exporting_to_onnx() else {"stable": True}
    return torch.sort(keys, dim=-1, descending=descending, **how).indices


def scored(logits: Tensor, scoring: str) -> Tensor:
    """The score of every expert."""
    if scoring == "softmax":
        return logits.softmax(dim=-1)
    if scoring == "sigmoid":
        return logits.sigmoid()
    return torch.logaddexp(logits, torch.zeros_like(logits)).sqrt()


@checked
def gate(
    logits: Tensor,
    choice_scores: Tensor | None,
    k: int,
    scoring: str,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Score the experts, choose the k largest `choice_scores` (the logits where None), weigh them.

    logits, choice_scores: [T, E] -> weights, expert_ids [T, K], probs [T, E], importance [E].
    NaN ranks above +inf and equal scores go to the lower id, as in a stable descending sort.
    """
    choice_scores = logits if choice_scores is None else choice_scores
    expert_ids = stable_order(choice_scores, descending=True)[:, :k]
    probs = scored(logits.to(checks.accumulate_dtype(logits.dtype)), scoring)
    weights = probs.gather(-1, expert_ids)
    if normalize:
        tiny = torch.finfo(weights.dtype).tiny
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=tiny)
    return weights * scale, expert_ids.to(torch.int32), probs, probs.sum(dim=0)


def _centred(grad: Tensor, shares: Tensor) -> Tensor:
    """grad minus its mean, sum over j of shares[j] * grad[j]; the shares of a row sum to 1."""
    # Where one share is near 1, its gradient is nearly the mean, and their difference would be
    # mostly rounding. So every gradient is first taken as a difference from that one.
    grad = grad - torch.where(shares > 0.5, grad, 0).sum(dim=-1, keepdim=True)
    return grad - (shares * grad).sum(dim=-1, keepdim=True)


def _normalized(grad: Tensor, weights: Tensor, eps: float) -> Tensor:
    """The gradient of weights from that of weights / max(their sum, eps)."""
    total = weights.sum(dim=-1, keepdim=True)
    divisor = total.clamp(min=eps)
    # The eps is a constant divisor, which has no gradient.
    return torch.where(total < eps, grad, _centred(grad, weights / divisor)) / divisor


@checked
def gate_backward(
    grad_weights: Tensor | None,
    grad_probs: Tensor | None,
    grad_importance: Tensor | None,
    probs: Tensor,
    expert_ids: Tensor,
    scoring: str,
    normalize: bool,
    scale: float,
) -> Tensor:
    """The gradient of `gate` with respect to logits, [T, E], from the probabilities alone.

    Made of differentiable torch operators: its own derivative is the gate's second one.
    """
    given = [grad for grad in (grad_probs, grad_importance) if grad is not None]
    grad = sum(given, torch.zeros_like(probs))
    if grad_weights is not None:
        index = expert_ids.long()
        chosen = probs.gather(-1, index)
        grad_chosen = grad_weights * scale
        if normalize:
            grad_chosen = _normalized(grad_chosen, chosen, torch.finfo(chosen.dtype).tiny)
        grad = grad.scatter_add(-1, index, grad_chosen)
    if scoring == "softmax":
        return probs * _centred(grad, probs)
    if scoring == "sigmoid":
        return grad * (probs * (1 - probs))
    # probs = sqrt(softplus(logits)), so sigmoid(logits) = 1 - exp(-probs ** 2). Where the next term
    # is lost in rounding, half of it; probs ** 2 may underflow.
    small = 1e-4 if probs.dtype == torch.float32 else 1e-8
    slope = -torch.expm1(-probs * probs) / (2 * probs.clamp(min=small))
    return grad * torch.where(probs < small, probs / 2, slope)


def _ranks(keys: Tensor, num_keys: int) -> Tensor:
    """How many earlier entries have the same key. keys: [N] in 0..num_keys-1 -> [N] int64."""
    order = stable_order(keys)
    counts = torch.zeros(num_keys, dtype=torch.int64, device=keys.device)
    counts = counts.scatter_add(0, keys, torch.ones_like(keys))
    starts = counts.cumsum(0) - counts
    place = torch.arange(keys.shape[0], device=keys.device) - starts[keys[order]]
    return torch.empty_like(keys).scatter(0, order, place)


@checked
def plan(
    expert_ids: Tensor,
    priority: Tensor | None,
    num_experts: int,
    capacity: int | None,
    order: str,
    align: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give every kept route a row.

    expert_ids, priority: [T, K] -> slots [T, K], sources [R], offsets [E+1], load [E]. An id
    outside 0..E-1 is no route. Routes queue choice-major or token-major; an expert keeps the first
    `capacity` of its queue, or with a priority the largest (NaN below every number, equal ones by
    the queue), and gives its rows in the order of the queue.
    """
    if expert_ids.device.type == "cpu":
        checks.expert_values("plan", expert_ids, num_experts)
    T, K = expert_ids.shape
    N, E = T * K, num_experts
    device = expert_ids.device
    route = torch.arange(N, device=device).view(T, K)
    queue = route.t().reshape(-1) if order == "choice" else route.reshape(-1)
    expert = expert_ids.reshape(-1)[queue].long()
    # Key E collects what has no row: no route at first, then the dropped ones too.
    key = torch.where((expert >= 0) & (expert < E), expert, E)
    load = torch.zeros(E + 1, dtype=torch.int64, device=device)
    load = load.scatter_add(0, key, torch.ones_like(key))[:E]

    if capacity is None:
        R = checks.dropless_rows(N, E, align)
        room = (load + (align - 1)) // align * align
    else:
        R = E * capacity
        room = torch.full((E,), capacity, dtype=torch.int64, device=device)
        if priority is None:
            rank = _ranks(key, E + 1)
        else:
            # Ascending, a NaN comes last.
            by_priority = stable_order(-priority.reshape(-1)[queue])
            rank = torch.empty_like(key).scatter(0, by_priority, _ranks(key[by_priority], E + 1))
        key = torch.where(rank < capacity, key, E)

    offsets = torch.cat([torch.zeros_like(room[:1]), room.cumsum(0)])
    slot = torch.where(key < E, offsets[key] + _ranks(key, E + 1), -1)
    slots = torch.empty_like(slot).scatter(0, queue, slot).view(T, K)
    # A last row takes what has no row, and is cut off.
    sources = torch.full((R + 1,), -1, dtype=torch.int64, device=device)
    sources = sources.scatter(0, torch.where(slot < 0, R, slot), queue)[:R]
    slots, sources, offsets, load = (it.to(torch.int32) for it in (slots, sources, offsets, load))
    return slots, sources, offsets, load


@checked
def balance(
    importance: Tensor, load: Tensor, expert_ids: Tensor, choices: int
) -> tuple[Tensor, Tensor]:
    """The load-balance loss [] of the tokens' first choices, and its slope for importance [E]."""
    if choices < expert_ids.shape[1] and expert_ids.device.type == "cpu":
        checks.expert_values("balance", expert_ids, len(importance))
    return composed.balance(_referred, importance, load, expert_ids, choices)


@checked
def mask_weights(
    weights: Tensor, slots: Tensor, normalize: bool, eps: float, scale: float
) -> Tensor:
    """The weights of routes that have a row, 0 of others, divided by their sum or by `eps` where
    the sum is below it. weights, slots: [T, K] -> [T, K]."""
    kept = weights.masked_fill(slots < 0, 0)
    if normalize:
        # The sum may be NaN, and a dropped route has weight 0.
        kept = kept / kept.sum(dim=-1, keepdim=True).clamp(min=eps)
        kept = kept.masked_fill(slots < 0, 0)
    return kept * scale


@checked
def mask_weights_backward(
    grad: Tensor, weights: Tensor, slots: Tensor, normalize: bool, eps: float, scale: float
) -> Tensor:
    """The gradient of `mask_weights` with respect to weights, [T, K]: as there, of differentiable
    torch operators."""
    kept, grad = weights.masked_fill(slots < 0, 0), grad.masked_fill(slots < 0, 0)
    if normalize:
        grad = _normalized(grad, kept, eps).masked_fill(slots < 0, 0)
    return grad * scale


def _rows_of_routes(rows: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The row of every route, zero where it has none [T, K, H], and whether it has one [T, K]."""
    kept = (slots >= 0) & (slots < rows.shape[0])
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    return padded[torch.where(kept, slots, -1).long()], kept


def _of_rows(weights: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of every row's route, zero where it has none [R, 1], and whether it has one."""
    weight, filled = _rows_of_routes(weights.reshape(-1, 1), sources)
    return weight, filled.unsqueeze(-1)


@checked
def dispatch(tokens: Tensor, slots: Tensor, sources: Tensor, weights: Tensor | None) -> Tensor:
    """rows[slots[t, k]] = weights[t, k] * tokens[t]; a row without a route is zero. -> [R, H]."""
    rows, _ = _rows_of_routes(tokens, sources // max(slots.shape[1], 1))
    if weights is None:
        return rows
    weight, _ = _of_rows(weights, sources)
    return (rows.to(weights.dtype) * weight).to(tokens.dtype)


@checked
def combine(rows: Tensor, slots: Tensor, sources: Tensor, weights: Tensor | None) -> Tensor:
    """tokens[t] = sum over k, in order, of weights[t, k] * rows[slots[t, k]]. -> [T, H]."""
    routed, kept = _rows_of_routes(rows, slots)
    routed = routed.to(checks.accumulate_dtype(rows.dtype))
    if weights is not None:
        routed = routed * torch.where(kept, weights, 0).unsqueeze(-1)
    total = routed.new_zeros(slots.shape[0], rows.shape[1])
    for k in range(slots.shape[1]):
        total = total + routed[:, k]
    return total.to(rows.dtype)


@checked
def route_dot(tokens: Tensor, rows: Tensor, slots: Tensor, sources: Tensor) -> Tensor:
    """weights[t, k] = <tokens[t], rows[slots[t, k]]>, 0 where the slot is -1. -> [T, K]."""
    routed, kept = _rows_of_routes(rows, slots)
    dtype = checks.accumulate_dtype(rows.dtype)
    dots = (tokens.unsqueeze(1).to(dtype) * routed.to(dtype)).sum(dim=-1)
    return torch.where(kept, dots, 0)


@checked
def combine_backward(
    tokens: Tensor, rows: Tensor, slots: Tensor, sources: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """dispatch(tokens, weights) [R, H] and route_dot(tokens, rows) [T, K], which a kernel computes
    in one pass over the tokens: together the gradients of a combine of `rows`."""
    return dispatch(tokens, slots, sources, weights), route_dot(tokens, rows, slots, sources)


@checked
def grouped_mm(
    rows: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    load: Tensor,
    capacity: int | None,
) -> Tensor:
    """out[r] = weights[e] @ rows[r] + bias[e] for the rows that routes of e own, else zero.
    -> [R, N]."""
    bounds = checks.owned_rows("grouped_mm", offsets, load, rows.shape[0])
    out = rows.new_zeros(rows.shape[0], weights.shape[1])
    for e, (begin, end) in enumerate(bounds):
        expert_bias = None if bias is None else bias[e]
        out[begin:end] = F.linear(rows[begin:end], weights[e], expert_bias)
    return out


@checked
def quantized_mm(
    rows: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    offsets: Tensor,
    load: Tensor,
    format: str,
    transposed: bool,
    int8_rows: bool,
    capacity: int | None,
) -> Tensor:
    """grouped_mm with the numbers of weights in a format, or with their transposes; int8_rows:
    every row is rounded to 127ths of its largest number first. -> [R, O]."""
    bounds = checks.owned_rows("quantized_mm", offsets, load, rows.shape[0])
    dtype = checks.accumulate_dtype(rows.dtype)
    width = values.shape[2] * 8 // codes.FORMATS[format].bits if transposed else values.shape[1]
    out = rows.new_zeros(rows.shape[0], width)
    for e, (begin, end) in enumerate(bounds):
        if begin == end:
            continue
        parts = codes.Codes(values[e], scales[e], None if zeros is None else zeros[e])
        weight = codes.decode(parts, format).to(dtype)
        taken = rows[begin:end].to(dtype)
        if int8_rows:
            taken = codes.round_rows(taken)
        expert_bias = None if bias is None else bias[e].to(dtype)
        out[begin:end] = F.linear(taken, weight.t() if transposed else weight, expert_bias)
    return out


@checked
def grouped_outer(
    left: Tensor, right: Tensor, offsets: Tensor, load: Tensor, capacity: int | None
) -> Tensor:
    """out[e] = left[e's rows].T @ right[e's rows], over the rows that routes own. -> [E, N, M]."""
    # torch 2.10 multiplies a strided column of bfloat16 wrongly on CPUs with AMX.
    left, right = left.contiguous(), right.contiguous()
    bounds = checks.owned_rows("grouped_outer", offsets, load, left.shape[0])
    out = left.new_zeros(load.shape[0], left.shape[1], right.shape[1])
    for e, (begin, end) in enumerate(bounds):
        out[e] = left[begin:end].t() @ right[begin:end]
    return out


def _gate_and_up(rows: Tensor, activation: str) -> tuple[Tensor, ...]:
    """Two halves of the columns, which alternate in gpt-oss."""
    if activation == "swiglu_oai":
        return rows[..., ::2], rows[..., 1::2]
    return rows.chunk(2, dim=-1)


@checked
def activate(
    pre_activation: Tensor, slots: Tensor, sources: Tensor, weights: Tensor | None, activation: str
) -> Tensor:
    """out[r] = weights[t, k] * fn(pre_activation[r]), [R, F]; with a gate
    fn(pre_activation[r, :F]) * pre_activation[r, F:]. [t, k] is the route of row r; a row without a
    route is not read and comes out zero."""
    dtype = checks.accumulate_dtype(pre_activation.dtype)
    if weights is None:
        weights = pre_activation.new_ones(slots.shape, dtype=dtype)
    weight, filled = _of_rows(weights, sources)
    inner = torch.where(filled, pre_activation, 0).to(dtype)
    function, _ = composed.ACTIVATION_FUNCTIONS[activation]
    if activation in checks.GATED:
        gate, up = _gate_and_up(inner, activation)
        active = function(gate) * composed.factor(up, activation)[0]
    else:
        active = function(inner)
    return torch.where(filled, weight * active, 0).to(pre_activation.dtype)


@checked
def activate_backward(
    grad: Tensor,
    pre_activation: Tensor,
    slots: Tensor,
    sources: Tensor,
    weights: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `activate` [R, G] and [T, K], and between them its result once more."""
    dtype = checks.accumulate_dtype(pre_activation.dtype)
    weight, filled = _of_rows(weights, sources)
    inner = torch.where(filled, pre_activation, 0).to(dtype)
    grad_wide = torch.where(filled, grad, 0).to(dtype)
    weighed = weight * grad_wide
    function, slope = composed.ACTIVATION_FUNCTIONS[activation]
    if activation in checks.GATED:
        gate, up = _gate_and_up(inner, activation)
        value, (factor, factor_slope) = function(gate), composed.factor(up, activation)
        active = value * factor
        parts = weighed * slope(gate) * factor, weighed * value * factor_slope
        interleaved = activation == "swiglu_oai"
        grad_inner = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    else:
        active = function(inner)
        grad_inner = weighed * slope(inner)
    dots, _ = _rows_of_routes((grad_wide * active).sum(-1, keepdim=True), slots)
    active = torch.where(filled, weight * active, 0).to(pre_activation.dtype)
    return grad_inner.to(pre_activation.dtype), active, dots.squeeze(-1)


def _referred(name: str, *args):
    return globals()[name](*args)


def _of_references(function: Callable) -> Callable:
    """An operator of composed.py, made of references."""
    bound: Any = functools.partial(function, _referred)
    bound.__name__, bound.__doc__ = function.__name__, function.__doc__
    return checked(bound)


feed_forward = _of_references(composed.feed_forward)
feed_forward_backward = _of_references(composed.feed_forward_backward)
