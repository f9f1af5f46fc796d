"""The operators as functions of tensors and plans, differentiable as often as wanted."""

from typing import NamedTuple, TypeVar, overload

import torch
from torch import Tensor

from ..formats import QuantizedWeight
from ..options import Activation, Scoring
from . import checks, composed
from .autograd import Activate, Combine, Dispatch, Gate, MaskWeights, RouteDot, run
from .plan import Plan

Weight = TypeVar("Weight", bound=Tensor | QuantizedWeight)


class Choice(NamedTuple):
    """The result of `gate`.

    Attributes:
        weights: [T, K] float32 (float64 for float64 logits), differentiable
        expert_ids: [T, K] int32, distinct within a token
        probs: [T, E] like weights, the score of every expert, differentiable
        importance: [E] like weights, column sums of probs, differentiable
    """

    weights: Tensor
    expert_ids: Tensor
    probs: Tensor
    importance: Tensor


def gate(
    logits: Tensor,
    k: int,
    *,
    choice_scores: Tensor | None = None,
    scoring: Scoring = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
) -> Choice:
    """Choose k experts for every token and weigh them.

    NaN ranks above +inf and equal scores go to the lower id, so ids are distinct and in range
    whatever comes. A NaN logit makes all its token's probabilities NaN with softmax, else that of
    its expert, and the sums over them; no other token's.

    Args:
        logits: [T, E] float32, float64, bfloat16 or float16; the gate computes in float32, in
            float64 for float64 logits
        k: choices per token, 1..E
        choice_scores: [T, E] like logits, the scores of the top-k choice (with noise, a bias, or
            groups masked by -inf); the logits where None. No gradient flows through the choice.
        scoring: "softmax", "sigmoid" or "sqrtsoftplus"; probs = scoring(logits)
        normalize: divide a token's weights by their sum, or by the smallest normal number where
            the sum is below it; with softmax this is the softmax over the chosen logits, unless the
            chosen probabilities vanish beside those of experts that were not chosen
        scale: finite factor on the weights

    Returns:
        Choice(weights [T, K], expert_ids [T, K] int32, probs [T, E], importance [E]), the choices
        of a token from the highest score down

    Raises:
        RuntimeError: an argument breaks this contract
    """
    return Choice(*Gate.call(logits, choice_scores, k, scoring, normalize, scale))


def mask_weights(
    weights: Tensor,
    plan: Plan,
    *,
    normalize: bool = False,
    eps: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The weights of routes that have a row, and zero for dropped routes.

    Args:
        weights: [T, K] float32 or float64
        plan: for the same T tokens and K choices
        normalize: divide a token's kept weights by their sum
        eps: the smallest divisor, finite; None is the smallest normal number
        scale: finite factor on all

    Returns:
        [T, K]; zero for a dropped route, also where its weight is NaN

    Raises:
        RuntimeError: an argument breaks this contract
    """
    checks.Check("mask_weights").is_tensor("weights", weights)
    if eps is None:
        eps = torch.finfo(weights.dtype).tiny if weights.is_floating_point() else 0.0
    check_plan("mask_weights", plan)
    return MaskWeights.call(weights, plan.slots, normalize, eps, scale)


def check_plan(op: str, plan: Plan) -> None:
    """Raises RuntimeError for something else, before its attributes are missed."""
    if not isinstance(plan, Plan):
        checks.Check(op).fail(
            f"plan must be a moe_ext.Plan, as make_plan returns, got {type(plan).__name__}"
        )


def dispatch(tokens: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    """Copy every token into the rows its routes were given; rows without a route are zero.

    Args:
        tokens: [T, H] float32, float64, bfloat16 or float16
        plan: for the same T tokens
        weights: [T, K] float32 (float64 for float64 tokens), a factor for every copy

    Returns:
        rows [R, H] in the tokens' dtype, rows[plan.slots[t, k]] = weights[t, k] * tokens[t]

    Raises:
        RuntimeError: an argument breaks this contract
    """
    check_plan("dispatch", plan)
    return Dispatch.call(tokens, plan.slots, plan.sources, weights)


def combine(rows: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    """Sum every token's rows.

    Args:
        rows: [R, H] float32, float64, bfloat16 or float16
        plan: with the same R rows
        weights: [T, K] float32 (float64 for float64 rows), a factor for every row

    Returns:
        tokens [T, H] in the rows' dtype, the sum over k, in order, of
        weights[t, k] * rows[plan.slots[t, k]], accumulated in the weights' dtype and rounded once;
        a dropped route adds nothing

    Raises:
        RuntimeError: an argument breaks this contract
    """
    check_plan("combine", plan)
    return Combine.call(rows, plan.slots, plan.sources, weights)


def route_dot(tokens: Tensor, rows: Tensor, plan: Plan) -> Tensor:
    """The product of every token with each of its rows.

    Args:
        tokens: [T, H]
        rows: [R, H] of the tokens' dtype
        plan: for the same T tokens and R rows

    Returns:
        [T, K] float32 (float64 for float64 rows), the inner product of tokens[t] and
        rows[plan.slots[t, k]]; 0 for a dropped route

    Raises:
        RuntimeError: an argument breaks this contract
    """
    check_plan("route_dot", plan)
    return RouteDot.call(tokens, rows, plan.slots, plan.sources)


def has_autocast(device: torch.device) -> bool:
    """Whether autocast is on for a device; never for meta, which it does not know."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


@overload
def autocast(
    rows: Tensor, weights: Weight, bias: Tensor | None, /
) -> tuple[Tensor, Weight, Tensor | None]: ...


@overload
def autocast(
    rows: Tensor,
    up: Tensor | QuantizedWeight,
    down: Tensor | QuantizedWeight,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    /,
) -> tuple[
    Tensor, Tensor | QuantizedWeight, Tensor | QuantizedWeight, Tensor | None, Tensor | None
]: ...


def autocast(*tensors):
    """The operands of a product, cast as torch.mm casts its own under autocast."""
    first = tensors[0]
    if not isinstance(first, Tensor):
        return tensors  # the operator says what it must be
    if not has_autocast(first.device) or first.dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    castable = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(
        tensor.to(dtype) if isinstance(tensor, Tensor) and tensor.dtype in castable else tensor
        for tensor in tensors
    )


def grouped_mm(
    rows: Tensor, weights: Tensor | QuantizedWeight, plan: Plan, bias: Tensor | None = None
) -> Tensor:
    """Multiply every row by its expert's weight.

    Rows that no route owns are not read, come out zero and receive zero. Under autocast operands
    are cast, as by torch.mm.

    Args:
        rows: [R, M]
        weights: [E, N, M] of the rows' dtype; a view of [E, M, N] is multiplied without a copy. Or
            a QuantizedWeight, which receives no gradient
        plan: with the same R rows and E experts
        bias: [E, N] of the rows' dtype

    Returns:
        [R, N], weights[e] @ rows[r] + bias[e] for the rows of e that a route owns

    Raises:
        RuntimeError: an argument breaks this contract
    """
    check_plan("grouped_mm", plan)
    check = checks.Check("grouped_mm")
    sources = plan.sources
    check.shape("rows", rows, [("R", sources.shape[0]), ("M", None)], ("sources", sources))
    rows, weights, bias = autocast(rows, weights, bias)
    groups = plan.offsets, plan.load, plan.capacity
    return composed.multiply(run, rows, weights, bias, groups)


def activate(
    pre_activation: Tensor, plan: Plan, activation: Activation, weights: Tensor | None = None
) -> Tensor:
    """The activation between an expert's two GEMMs.

    Rows without a route are not read, come out zero and receive zero.

    Args:
        pre_activation: the output of the first GEMM: [R, 2F] with a gate, of which the first F
            columns are; else [R, F]
        plan: with the same R rows
        activation: "swiglu" (silu(gate) * up), "geglu" (gelu(gate) * up), "swiglu_oai" (gpt-oss's:
            columns 2f and 2f + 1 are a gate and an up, which are clamped: gate' = min(gate, 7),
            out = gate' * sigmoid(1.702 gate') * (1 + max(-7, min(up, 7)))), "gelu" (exact),
            "relu" or "relu2" (relu squared)
        weights: [T, K] float32 (float64 for float64 rows), a factor for the row of every route

    Returns:
        [R, F] in pre_activation's dtype, computed in the weights' dtype and rounded once

    Raises:
        RuntimeError: an argument breaks this contract
    """
    check_plan("activate", plan)
    return Activate.call(pre_activation, plan.slots, plan.sources, weights, activation)
