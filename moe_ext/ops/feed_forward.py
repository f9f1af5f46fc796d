"""A feed-forward network per expert that saves less: tokens, pre-activations and the plan.

    pre_activation = up[e] @ token        [R, G]    _UpProjection saves the tokens
    out = down[e] @ fn(pre_activation)    [T, H]    _DownProjection saves the pre-activations

The backward dispatches the tokens again and computes the activation again: no product is repeated.
A route's weight needs no saved output either: with y = down @ a,

    d loss / d weight = <grad, y> = <down.T @ grad, a>

the row's gradient times its activation, which the backward has both.
"""

from collections.abc import Callable

from torch import Tensor

from ..options import Activation
from . import autograd, checks, registry
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
from .functional import autocast, check_plan
from .plan import Plan

# The compositions below run operators by name: registry.run inside a Function, or _follow, where
# autograd saves the operands of each.


def _follow(name: str, *args) -> Tensor:
    return autograd.OPERATORS[name].call(*args)


def _project_up(
    run: Callable[..., Tensor], tokens: Tensor, weights: Tensor, bias: Tensor | None, plan: Plan
) -> Tensor:
    """grouped_mm(dispatch(tokens), weights, bias)."""
    rows = run("dispatch", tokens, plan.slots, plan.sources, None)
    return run("grouped_mm", rows, weights, bias, plan.offsets, plan.load, plan.capacity)


def _project_down(
    run: Callable[..., Tensor],
    pre_activation: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    route_weights: Tensor,
    plan: Plan,
    activation: Activation,
    score_before_experts: bool,
) -> Tensor:
    """combine(grouped_mm(activate(pre_activation), weights, bias), route_weights); a route's weight
    is a factor of its output, or of its activation where it is weighed before."""
    routes, groups = (plan.slots, plan.sources), (plan.offsets, plan.load, plan.capacity)
    before, after = (route_weights, None) if score_before_experts else (None, route_weights)
    active = run("activate", pre_activation, *routes, before, activation)
    rows = run("grouped_mm", active, weights, None if score_before_experts else bias, *groups)
    if score_before_experts and bias is not None:
        one = pre_activation.new_ones(plan.slots.shape[0], 1)
        factors = run("dispatch", one, *routes, route_weights)
        rows = rows + run("grouped_mm", factors, bias.unsqueeze(-1), None, *groups)
    return run("combine", rows, *routes, after)


class _UpProjection(Operator):
    @staticmethod
    def forward(tokens, weights, bias, plan):
        return _project_up(registry.run, tokens, weights, bias, plan)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tokens, weights, _, plan = inputs
        needs_tokens, needs_weights, *_ = ctx.needs_input_grad
        ctx.is_transposed, ctx.capacity = is_transposed(weights), plan.capacity
        ctx.save_for_backward(
            tokens if needs_weights else None,
            weights if needs_tokens else None,
            *(plan.slots, plan.sources, plan.offsets, plan.load),
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
        return grad_tokens, grad_weights, grad_bias, None


class _DownProjection(Operator):
    # Without gradients torch.compile counts the arguments of forward: none may be *variadic.
    @staticmethod
    def forward(
        pre_activation, weights, bias, route_weights, plan, activation, score_before_experts
    ):
        return _project_down(
            registry.run,
            pre_activation,
            weights,
            bias,
            route_weights,
            plan,
            activation,
            score_before_experts,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, plan, ctx.activation, _ = inputs
        _, weights, _, _ = tensors
        ctx.is_transposed, ctx.capacity = is_transposed(weights), plan.capacity
        ctx.save_for_backward(*tensors, plan.slots, plan.sources, plan.offsets, plan.load)

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
            *(None,) * 3,
        )


def dispatch_mm(tokens: Tensor, weights: Tensor, plan: Plan, bias: Tensor | None = None) -> Tensor:
    """grouped_mm(dispatch(tokens, plan), weights, plan, bias), which saves tokens instead of rows.

    tokens: [T, M], weights: [E, N, M], bias: [E, N] of one dtype -> [R, N]
    """
    tokens, weights, bias = autocast(tokens, weights, bias)
    return _UpProjection.call(tokens, weights, bias, plan)


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
        plan: for the same T tokens
        weights: [T, K] float32 (float64 for float64 tokens)
        up: [E, G, H] of the tokens' dtype, G = 2F for an activation with a gate, else F
        down: [E, H, F]
        activation: as in `activate`
        up_bias: [E, G]
        down_bias: [E, H]
        score_before_experts: multiply a route's activation by its weight, not the expert's output:
            the same but for rounding
        recompute: save for the backward tokens, weights, the pre-activation [R, G] and the plan
            alone, and dispatch and activate again there. Otherwise save everything between too.

    Returns:
        [T, H], combine(grouped_mm(activate(grouped_mm(dispatch(tokens), up)), down), weights)

    Raises:
        RuntimeError: an argument breaks this contract
    """
    check_plan("feed_forward", plan)
    checks.feed_forward(
        *(tokens, plan.num_experts, up, down, activation, up_bias, down_bias),
        score_before_experts,
    )
    tokens, up, down, up_bias, down_bias = autocast(tokens, up, down, up_bias, down_bias)
    rest = weights, plan, activation, score_before_experts
    if not recompute:
        pre_activation = _project_up(_follow, tokens, up, up_bias, plan)
        return _project_down(_follow, pre_activation, down, down_bias, *rest)
    pre_activation = _UpProjection.call(tokens, up, up_bias, plan)
    return _DownProjection.call(pre_activation, down, down_bias, *rest)
