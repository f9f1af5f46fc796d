"""The gradients of the raw operators, which are operators again.

The row operators are the three derivatives of one form,

    f(tokens, rows, weights) = sum over t, k of weights[t, k] * <tokens[t], rows[slots[t, k]]>
    dispatch = df/d rows        combine = df/d tokens        route_dot = df/d weights

so the gradient of each is made of the other two, and so is every higher one. `combine_backward` is
two of them in one pass, for the gradients of a combine. The same holds for `grouped_mm` and
`grouped_outer`.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function, forward_ad

from . import checks, composed, contracts, reference, registry

OPERATORS: dict[str, type["Operator"]] = {}


def run(name: str, *args):
    """An operator of which autograd saves the operands."""
    return OPERATORS[name].call(*args)


class Operator(Function):
    """An operator with a gradient, which is made of operators again, or of the reference's.

    op: its name in the contracts, which gives its forward; and where it has none of its own a
        setup_context that keeps all arguments, with a backward through the reference
    """

    op: str | None = None
    generate_vmap_rule = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if (op := vars(cls).get("op")) is None:
            return
        cls.forward = staticmethod(_forward_of(op))  # type: ignore[method-assign]
        if "setup_context" not in vars(cls):
            arguments = contracts.PARSED[op].arguments
            num_tensors = sum(argument.dims is not None for argument in arguments)
            cls.setup_context = staticmethod(keeps(num_tensors))  # type: ignore[method-assign]
            if "backward" not in vars(cls):
                cls.backward = staticmethod(_backward_of(op))  # type: ignore[method-assign]
        OPERATORS[op] = cls
        registry.libraries.register_gradients({op: cls})

    @classmethod
    def call(cls, *args):
        """`apply`; or the operator alone where nothing differentiates, as in most backwards."""
        is_transformed = torch._C._are_functorch_transforms_active()
        if is_transformed or torch.compiler.is_compiling():
            return cls.apply(*args)
        if torch.jit.is_tracing():
            checks.refuse_torchscript()
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            # As apply does, but without default arguments: for them it reads forward's signature in
            # every call, which takes longer than most operators do.
            return super(Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]
        return cls.forward(*args)


def _forward_of(op: str) -> Callable:
    # torch.compile asks for the number of parameters: it is the reference's.
    @functools.wraps(getattr(reference, op))
    def forward(*args):
        return registry.run(op, *args)

    return forward


def _backward_of(op: str) -> Callable:
    def backward(ctx, *grads):
        return gradients_of(getattr(reference, op), ctx, grads if len(grads) > 1 else grads[0])

    return backward


def keeps(num_tensors: int) -> Callable:
    """A setup_context that saves the tensors, which come first, and keeps the rest as ctx.rest."""

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:num_tensors])
        ctx.rest = inputs[num_tensors:]

    return setup_context


def gradients_of(function: Callable, ctx, grads) -> tuple:
    """The gradients of a function of everything that `ctx` keeps, made of torch's operators."""
    function = inspect.unwrap(function)  # torch.func.vjp cannot trace the checks of values
    tensors = list(ctx.saved_tensors)
    wanted = [i for i, is_needed in enumerate(ctx.needs_input_grad) if is_needed]

    def of_wanted(*some):
        for i, tensor in zip(wanted, some, strict=True):
            tensors[i] = tensor
        return function(*tensors, *ctx.rest)

    vjp = torch.func.vjp(of_wanted, *(tensors[i] for i in wanted))[1]
    found: list = [None] * len(ctx.needs_input_grad)
    for i, grad in zip(wanted, vjp(grads), strict=True):
        found[i] = grad
    return tuple(found)


class Gate(Operator):
    op = "gate"

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, expert_ids, probs, _ = output
        ctx.dtype, ctx.rest = inputs[0].dtype, inputs[3:]
        ctx.mark_non_differentiable(expert_ids)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(probs, expert_ids)

    @staticmethod
    def backward(ctx, grad_weights, _, grad_probs, grad_importance):
        grads = grad_weights, grad_probs, grad_importance
        grad = GateBackward.call(*grads, *ctx.saved_tensors, *ctx.rest)
        return checks.as_dtype(grad, ctx.dtype), *(None,) * 5


class GateBackward(Operator):
    op = "gate_backward"


class Balance(Operator):
    op = "balance"

    @staticmethod
    def setup_context(ctx, inputs, output):
        slope = output[1]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(slope)
        ctx.save_for_backward(slope)

    @staticmethod
    def backward(ctx, grad, _):
        (slope,) = ctx.saved_tensors
        return None if grad is None else grad * slope, None, None, None


class GatePlanBalance(Operator):
    """Three operators with one graph node: for few tokens a node takes longer than each of them.

    (logits, choice_scores, k, scoring, normalize, scale, capacity, order, choices) -> the results
    of gate, of plan, and of balance
    """

    @staticmethod
    def forward(logits, choice_scores, k, scoring, normalize, scale, capacity, order, choices):
        with registry.below_autograd():
            gate, make_plan, balance = map(registry.operator, ("gate", "plan", "balance"))
            choice = gate(logits, choice_scores, k, scoring, normalize, scale)
            _, expert_ids, _, importance = choice
            plan = make_plan(expert_ids, None, logits.shape[1], capacity, order, 1)
            *_, load = plan
            loss = balance(importance, load, expert_ids, choices)
        return *choice, *plan, *loss

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, expert_ids, probs, _, *plan, _, slope = output
        ctx.dtype, ctx.rest = inputs[0].dtype, inputs[3:6]
        ctx.mark_non_differentiable(expert_ids, *plan, slope)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(probs, expert_ids, slope)

    @staticmethod
    def backward(ctx, grad_weights, _, grad_probs, grad_importance, *grads):
        *_, grad_l_aux, _ = grads
        probs, expert_ids, slope = ctx.saved_tensors
        if grad_l_aux is not None:
            through_loss = grad_l_aux * slope
            grad_importance = (
                through_loss if grad_importance is None else grad_importance + through_loss
            )
        grads = grad_weights, grad_probs, grad_importance
        grad = GateBackward.call(*grads, probs, expert_ids, *ctx.rest)
        return checks.as_dtype(grad, ctx.dtype), *(None,) * 8


class MaskWeights(Operator):
    op = "mask_weights"

    @staticmethod
    def backward(ctx, grad):
        grad_weights = MaskWeightsBackward.call(grad, *ctx.saved_tensors, *ctx.rest)
        return grad_weights, None, None, None, None


class MaskWeightsBackward(Operator):
    op = "mask_weights_backward"


class Dispatch(Operator):
    op = "dispatch"

    @staticmethod
    def setup_context(ctx, inputs, output):
        tokens, slots, sources, weights = inputs
        ctx.save_for_backward(tokens if ctx.needs_input_grad[3] else None, slots, sources, weights)

    @staticmethod
    def backward(ctx, grad):
        tokens, slots, sources, weights = ctx.saved_tensors
        grad_tokens = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_tokens = Combine.call(grad, slots, sources, weights)
        if ctx.needs_input_grad[3]:
            grad_weights = RouteDot.call(tokens, grad, slots, sources)
        return grad_tokens, None, None, grad_weights


class Combine(Operator):
    op = "combine"
    setup_context = staticmethod(Dispatch.setup_context)

    @staticmethod
    def backward(ctx, grad):
        rows, slots, sources, weights = ctx.saved_tensors
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[0] and ctx.needs_input_grad[3]:
            grad_rows, grad_weights = CombineBackward.call(grad, rows, slots, sources, weights)
        elif ctx.needs_input_grad[0]:
            grad_rows = Dispatch.call(grad, slots, sources, weights)
        elif ctx.needs_input_grad[3]:
            grad_weights = RouteDot.call(grad, rows, slots, sources)
        return grad_rows, None, None, grad_weights


class RouteDot(Operator):
    op = "route_dot"

    @staticmethod
    def backward(ctx, grad):
        tokens, rows, slots, sources = ctx.saved_tensors
        grad_tokens = grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_tokens = Combine.call(rows, slots, sources, grad)
        if ctx.needs_input_grad[1]:
            grad_rows = Dispatch.call(tokens, slots, sources, grad)
        return grad_tokens, grad_rows, None, None


class CombineBackward(Operator):
    op = "combine_backward"

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
                grad_tokens = Combine.call(grad_dispatched, slots, sources, weights)
            if needs_weights:
                grad_weights = RouteDot.call(tokens, grad_dispatched, slots, sources)
        if grad_dots is not None:
            if needs_tokens:
                through_dots = Combine.call(rows, slots, sources, grad_dots)
                grad_tokens = through_dots if grad_tokens is None else grad_tokens + through_dots
            if needs_rows:
                grad_rows = Dispatch.call(tokens, slots, sources, grad_dots)
        return grad_tokens, grad_rows, None, None, grad_weights


class GroupedMM(Operator):
    op = "grouped_mm"

    @staticmethod
    def setup_context(ctx, inputs, output):
        rows, weights, _, offsets, load, ctx.capacity = inputs
        needs_rows, needs_weights, *_ = ctx.needs_input_grad
        ctx.is_transposed = checks.is_transposed(weights)
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
            grad_rows = GroupedMM.call(grad, weights.transpose(1, 2), None, *groups)
        if needs_weights:
            grad_weights = composed.outer_like(run, ctx.is_transposed, grad, rows, groups)
        if needs_bias:
            grad_bias = composed.sum_of_groups(run, grad, groups)
        return grad_rows, grad_weights, grad_bias, None, None, None


class QuantizedMM(Operator):
    """The gradient of rows that are rounded to 8 bits is that of rows as they are."""

    op = "quantized_mm"

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *weight, _, offsets, load, ctx.format, ctx.transposed, _, ctx.capacity = inputs
        ctx.save_for_backward(*weight, offsets, load)

    @staticmethod
    def backward(ctx, grad):
        *weight, offsets, load = ctx.saved_tensors
        grad_rows = grad_bias = None
        if ctx.needs_input_grad[0]:
            rule = ctx.format, not ctx.transposed, False, ctx.capacity
            grad_rows = QuantizedMM.call(grad, *weight, None, offsets, load, *rule)
        if ctx.needs_input_grad[4]:
            grad_bias = composed.sum_of_groups(run, grad, (offsets, load, ctx.capacity))
        return grad_rows, None, None, None, grad_bias, *(None,) * 6


class GroupedOuter(Operator):
    op = "grouped_outer"

    @staticmethod
    def backward(ctx, grad):
        left, right, *groups = ctx.saved_tensors
        groups = *groups, *ctx.rest
        grad_left = grad_right = None
        if ctx.needs_input_grad[0]:
            grad_left = GroupedMM.call(right, grad, None, *groups)
        if ctx.needs_input_grad[1]:
            grad_right = GroupedMM.call(left, grad.transpose(1, 2), None, *groups)
        return grad_left, grad_right, None, None, None


class Activate(Operator):
    op = "activate"

    @staticmethod
    def backward(ctx, grad):
        pre_activation, slots, sources, weights = ctx.saved_tensors
        if weights is None:
            dtype = checks.accumulate_dtype(pre_activation.dtype)
            weights = pre_activation.new_ones(slots.shape, dtype=dtype)
        grad_pre_activation, _, grad_weights = ActivateBackward.call(
            grad, pre_activation, slots, sources, weights, *ctx.rest
        )
        if not ctx.needs_input_grad[3]:
            grad_weights = None
        return grad_pre_activation, None, None, grad_weights, None


class ActivateBackward(Operator):
    op = "activate_backward"
