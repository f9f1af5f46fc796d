"""The gradients of the raw operators, which are operators again.

The row operators are the three derivatives of one form,

    f(tokens, rows, weights) = sum over t, k of weights[t, k] * <tokens[t], rows[slots[t, k]]>
    dispatch = df/d rows        combine = df/d tokens        route_dot = df/d weights

so the gradient of each is made of the other two, and so is every higher one. `combine_backward` is
two of them in one pass, for the gradients of a combine. The same holds for `grouped_mm` and
`grouped_outer`.
"""

import inspect

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function, forward_ad

from . import checks, composed, reference, registry


def run(name: str, *args):
    """An operator of which autograd saves the operands."""
    return OPERATORS[name].call(*args)


class Operator(Function):
    """An operator with a gradient, which is made of operators again."""

    generate_vmap_rule = True

    @classmethod
    def call(cls, *args):
        """`apply`; or the operator alone where nothing differentiates, as in most backwards."""
        is_transformed = torch._C._are_functorch_transforms_active()
        if is_transformed or torch.compiler.is_compiling():
            return cls.apply(*args)
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            # As apply does, but without default arguments: for them it reads forward's signature in
            # every call, which takes longer than most operators do.
            return super(Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]
        return cls.forward(*args)


class Gate(Operator):
    @staticmethod
    def forward(logits, choice_scores, k, scoring, normalize, scale):
        return registry.run("gate", logits, choice_scores, k, scoring, normalize, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, _, _, ctx.scoring, ctx.normalize, ctx.scale = inputs
        _, expert_ids, probs, _ = output
        ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(expert_ids)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(probs, expert_ids)

    @staticmethod
    def backward(ctx, grad_weights, _, grad_probs, grad_importance):
        probs, expert_ids = ctx.saved_tensors
        grad = GateBackward.call(
            grad_weights,
            grad_probs,
            grad_importance,
            probs,
            expert_ids,
            ctx.scoring,
            ctx.normalize,
            ctx.scale,
        )
        return grad.to(ctx.dtype), None, None, None, None, None


class GateBackward(Operator):
    @staticmethod
    def forward(
        grad_weights, grad_probs, grad_importance, probs, expert_ids, scoring, normalize, scale
    ):
        return registry.run(
            "gate_backward",
            grad_weights,
            grad_probs,
            grad_importance,
            probs,
            expert_ids,
            scoring,
            normalize,
            scale,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scoring, ctx.normalize, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        *differentiable, expert_ids = ctx.saved_tensors
        given = [i for i, tensor in enumerate(differentiable) if tensor is not None]

        def gate_backward(*tensors):
            full: list = [None] * 4
            for i, tensor in zip(given, tensors, strict=True):
                full[i] = tensor
            of_weights, of_probs, of_importance, probs = full
            rule = ctx.scoring, ctx.normalize, ctx.scale
            return reference.gate_backward(
                of_weights, of_probs, of_importance, probs, expert_ids, *rule
            )

        vjp = torch.func.vjp(gate_backward, *(differentiable[i] for i in given))[1]
        grads: list[Tensor | None] = [None] * 8
        for i, tensor in zip(given, vjp(grad), strict=True):
            grads[i] = tensor
        return tuple(grads)


class Balance(Operator):
    @staticmethod
    def forward(importance, load, expert_ids, choices):
        return registry.run("balance", importance, load, expert_ids, choices)

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


class MaskWeights(Operator):
    @staticmethod
    def forward(weights, slots, normalize, eps, scale):
        return registry.run("mask_weights", weights, slots, normalize, eps, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weights, slots, ctx.normalize, ctx.eps, ctx.scale = inputs
        ctx.save_for_backward(weights, slots)

    @staticmethod
    def backward(ctx, grad):
        rule = ctx.normalize, ctx.eps, ctx.scale
        return MaskWeightsBackward.call(grad, *ctx.saved_tensors, *rule), None, None, None, None


class MaskWeightsBackward(Operator):
    @staticmethod
    def forward(grad, weights, slots, normalize, eps, scale):
        return registry.run("mask_weights_backward", grad, weights, slots, normalize, eps, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.normalize, ctx.eps, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_grad):
        grad, weights, slots = ctx.saved_tensors

        def mask_weights_backward(grad, weights):
            rule = ctx.normalize, ctx.eps, ctx.scale
            return reference.mask_weights_backward(grad, weights, slots, *rule)

        vjp = torch.func.vjp(mask_weights_backward, grad, weights)[1]
        return *vjp(grad_grad), None, None, None, None


class Dispatch(Operator):
    @staticmethod
    def forward(tokens, slots, sources, weights):
        return registry.run("dispatch", tokens, slots, sources, weights)

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
    @staticmethod
    def forward(rows, slots, sources, weights):
        return registry.run("combine", rows, slots, sources, weights)

    @staticmethod
    def setup_context(ctx, inputs, output):
        rows, slots, sources, weights = inputs
        ctx.save_for_backward(rows if ctx.needs_input_grad[3] else None, slots, sources, weights)

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
    @staticmethod
    def forward(tokens, rows, slots, sources):
        return registry.run("route_dot", tokens, rows, slots, sources)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

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
    @staticmethod
    def forward(tokens, rows, slots, sources, weights):
        return registry.run("combine_backward", tokens, rows, slots, sources, weights)

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
    @staticmethod
    def forward(rows, weights, bias, offsets, load, capacity):
        return registry.run("grouped_mm", rows, weights, bias, offsets, load, capacity)

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

    @staticmethod
    def forward(
        rows,
        values,
        scales,
        zeros,
        bias,
        offsets,
        load,
        format,
        transposed,
        int8_rows,
        capacity,
    ):
        return registry.run(
            "quantized_mm",
            *(rows, values, scales, zeros, bias, offsets, load),
            *(format, transposed, int8_rows, capacity),
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, values, scales, zeros, _, offsets, load, *rule = inputs
        ctx.format, ctx.transposed, _, ctx.capacity = rule
        ctx.save_for_backward(values, scales, zeros, offsets, load)

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
    @staticmethod
    def forward(left, right, offsets, load, capacity):
        return registry.run("grouped_outer", left, right, offsets, load, capacity)

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
            grad_left = GroupedMM.call(right, grad, None, *groups)
        if ctx.needs_input_grad[1]:
            grad_right = GroupedMM.call(left, grad.transpose(1, 2), None, *groups)
        return grad_left, grad_right, None, None, None


class Activate(Operator):
    @staticmethod
    def forward(pre_activation, slots, sources, weights, activation):
        return registry.run("activate", pre_activation, slots, sources, weights, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.activation = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        pre_activation, slots, sources, weights = ctx.saved_tensors
        if weights is None:
            dtype = checks.accumulate_dtype(pre_activation.dtype)
            weights = pre_activation.new_ones(slots.shape, dtype=dtype)
        grad_pre_activation, _, grad_weights = ActivateBackward.call(
            grad, pre_activation, slots, sources, weights, ctx.activation
        )
        return (
            grad_pre_activation,
            None,
            None,
            grad_weights if ctx.needs_input_grad[3] else None,
            None,
        )


class ActivateBackward(Operator):
    @staticmethod
    def forward(grad, pre_activation, slots, sources, weights, activation):
        return registry.run(
            "activate_backward", grad, pre_activation, slots, sources, weights, activation
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.activation = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        grad, pre_activation, slots, sources, weights = ctx.saved_tensors

        def activate_backward(grad, pre_activation, weights):
            # torch.func.vjp cannot trace the checks of values.
            unchecked = inspect.unwrap(reference.activate_backward)
            return unchecked(grad, pre_activation, slots, sources, weights, ctx.activation)

        vjp = torch.func.vjp(activate_backward, grad, pre_activation, weights)[1]
        grad_grad, grad_pre_activation, grad_weights = vjp(grads)
        return grad_grad, grad_pre_activation, None, None, grad_weights, None


OPERATORS: dict[str, type[Operator]] = {
    "gate": Gate,
    "gate_backward": GateBackward,
    "balance": Balance,
    "mask_weights": MaskWeights,
    "mask_weights_backward": MaskWeightsBackward,
    "dispatch": Dispatch,
    "combine": Combine,
    "route_dot": RouteDot,
    "combine_backward": CombineBackward,
    "grouped_mm": GroupedMM,
    "quantized_mm": QuantizedMM,
    "grouped_outer": GroupedOuter,
    "activate": Activate,
    "activate_backward": ActivateBackward,
}
registry.libraries.register_gradients(OPERATORS)
