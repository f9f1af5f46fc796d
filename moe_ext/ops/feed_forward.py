"""A feed-forward network per expert, and its first product alone.

    pre_activation = up[e] @ token        [R, G]
    out = down[e] @ fn(pre_activation)    [T, H]

Tokens, pre-activations and the plan are saved: the backward dispatches the tokens again and
computes the activation again; no product is repeated.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ..formats import QuantizedWeight
from ..options import Activation
from . import composed, registry
from .autograd import Operator, gradients_of, keeps, run
from .checks import Check
from .functional import autocast, check_plan
from .plan import Plan


class FeedForward(Operator):
    op = "feed_forward"

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.activation, ctx.score_before_experts, ctx.capacity, ctx.keeps = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[1] if ctx.keeps else None)

    @staticmethod
    def backward(ctx, grad, grad_pre_activation):
        *tensors, pre_activation = ctx.saved_tensors
        tokens, slots, sources, *groups, _, up, _, up_bias, _ = tensors
        routes, groups = (slots, sources), (*groups, ctx.capacity)
        rule = ctx.activation, ctx.score_before_experts, ctx.capacity
        needs = ctx.needs_input_grad
        needs_tokens, needs_up, needs_down = needs[0], needs[6] or needs[8], needs[7] or needs[9]
        by_operand: Any = (None,) * 6
        if grad is not None:
            if not ctx.keeps:
                pre_activation = composed.project_up(run, tokens, up, up_bias, routes, groups)
            by_operand = FeedForwardBackward.call(
                *(grad, tokens, pre_activation, *tensors[1:]),
                *(*rule, needs_tokens, needs_up, needs_down),
            )
        if grad_pre_activation is not None and ctx.keeps:
            found = composed.project_up_backward(
                *(run, grad_pre_activation, tokens, up, up_bias, routes, groups),
                *(needs_tokens, needs_up),
            )
            by_operand = list(by_operand)
            for i, more in zip((0, 1, 3), found, strict=True):
                by_operand[i] = more if by_operand[i] is None else by_operand[i] + more
        of_tokens, of_up, of_down, of_up_bias, of_down_bias, of_weights = by_operand
        return (
            of_tokens if needs[0] else None,
            *(None, None, None, None),
            of_weights if needs[5] else None,
            of_up if needs[6] else None,
            of_down if needs[7] else None,
            of_up_bias if needs[8] else None,
            of_down_bias if needs[9] else None,
            *(None, None, None, None),
        )


class FeedForwardBackward(Operator):
    op = "feed_forward_backward"

    @staticmethod
    def backward(ctx, *grads):
        return gradients_of(functools.partial(composed.feed_forward_backward, run), ctx, grads)


class _DispatchMM(Operator):
    @staticmethod
    def forward(tokens, weights, bias, slots, sources, offsets, load, capacity):
        routes, groups = (slots, sources), (offsets, load, capacity)
        return composed.project_up(registry.run, tokens, weights, bias, routes, groups)

    setup_context = staticmethod(keeps(7))

    @staticmethod
    def backward(ctx, grad):
        tokens, weights, bias, *routes, offsets, load = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        grads = composed.project_up_backward(
            *(run, grad, tokens, weights, bias, routes, (offsets, load, *ctx.rest)),
            *(needs[0], needs[1] or needs[2]),
        )
        wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return *wanted, *(None,) * 5


def dispatch_mm(tokens: Tensor, weights: Tensor, plan: Plan, bias: Tensor | None = None) -> Tensor:
    """grouped_mm(dispatch(tokens, plan), weights, plan, bias), which saves tokens instead of rows.

    tokens: [T, M], weights: [E, N, M], bias: [E, N] of one dtype -> [R, N]
    """
    tokens, weights, bias = autocast(tokens, weights, bias)
    rest = plan.slots, plan.sources, plan.offsets, plan.load, plan.capacity
    return _DispatchMM.call(tokens, weights, bias, *rest)


def feed_forward(
    tokens: Tensor,
    plan: Plan,
    weights: Tensor,
    up: Tensor | QuantizedWeight,
    down: Tensor | QuantizedWeight,
    activation: Activation,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    score_before_experts: bool = False,
    recompute: bool = True,
) -> Tensor:
    """The weighted sum of every token's experts, each a feed-forward network.

    Under autocast tokens and parameters are cast, as by torch.mm.

    Args:
        tokens: [T, H]
        plan: for the same T tokens
        weights: [T, K] float32 (float64 for float64 tokens)
        up: [E, G, H] of the tokens' dtype, G = 2F for an activation with a gate, else F. Or a
            QuantizedWeight, which receives no gradient
        down: [E, H, F], likewise
        activation: as in `activate`
        up_bias: [E, G]
        down_bias: [E, H]
        score_before_experts: multiply a route's activation by its weight, not the expert's output:
            the same but for rounding
        recompute: save for the backward tokens, weights, the pre-activation [R, G] and the plan
            alone, and dispatch and activate again there. Otherwise, and for a QuantizedWeight, save
            everything between too.

    Returns:
        [T, H], combine(grouped_mm(activate(grouped_mm(dispatch(tokens), up)), down), weights)

    Raises:
        RuntimeError: an argument breaks this contract
    """
    check_plan("feed_forward", plan)
    if score_before_experts not in (True, False):
        Check("feed_forward").fail(
            f"score_before_experts must be True or False, got {score_before_experts!r}"
        )
    tokens, up, down, up_bias, down_bias = autocast(tokens, up, down, up_bias, down_bias)
    slots, sources, offsets, load, _, _, capacity = plan
    tensors = tokens, slots, sources, offsets, load, weights, up, down, up_bias, down_bias
    rule = activation, score_before_experts, capacity
    is_quantized = isinstance(up, QuantizedWeight) or isinstance(down, QuantizedWeight)
    if recompute and not is_quantized:
        out, _ = FeedForward.call(*tensors, *rule, torch.is_grad_enabled())
    else:
        out, _ = composed.feed_forward(run, *tensors, *rule, False)  # type: ignore[arg-type]
    return out
