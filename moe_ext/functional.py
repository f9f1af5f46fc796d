"""The differentiable functions over the raw operators.

The row operators are the three derivatives of one form,

    f(tokens, rows, weights) = sum over t, k of weights[t, k] * <tokens[t], rows[slots[t, k]]>
    dispatch = df/d rows        combine = df/d tokens        route_dot = df/d weights

so the gradient of each is made of the other two, and so is every higher one. `dispatch_dot` is two
of them in one pass, for the gradients of a combine. The same holds for `grouped_mm` and
`grouped_outer`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import contracts, ops, reference
from .plan import Plan


class Choice(NamedTuple):
    """What `gate` gives.

    weights: [T, K] float32 (float64 for float64 logits), differentiable
    experts: [T, K] int32, distinct within a token
    probs: [T, E] like weights, the score of every expert, differentiable
    importance: [E] like weights, column sums of probs, differentiable
    """

    weights: Tensor
    experts: Tensor
    probs: Tensor
    importance: Tensor


class Operator(Function):
    """An operator with a gradient, which is made of operators again."""

    generate_vmap_rule = True

    @classmethod
    def call(cls, *args):
        """`apply`; or the operator alone where nothing differentiates, as in most backwards."""
        is_followed = torch.is_grad_enabled() or forward_ad._current_level >= 0
        if is_followed or torch.compiler.is_compiling():
            return cls.apply(*args)
        return cls.forward(*args)


class _Gate(Operator):
    @staticmethod
    def forward(logits, choice_scores, k, scoring, renormalise, scale):
        return ops.run("gate", logits, choice_scores, k, scoring, renormalise, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, _, _, ctx.scoring, ctx.renormalise, ctx.scale = inputs
        _, experts, probs, _ = output
        ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(experts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(probs, experts)

    @staticmethod
    def backward(ctx, grad_weights, _, grad_probs, grad_importance):
        probs, experts = ctx.saved_tensors
        grad = _GateBackward.call(
            grad_weights,
            grad_probs,
            grad_importance,
            probs,
            experts,
            ctx.scoring,
            ctx.renormalise,
            ctx.scale,
        )
        return grad.to(ctx.dtype), None, None, None, None, None


class _GateBackward(Operator):
    @staticmethod
    def forward(
        grad_weights, grad_probs, grad_importance, probs, experts, scoring, renormalise, scale
    ):
        return ops.run(
            "gate_backward",
            grad_weights,
            grad_probs,
            grad_importance,
            probs,
            experts,
            scoring,
            renormalise,
            scale,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scoring, ctx.renormalise, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        *differentiable, experts = ctx.saved_tensors
        given = [i for i, tensor in enumerate(differentiable) if tensor is not None]

        def gate_backward(*tensors):
            full = [None] * 4
            for i, tensor in zip(given, tensors, strict=True):
                full[i] = tensor
            return reference.gate_backward(*full, experts, ctx.scoring, ctx.renormalise, ctx.scale)

        _, vjp = torch.func.vjp(gate_backward, *(differentiable[i] for i in given))
        grads: list[Tensor | None] = [None] * 8
        for i, tensor in zip(given, vjp(grad), strict=True):
            grads[i] = tensor
        return tuple(grads)


class _Dispatch(Operator):
    @staticmethod
    def forward(tokens, slots, sources, weights):
        return ops.run("dispatch", tokens, slots, sources, weights)

    @staticmethod
    def setup_context(ctx, inputs, output):
        tokens, slots, sources, weights = inputs
        ctx.save_for_backward(tokens if ctx.needs_input_grad[3] else None, slots, sources, weights)

    @staticmethod
    def backward(ctx, grad):
        tokens, slots, sources, weights = ctx.saved_tensors
        grad_tokens = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_tokens = _Combine.call(grad, slots, sources, weights)
        if ctx.needs_input_grad[3]:
            grad_weights = _RouteDot.call(tokens, grad, slots, sources)
        return grad_tokens, None, None, grad_weights


class _Combine(Operator):
    @staticmethod
    def forward(rows, slots, sources, weights):
        return ops.run("combine", rows, slots, sources, weights)

    @staticmethod
    def setup_context(ctx, inputs, output):
        rows, slots, sources, weights = inputs
        ctx.save_for_backward(rows if ctx.needs_input_grad[3] else None, slots, sources, weights)

    @staticmethod
    def backward(ctx, grad):
        rows, slots, sources, weights = ctx.saved_tensors
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[0] and ctx.needs_input_grad[3]:
            grad_rows, grad_weights = _DispatchDot.call(grad, rows, slots, sources, weights)
        elif ctx.needs_input_grad[0]:
            grad_rows = _Dispatch.call(grad, slots, sources, weights)
        elif ctx.needs_input_grad[3]:
            grad_weights = _RouteDot.call(grad, rows, slots, sources)
        return grad_rows, None, None, grad_weights


class _RouteDot(Operator):
    @staticmethod
    def forward(tokens, rows, slots, sources):
        return ops.run("route_dot", tokens, rows, slots, sources)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        tokens, rows, slots, sources = ctx.saved_tensors
        grad_tokens = grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_tokens = _Combine.call(rows, slots, sources, grad)
        if ctx.needs_input_grad[1]:
            grad_rows = _Dispatch.call(tokens, slots, sources, grad)
        return grad_tokens, grad_rows, None, None


class _DispatchDot(Operator):
    @staticmethod
    def forward(tokens, rows, slots, sources, weights):
        return ops.run("dispatch_dot", tokens, rows, slots, sources, weights)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_dispatched, grad_dots):
        tokens, rows, slots, sources, weights = ctx.saved_tensors
        needs_tokens, needs_rows, _, _, needs_weights = ctx.needs_input_grad
        grad_tokens = grad_rows = grad_weights = None
        if grad_dispatched is not None:
            if needs_tokens:
                grad_tokens = _Combine.call(grad_dispatched, slots, sources, weights)
            if needs_weights:
                grad_weights = _RouteDot.call(tokens, grad_dispatched, slots, sources)
        if grad_dots is not None:
            if needs_tokens:
                through_dots = _Combine.call(rows, slots, sources, grad_dots)
                grad_tokens = through_dots if grad_tokens is None else grad_tokens + through_dots
            if needs_rows:
                grad_rows = _Dispatch.call(tokens, slots, sources, grad_dots)
        return grad_tokens, grad_rows, None, None, grad_weights


class _GroupedMM(Operator):
    @staticmethod
    def forward(rows, weights, bias, offsets, load, capacity):
        return ops.run("grouped_mm", rows, weights, bias, offsets, load, capacity)

    @staticmethod
    def setup_context(ctx, inputs, output):
        rows, weights, _, offsets, load, ctx.capacity = inputs
        needs_rows, needs_weights, *_ = ctx.needs_input_grad
        ctx.is_transposed = is_transposed(weights)
        ctx.save_for_backward(
            rows if needs_weights else None, weights if needs_rows else None, offsets, load
        )

    @staticmethod
    def backward(ctx, grad):
        rows, weights, *groups = ctx.saved_tensors
        groups = *groups, ctx.capacity
        needs_rows, needs_weights, needs_bias, *_ = ctx.needs_input_grad
        grad_rows = grad_weights = grad_bias = None
        if needs_rows:
            grad_rows = _GroupedMM.call(grad, weights.transpose(1, 2), None, *groups)
        if needs_weights:
            grad_weights = outer_like(ctx.is_transposed, grad, rows, groups)
        if needs_bias:
            grad_bias = sum_of_groups(grad, groups)
        return grad_rows, grad_weights, grad_bias, None, None, None


def is_transposed(weights: Tensor) -> bool:
    """Whether weights [E, N, M] are a view of [E, M, N]."""
    return weights.stride(1) < weights.stride(2)


def outer_like(transposed: bool, left: Tensor, right: Tensor, groups: tuple) -> Tensor:
    """The sum of outer products [E, N, M] of every expert, laid out as its weights are: a gradient
    of another layout would be copied."""
    if transposed:
        return _GroupedOuter.call(right, left, *groups).transpose(1, 2)
    return _GroupedOuter.call(left, right, *groups)


def sum_of_groups(rows: Tensor, groups: tuple) -> Tensor:
    """The sum of every expert's rows. [R, N] -> [E, N]."""
    ones = rows.new_ones(rows.shape[0], 1)
    return _GroupedOuter.call(rows, ones, *groups).squeeze(-1)


class _GroupedOuter(Operator):
    @staticmethod
    def forward(left, right, offsets, load, capacity):
        return ops.run("grouped_outer", left, right, offsets, load, capacity)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.capacity = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        left, right, *groups = ctx.saved_tensors
        groups = *groups, ctx.capacity
        grad_left = grad_right = None
        if ctx.needs_input_grad[0]:
            grad_left = _GroupedMM.call(right, grad, None, *groups)
        if ctx.needs_input_grad[1]:
            grad_right = _GroupedMM.call(left, grad.transpose(1, 2), None, *groups)
        return grad_left, grad_right, None, None, None


class _Activate(Operator):
    @staticmethod
    def forward(inner, slots, sources, weights, activation):
        return ops.run("activate", inner, slots, sources, weights, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.activation = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        inner, slots, sources, weights = ctx.saved_tensors
        if weights is None:
            dtype = contracts.accumulate_dtype(inner.dtype)
            weights = inner.new_ones(slots.shape, dtype=dtype)
        grad_inner, _, grad_weights = _ActivateBackward.call(
            grad, inner, slots, sources, weights, ctx.activation
        )
        return grad_inner, None, None, grad_weights if ctx.needs_input_grad[3] else None, None


class _ActivateBackward(Operator):
    @staticmethod
    def forward(grad, inner, slots, sources, weights, activation):
        return ops.run("activate_backward", grad, inner, slots, sources, weights, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.activation = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        grad, inner, slots, sources, weights = ctx.saved_tensors

        def activate_backward(grad, inner, weights):
            return reference.activate_gradients(
                grad, inner, slots, sources, weights, ctx.activation
            )

        _, vjp = torch.func.vjp(activate_backward, grad, inner, weights)
        grad_grad, grad_inner, grad_weights = vjp(grads)
        return grad_grad, grad_inner, None, None, grad_weights, None


ops.registry.register_gradients(
    {
        "gate": _Gate,
        "gate_backward": _GateBackward,
        "dispatch": _Dispatch,
        "combine": _Combine,
        "route_dot": _RouteDot,
        "dispatch_dot": _DispatchDot,
        "grouped_mm": _GroupedMM,
        "grouped_outer": _GroupedOuter,
        "activate": _Activate,
        "activate_backward": _ActivateBackward,
    }
)


def gate(
    logits: Tensor,
    k: int,
    *,
    choice_scores: Tensor | None = None,
    scoring: str = "softmax",
    renormalise: bool = False,
    scale: float = 1.0,
) -> Choice:
    """Choose k experts for every token and weigh them.

    logits: [T, E] float32, float64, bfloat16 or float16; the gate computes in float32, in float64
        for float64 logits
    k: choices per token, 1..E
    choice_scores: [T, E] like logits, what the choice is made on (noise, a bias, groups masked by
        -inf); the logits where None. No gradient flows through the choice.
    scoring: "softmax", "sigmoid" or "sqrtsoftplus"; probs = scoring(logits)
    renormalise: divide a token's weights by their sum, or by the smallest normal number where the
        sum is below it; with softmax this is the softmax over the chosen logits, unless the chosen
        probabilities vanish beside those of experts that were not chosen
    scale: factor on the weights

    Returns Choice(weights [T, K], experts [T, K] int32, probs [T, E], importance [E]), the choices
    of a token from the highest score down. NaN ranks above +inf and equal scores go to the lower
    id, so ids are distinct and in range whatever comes. A NaN logit makes all its token's
    probabilities NaN with softmax, else that of its expert, and the sums over them; no other
    token's. Raises RuntimeError where an argument breaks this contract.
    """
    return Choice(*_Gate.call(logits, choice_scores, k, scoring, renormalise, scale))


def dispatch(tokens: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    """Copy every token into the rows its routes were given; rows without a route are zero.

    tokens: [T, H] float32, float64, bfloat16 or float16
    plan: of the same T tokens
    weights: [T, K] float32 (float64 for float64 tokens), a factor for every copy

    Returns rows [R, H] in the tokens' dtype: rows[plan.slots[t, k]] = weights[t, k] * tokens[t].
    Raises RuntimeError where an argument breaks this contract.
    """
    return _Dispatch.call(tokens, plan.slots, plan.sources, weights)


def combine(rows: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    """Sum every token's rows.

    rows: [R, H] float32, float64, bfloat16 or float16
    plan: with the same R rows
    weights: [T, K] float32 (float64 for float64 rows), a factor for every row

    Returns tokens [T, H] in the rows' dtype: the sum over k, in order, of
    weights[t, k] * rows[plan.slots[t, k]], accumulated in the weights' dtype and rounded once; a
    dropped route adds nothing. Raises RuntimeError where an argument breaks this contract.
    """
    return _Combine.call(rows, plan.slots, plan.sources, weights)


def route_dot(tokens: Tensor, rows: Tensor, plan: Plan) -> Tensor:
    """The product of every token with each of its rows.

    tokens: [T, H], rows: [R, H] of one dtype
    plan: of the same T tokens and R rows

    Returns [T, K] float32 (float64 for float64 rows): <tokens[t], rows[plan.slots[t, k]]>, 0 for a
    dropped route. Raises RuntimeError where an argument breaks this contract.
    """
    return _RouteDot.call(tokens, rows, plan.slots, plan.sources)


def has_autocast(device: torch.device) -> bool:
    """Whether autocast is on for a device; of the meta device it knows nothing."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The operands of a product, cast as torch.mm casts its own under autocast."""
    first = tensors[0]
    if not has_autocast(first.device) or first.dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    castable = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(
        tensor.to(dtype) if tensor is not None and tensor.dtype in castable else tensor
        for tensor in tensors
    )


def grouped_mm(rows: Tensor, weights: Tensor, plan: Plan, bias: Tensor | None = None) -> Tensor:
    """Multiply every row by its expert's weight.

    rows: [R, M], weights: [E, N, M], bias: [E, N] of one dtype; weights that are a view of
        [E, M, N] are multiplied as they lie
    plan: with the same R rows and E experts

    Returns [R, N]: weights[e] @ rows[r] + bias[e] for the rows of e that a route owns. All others
    are not read, come out zero and receive zero. Under autocast operands are cast, as by torch.mm.
    Raises RuntimeError where an argument breaks this contract.
    """
    check = contracts.Check("grouped_mm")
    check.shape("rows", rows, [("R", plan.sources.shape[0]), ("M", None)])
    rows, weights, bias = autocast(rows, weights, bias)
    return _GroupedMM.call(rows, weights, bias, plan.offsets, plan.load, plan.capacity)


def activate(inner: Tensor, plan: Plan, activation: str, weights: Tensor | None = None) -> Tensor:
    """What an expert does between its two products.

    inner: [R, 2F], the gate's columns first, for "swiglu" and "geglu"; [R, F] for "gelu" and "relu"
    plan: with the same R rows
    activation: "swiglu" (silu(gate) * up), "geglu" (gelu(gate) * up), "gelu" (exact) or "relu"
    weights: [T, K] float32 (float64 for float64 rows), a factor for the row of every route

    Returns [R, F] in inner's dtype, computed in the weights' dtype and rounded once. Rows without a
    route are not read, come out zero and receive zero. Raises RuntimeError where an argument breaks
    this contract.
    """
    return _Activate.call(inner, plan.slots, plan.sources, weights, activation)
