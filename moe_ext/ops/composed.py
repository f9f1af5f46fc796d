"""Operators that are made of smaller ones, the balance of a routing and the experts', and the
functions of activations.

`run(name, *args)` calls a smaller operator: one of the dispatcher where a device has no kernel of
its own, a reference, or an autograd.Function where the operands of each are saved.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..formats import QuantizedWeight
from .checks import is_transposed

Run = Callable[..., Tensor]


def balance(
    run: Run, importance: Tensor, load: Tensor, expert_ids: Tensor, choices: int
) -> tuple[Tensor, Tensor]:
    """The load-balance loss [], the sum of importance / T * share, and share / T [E], its slope for
    importance. An expert's share is its part of the load of the tokens' first choices, 1 where all
    are even."""
    T, K = expert_ids.shape
    E = importance.shape[0]
    if choices < K:
        load = run("plan", expert_ids[:, :choices], None, E, None, "choice", 1)[3]
    T = torch.sym_max(T, 1)
    share = load.to(importance.dtype) / (T * (choices / E))
    return (importance / T * share).sum(), share / T


def feed_forward(
    run: Run,
    tokens: Tensor,
    slots: Tensor,
    sources: Tensor,
    offsets: Tensor,
    load: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    score_before_experts: bool,
    capacity: int | None,
    keeps: bool,
) -> tuple[Tensor, Tensor]:
    """combine(grouped_mm(activate(grouped_mm(dispatch(tokens), up)), down), weights), [T, H], and
    the pre-activation where it is kept, [R, G], whose rows without a route may be anything. A
    route's weight is a factor of its output, or of its activation where it is weighed before.
    `multiply` takes up and down in a format too."""
    routes, groups = (slots, sources), (offsets, load, capacity)
    pre_activation = project_up(run, tokens, up, up_bias, routes, groups)
    before, after = (weights, None) if score_before_experts else (None, weights)
    active = run("activate", pre_activation, *routes, before, activation)
    if not keeps:
        pre_activation = pre_activation.new_empty(0)
    rows = multiply(run, active, down, None if score_before_experts else down_bias, groups)
    if score_before_experts and down_bias is not None:
        factors = run("dispatch", tokens.new_ones(tokens.shape[0], 1), *routes, weights)
        rows = rows + run("grouped_mm", factors, down_bias.unsqueeze(-1), None, *groups)
    return run("combine", rows, *routes, after), pre_activation


def project_up(
    run: Run,
    tokens: Tensor,
    up: Tensor | QuantizedWeight,
    bias: Tensor | None,
    routes: tuple,
    groups: tuple,
) -> Tensor:
    """grouped_mm(dispatch(tokens), up, bias)."""
    return multiply(run, run("dispatch", tokens, *routes, None), up, bias, groups)


def multiply(
    run: Run, rows: Tensor, weights: Tensor | QuantizedWeight, bias: Tensor | None, groups: tuple
) -> Tensor:
    """grouped_mm, of weights in a format too."""
    if not isinstance(weights, QuantizedWeight):
        return run("grouped_mm", rows, weights, bias, *groups)
    offsets, load, capacity = groups
    rule = weights.format, False, weights.activations == "int8", capacity
    return run("quantized_mm", rows, *weights.codes(), bias, offsets, load, *rule)


def feed_forward_backward(
    run: Run,
    grad: Tensor,
    tokens: Tensor,
    pre_activation: Tensor,
    slots: Tensor,
    sources: Tensor,
    offsets: Tensor,
    load: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    score_before_experts: bool,
    capacity: int | None,
    needs_tokens: bool,
    needs_up: bool,
    needs_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `feed_forward` for tokens, up, down, both biases and weights; an empty
    tensor for one that is not needed. No product of the forward is repeated, and a route's weight
    needs no saved output: with y = down @ a,

        d loss / d weight = <grad, y> = <down.T @ grad, a>
    """
    routes, groups = (slots, sources), (offsets, load, capacity)
    grad_rows = run("dispatch", grad, *routes, None)
    grad_active = run("grouped_mm", grad_rows, down.transpose(1, 2), None, *groups)
    grad_pre_activation, active, grad_weights = run(
        "activate_backward", grad_active, pre_activation, *routes, weights, activation
    )
    del grad_active
    grad_down, grad_down_bias = grad.new_empty(0), grad.new_empty(0)
    if needs_down:
        grad_down = outer_like(run, is_transposed(down), grad_rows, active, groups)
    if down_bias is not None:
        one = grad.new_ones(grad.shape[0], 1)
        dots = run("grouped_mm", grad_rows, down_bias.unsqueeze(1), None, *groups)
        grad_weights = grad_weights + run("route_dot", one, dots, *routes)
        if needs_down:
            factors = run("dispatch", one, *routes, weights)
            grad_down_bias = run("grouped_outer", grad_rows, factors, *groups).squeeze(-1)
    del active, grad_rows
    grad_tokens, grad_up, grad_up_bias = project_up_backward(
        *(run, grad_pre_activation, tokens, up, up_bias, routes, groups, needs_tokens, needs_up)
    )
    return grad_tokens, grad_up, grad_down, grad_up_bias, grad_down_bias, grad_weights


def project_up_backward(
    run: Run,
    grad: Tensor,
    tokens: Tensor,
    up: Tensor,
    bias: Tensor | None,
    routes: tuple,
    groups: tuple,
    needs_tokens: bool,
    needs_up: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `project_up` for tokens, up and bias; an empty tensor for one that is not
    needed."""
    grad_tokens, grad_up, grad_bias = (grad.new_empty(0) for _ in range(3))
    if needs_up:
        rows = run("dispatch", tokens, *routes, None)
        grad_up = outer_like(run, is_transposed(up), grad, rows, groups)
        if bias is not None:
            grad_bias = sum_of_groups(run, grad, groups)
    if needs_tokens:
        rows = run("grouped_mm", grad, up.transpose(1, 2), None, *groups)
        grad_tokens = run("combine", rows, *routes, None)
    return grad_tokens, grad_up, grad_bias


def outer_like(run: Run, transposed: bool, left: Tensor, right: Tensor, groups: tuple) -> Tensor:
    """The sum of outer products [E, N, M] of every expert, laid out as its weights are: a gradient
    of another layout would be copied."""
    if transposed:
        return run("grouped_outer", right, left, *groups).transpose(1, 2)
    return run("grouped_outer", left, right, *groups)


def sum_of_groups(run: Run, rows: Tensor, groups: tuple) -> Tensor:
    """The sum of every expert's rows. [R, N] -> [E, N]."""
    ones = rows.new_ones(rows.shape[0], 1)
    return run("grouped_outer", rows, ones, *groups).squeeze(-1)


OPERATORS: dict[str, Callable] = {
    "balance": balance,
    "feed_forward": feed_forward,
    "feed_forward_backward": feed_forward_backward,
}


# swiglu_oai's constants.
SCALE, LIMIT = 1.702, 7.0


def _clamped_silu(x: Tensor) -> Tensor:
    clamped = x.clamp(max=LIMIT)
    return clamped * torch.sigmoid(SCALE * clamped)


def _clamped_silu_slope(x: Tensor) -> Tensor:
    return torch.where(x <= LIMIT, _silu_slope(x.clamp(max=LIMIT), SCALE), 0)


def _silu_slope(x: Tensor, scale: float = 1) -> Tensor:
    sigmoid = torch.sigmoid(scale * x)
    return sigmoid + scale * (x * sigmoid) * (1 - sigmoid)


def _gelu(x: Tensor) -> Tensor:
    return x * torch.special.ndtr(x)  # F.gelu loses the tail below 0


def _gelu_slope(x: Tensor) -> Tensor:
    return torch.special.ndtr(x) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


# The function of an activation, or that of its gate, and its slope.
ACTIVATION_FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "swiglu": (F.silu, _silu_slope),
    "geglu": (_gelu, _gelu_slope),
    "swiglu_oai": (_clamped_silu, _clamped_silu_slope),
    "gelu": (_gelu, _gelu_slope),
    "relu": (F.relu, lambda x: torch.where(x <= 0, 0.0, 1.0).to(x.dtype)),
    "relu2": (lambda x: F.relu(x).square(), lambda x: 2 * F.relu(x)),
}


def factor(up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The factor of a gate, and its slope."""
    if activation == "swiglu_oai":
        return 1 + up.clamp(-LIMIT, LIMIT), torch.where(up.abs() <= LIMIT, 1.0, 0.0).to(up.dtype)
    return up, torch.ones_like(up)
