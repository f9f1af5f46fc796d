"""A feed-forward network per expert that saves less: tokens, pre-activations and the plan.

    inner = up[e] @ token            [R, G]    saves tokens       _Inner
    out   = down[e] @ fn(inner)      [T, H]    saves inner        _Outer

The backward dispatches the tokens again and computes the activation again: no product is repeated.
A route's weight needs no saved output either: with y = down @ a,

    d loss / d weight = <grad, y> = <down.T @ grad, a>

the row's gradient times its activation, which the backward has both.
"""

from typing import get_args

from torch import Tensor

from . import contracts, ops
from .functional import activate, autocast, check_plan, combine, dispatch, grouped_mm
from .gradients import (
    ActivateBackward,
    Combine,
    Dispatch,
    GroupedMM,
    GroupedOuter,
    Operator,
    RouteDot,
    is_transposed,
    outer_like,
    sum_of_groups,
)
from .options import Activation, Weigh
from .plan import Plan

WEIGH = get_args(Weigh)


class _Inner(Operator):
    """grouped_mm(dispatch(tokens), weights, bias)."""

    # Without gradients torch.compile counts the arguments of forward: none may be *variadic.
    @staticmethod
    def forward(tokens, weights, bias, slots, sources, offsets, load, capacity):
        rows = ops.run("dispatch", tokens, slots, sources, None)
        return ops.run("grouped_mm", rows, weights, bias, offsets, load, capacity)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tokens, weights, _, *routes, ctx.capacity = inputs
        needs_tokens, needs_weights, *_ = ctx.needs_input_grad
        ctx.is_transposed = is_transposed(weights)
        ctx.save_for_backward(
            tokens if needs_weights else None, weights if needs_tokens else None, *routes
        )

    @staticmethod
    def backward(ctx, grad):
        tokens, weights, slots, sources, *groups = ctx.saved_tensors
        groups = *groups, ctx.capacity
        needs_tokens, needs_weights, needs_bias, *_ = ctx.needs_input_grad
        grad_tokens = grad_weights = grad_bias = None
        if needs_weights:
            rows = Dispatch.call(tokens, slots, sources, None)
            grad_weights = outer_like(ctx.is_transposed, grad, rows, groups)
            del rows
        if needs_bias:
            grad_bias = sum_of_groups(grad, groups)
        if needs_tokens:
            grad_rows = GroupedMM.call(grad, weights.transpose(1, 2), None, *groups)
            grad_tokens = Combine.call(grad_rows, slots, sources, None)
        return grad_tokens, grad_weights, grad_bias, None, None, None, None, None


class _Outer(Operator):
    """combine(grouped_mm(activate(inner), weights, bias), route_weights); the route's weight is a
    factor of its output, or of its activation where it is weighed before."""

    @staticmethod
    def forward(
        inner,
        weights,
        bias,
        route_weights,
        slots,
        sources,
        offsets,
        load,
        capacity,
        activation,
        before,
    ):
        groups = offsets, load, capacity
        if not before:
            active = ops.run("activate", inner, slots, sources, None, activation)
            rows = ops.run("grouped_mm", active, weights, bias, *groups)
            return ops.run("combine", rows, slots, sources, route_weights)
        active = ops.run("activate", inner, slots, sources, route_weights, activation)
        rows = ops.run("grouped_mm", active, weights, None, *groups)
        if bias is not None:
            one = inner.new_ones(slots.shape[0], 1)
            factors = ops.run("dispatch", one, slots, sources, route_weights)
            rows = rows + ops.run("grouped_mm", factors, bias.unsqueeze(-1), None, *groups)
        return ops.run("combine", rows, slots, sources, None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        inner, weights, bias, route_weights, *routes, ctx.capacity, ctx.activation, _ = inputs
        ctx.is_transposed = is_transposed(weights)
        ctx.save_for_backward(inner, weights, bias, route_weights, *routes)

    @staticmethod
    def backward(ctx, grad):
        inner, weights, bias, route_weights, slots, sources, *groups = ctx.saved_tensors
        groups = *groups, ctx.capacity
        needs_inner, needs_weights, needs_bias, needs_route_weights, *_ = ctx.needs_input_grad
        rows = Dispatch.call(grad, slots, sources, None)
        grad_active = GroupedMM.call(rows, weights.transpose(1, 2), None, *groups)
        grad_inner, active, grad_route_weights = ActivateBackward.call(
            grad_active, inner, slots, sources, route_weights, ctx.activation
        )
        del grad_active
        grad_weights = grad_bias = None
        if needs_weights:
            grad_weights = outer_like(ctx.is_transposed, rows, active, groups)
        if bias is not None:
            one = grad.new_ones(grad.shape[0], 1)
            if needs_route_weights:
                dots = GroupedMM.call(rows, bias.unsqueeze(1), None, *groups)
                of_bias = RouteDot.call(one, dots, slots, sources)
                grad_route_weights = grad_route_weights + of_bias
            if needs_bias:
                factors = Dispatch.call(one, slots, sources, route_weights)
                grad_bias = GroupedOuter.call(rows, factors, *groups).squeeze(-1)
        return (
            grad_inner if needs_inner else None,
            grad_weights,
            grad_bias,
            grad_route_weights if needs_route_weights else None,
            *(None,) * 7,
        )


def dispatch_mm(tokens: Tensor, weights: Tensor, plan: Plan, bias: Tensor | None = None) -> Tensor:
    """grouped_mm(dispatch(tokens, plan), weights, plan, bias), which saves tokens instead of rows.

    tokens: [T, M], weights: [E, N, M], bias: [E, N] of one dtype -> [R, N]
    """
    tokens, weights, bias = autocast(tokens, weights, bias)
    return _Inner.call(
        tokens, weights, bias, plan.slots, plan.sources, plan.offsets, plan.load, plan.capacity
    )


def feed_forward(
    tokens: Tensor,
    plan: Plan,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Activation,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    weigh: Weigh = "after",
    recompute: bool = True,
) -> Tensor:
    """The weighted sum of every token's experts, each a feed-forward network.

    Under autocast tokens and parameters are cast, as by torch.mm.

    Args:
        tokens: [T, H]
        plan: of the same T tokens
        weights: [T, K] float32 (float64 for float64 tokens)
        up: [E, G, H] of the tokens' dtype, G = 2F for an activation with a gate, else F
        down: [E, H, F]
        activation: as of `activate`
        up_bias: [E, G]
        down_bias: [E, H]
        weigh: "after", a route's weight is a factor of its output, or "before", of its activation:
            the same but for rounding
        recompute: save for the backward tokens, weights, the pre-activation [R, G] and the plan
            alone, dispatch and activate again there. Otherwise everything between is saved too.

    Returns:
        [T, H], combine(grouped_mm(activate(grouped_mm(dispatch(tokens), up)), down), weights)

    Raises:
        RuntimeError: an argument breaks this contract
    """
    check_plan("feed_forward", plan)
    contracts.feed_forward(tokens, plan.num_experts, up, down, activation, up_bias, down_bias)
    if weigh not in WEIGH:
        raise RuntimeError(f"feed_forward: weigh must be one of {WEIGH}, got {weigh!r}")
    if not recompute:
        inner = grouped_mm(dispatch(tokens, plan), up, plan, up_bias)
        return _weighed(inner, plan, weights, down, activation, down_bias, weigh)
    tokens, up, down, up_bias, down_bias = autocast(tokens, up, down, up_bias, down_bias)
    routes = plan.slots, plan.sources, plan.offsets, plan.load, plan.capacity
    inner = _Inner.call(tokens, up, up_bias, *routes)
    return _Outer.call(inner, down, down_bias, weights, *routes, activation, weigh == "before")


def _weighed(inner, plan, weights, down, activation, down_bias, weigh) -> Tensor:
    if weigh == "after":
        active = activate(inner, plan, activation)
        return combine(grouped_mm(active, down, plan, down_bias), plan, weights)
    rows = grouped_mm(activate(inner, plan, activation, weights), down, plan)
    if down_bias is not None:
        factors = dispatch(inner.new_ones(weights.shape[0], 1), plan, weights)
        rows = rows + grouped_mm(factors, down_bias.unsqueeze(-1), plan)
    return combine(rows, plan)
