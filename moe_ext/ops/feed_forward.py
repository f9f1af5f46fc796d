"""A feed-forward network per expert that saves less: tokens, pre-activations and the plan.

    pre_activation = up[e] @ token            [R, G]    saves tokens       _UpProjection
    out   = down[e] @ fn(pre_activation)      [T, H]    saves pre_activation        _DownProjection

The backward dispatches the tokens again and computes the activation again: no product is repeated.
A route's weight needs no saved output either: with y = down @ a,

    d loss / d weight = <grad, y> = <down.T @ grad, a>

the row's gradient times its activation, which the backward has both.
"""

from torch import Tensor

from ..options import Activation
from . import checks, registry
from .autograd import (
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
from .functional import activate, autocast, check_plan, combine, dispatch, grouped_mm
from .plan import Plan


class _UpProjection(Operator):
    """grouped_mm(dispatch(tokens), weights, bias)."""

    # Without gradients torch.compile counts the arguments of forward: none may be *variadic.
    @staticmethod
    def forward(tokens, weights, bias, slots, sources, offsets, load, capacity):
        rows = registry.run("dispatch", tokens, slots, sources, None)
        return registry.run("grouped_mm", rows, weights, bias, offsets, load, capacity)

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


class _DownProjection(Operator):
    """combine(grouped_mm(activate(pre_activation), weights, bias), route_weights); the route's
    weight is a factor of its output, or of its activation where it is weighed before."""

    @staticmethod
    def forward(
        pre_activation,
        weights,
        bias,
        route_weights,
        slots,
        sources,
        offsets,
        load,
        capacity,
        activation,
        score_before_experts,
    ):
        groups = offsets, load, capacity
        if not score_before_experts:
            active = registry.run("activate", pre_activation, slots, sources, None, activation)
            rows = registry.run("grouped_mm", active, weights, bias, *groups)
            return registry.run("combine", rows, slots, sources, route_weights)
        active = registry.run("activate", pre_activation, slots, sources, route_weights, activation)
        rows = registry.run("grouped_mm", active, weights, None, *groups)
        if bias is not None:
            one = pre_activation.new_ones(slots.shape[0], 1)
            factors = registry.run("dispatch", one, slots, sources, route_weights)
            rows = rows + registry.run("grouped_mm", factors, bias.unsqueeze(-1), None, *groups)
        return registry.run("combine", rows, slots, sources, None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pre_activation, weights, bias, route_weights, *routes, ctx.capacity, ctx.activation, _ = (
            inputs
        )
        ctx.is_transposed = is_transposed(weights)
        ctx.save_for_backward(pre_activation, weights, bias, route_weights, *routes)

    @staticmethod
    def backward(ctx, grad):
        pre_activation, weights, bias, route_weights, slots, sources, *groups = ctx.saved_tensors
        groups = *groups, ctx.capacity
        needs_pre_activation, needs_weights, needs_bias, needs_route_weights, *_ = (
            ctx.needs_input_grad
        )
        rows = Dispatch.call(grad, slots, sources, None)
        grad_active = GroupedMM.call(rows, weights.transpose(1, 2), None, *groups)
        grad_pre_activation, active, grad_route_weights = ActivateBackward.call(
            grad_active, pre_activation, slots, sources, route_weights, ctx.activation
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
            grad_pre_activation if needs_pre_activation else None,
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
    return _UpProjection.call(
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
    score_before_experts: bool = False,
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
        score_before_experts: multiply a route's activation by its weight, not the expert's output:
            the same but for rounding
        recompute: save for the backward tokens, weights, the pre-activation [R, G] and the plan
            alone, dispatch and activate again there. Otherwise everything between is saved too.

    Returns:
        [T, H], combine(grouped_mm(activate(grouped_mm(dispatch(tokens), up)), down), weights)

    Raises:
        RuntimeError: an argument breaks this contract
    """
    check_plan("feed_forward", plan)
    checks.feed_forward(tokens, plan.num_experts, up, down, activation, up_bias, down_bias)
    if not recompute:
        pre_activation = grouped_mm(dispatch(tokens, plan), up, plan, up_bias)
        return _weighed(
            pre_activation, plan, weights, down, activation, down_bias, score_before_experts
        )
    tokens, up, down, up_bias, down_bias = autocast(tokens, up, down, up_bias, down_bias)
    routes = plan.slots, plan.sources, plan.offsets, plan.load, plan.capacity
    pre_activation = _UpProjection.call(tokens, up, up_bias, *routes)
    return _DownProjection.call(
        pre_activation, down, down_bias, weights, *routes, activation, score_before_experts
    )


def _weighed(
    pre_activation, plan, weights, down, activation, down_bias, score_before_experts
) -> Tensor:
    if not score_before_experts:
        active = activate(pre_activation, plan, activation)
        return combine(grouped_mm(active, down, plan, down_bias), plan, weights)
    rows = grouped_mm(activate(pre_activation, plan, activation, weights), down, plan)
    if down_bias is not None:
        factors = dispatch(pre_activation.new_ones(weights.shape[0], 1), plan, weights)
        rows = rows + grouped_mm(factors, down_bias.unsqueeze(-1), plan)
    return combine(rows, plan)
