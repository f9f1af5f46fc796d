"""The layer: a gate and experts."""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from . import options
from .experts.module import refuse_list
from .ops.checks import as_dtype, refuse_torchscript
from .ops.plan import Plan
from .routing.route import Routing, balance_of


class Aux(NamedTuple):
    """The second result of a layer. A pytree.

    Attributes:
        l_aux: [] auxiliary loss, not scaled
        exp_counts: [E] int64, routes that asked for an expert, before dropping
        expert_ids: [T, K] int32, the choice, -1 where there is none; `layer(hidden,
            expert_ids=...)` makes it again
    """

    l_aux: Tensor
    exp_counts: Tensor
    expert_ids: Tensor


class Outcome(NamedTuple):
    """What a layer knows of a call beside its result: an Aux that is computed where it is read.

    Attributes:
        l_aux: as in Aux, or a function that computes it
        load: [E] int32 or int64
        expert_ids: [T, K] int32
    """

    l_aux: Tensor | Callable[[], Tensor] | Any = None
    load: Tensor | Any = None
    expert_ids: Tensor | Any = None

    @classmethod
    def of(cls, routing: Routing, is_lazy: bool) -> Outcome:
        has_none = is_lazy and routing.l_aux is None
        l_aux = balance_of(routing) if has_none else routing.l_aux
        return cls(l_aux, routing.plan.load, routing.plan.expert_ids)

    def aux(self) -> Aux:
        return Aux(_computed(self.l_aux), self.load.to(torch.int64), self.expert_ids)


def route_of(gate: nn.Module) -> tuple[Callable[..., Routing], bool]:
    """Return how a layer calls a gate, and whether what nobody may read is left out: in evaluation
    without gradients, where the gate's own `route` can."""
    route: Any = gate.route
    if gate.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return route, False
    if not getattr(route, "takes_with_loss", False):
        return route, False
    return functools.partial(route, with_loss=False), True


def _computed(l_aux: Tensor | Callable[[], Tensor] | Any) -> Tensor | Any:
    if isinstance(l_aux, Tensor) or not callable(l_aux):
        return l_aux
    with torch.no_grad():
        return l_aux()


# (plan, aux, routing, used_token) of a call; None where the layer does not know it.
Observer = Callable[[Plan, Aux | None, Routing | None, Tensor | None], None]


class _LostGradient(Function):
    """The identity, whose backward drops the gradient and warns."""

    @staticmethod
    def forward(ctx, l_aux: Tensor, owner: str) -> Tensor:
        ctx.owner = owner
        return l_aux.view_as(l_aux)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None]:
        warnings.warn(
            f"{ctx.owner}: the gradient of l_aux is lost, so the loss does not balance the router. "
            "The layer ran without gradients, as in checkpoint(use_reentrant=True). Set "
            "use_reentrant=False, or return l_aux from the checkpointed function",
            stacklevel=2,
        )
        return None, None


def _warning_of_lost_gradient(l_aux: Tensor | Any, owner: str) -> Tensor | Any:
    """Make l_aux of a call without gradients warn when a gradient reaches it.

    Only inside an autograd.Function, which checkpoint(use_reentrant=True) wraps around the call. A
    Function that returns l_aux gives it a gradient of its own: no warning then.
    """
    if not isinstance(l_aux, Tensor) or not l_aux.is_floating_point() or l_aux.is_inference():
        return l_aux
    if torch._C._are_functorch_transforms_active():
        return l_aux
    frame = sys._getframe()
    while frame := frame.f_back:  # type: ignore[assignment]
        code = frame.f_code
        if code.co_name == "forward" and code.co_varnames[:1] == ("ctx",):
            with torch.enable_grad():
                return _LostGradient.apply(l_aux.detach().requires_grad_(), owner)
    return l_aux


class Layer(nn.Module):
    """A mixture of experts: a gate routes tokens to experts.

    `layer(hidden, used_token=None)` returns a tensor like hidden and leaves `l_aux` and
    `exp_counts` of that call as attributes; both are None after a copy or pickle.
    `forward_with_aux` returns them instead, for checkpointing, export and compile + checkpoint.
    The layer calls its `observer(plan, aux, routing, used_token)`, if there is one.

    Args:
        gate: a module with `num_experts` and `route(tokens, used_token, expert_ids) -> Routing`
        experts: moe_ext.Experts
        num_experts: E, if `experts` are only a part of them; None takes `experts.num_experts`

    Raises:
        ValueError: gate or experts is no such module, or they do not fit
    """

    __prepare_scriptable__ = refuse_torchscript
    gate: Any
    experts: Any
    outcome: Outcome | None = None  # of the last call

    def __init__(self, gate: nn.Module, experts: nn.Module, num_experts: int | None = None) -> None:
        super().__init__()
        owner = type(self).__name__
        refuse_list(owner, experts)
        self._check_parts(gate, experts)
        if num_experts is None:
            num_experts = getattr(experts, "num_experts", None)
        self.num_experts = options.integer(owner, "num_experts", num_experts, 1)
        _check_fit(owner, gate, experts, self.num_experts)
        self.gate = gate
        self.experts = experts
        self.observer: Observer | None = None

    # Typed Any, so that readers need no check for None. In evaluation without gradients every read
    # computes from the last call's tensors: those of a CUDA graph change with each replay.
    @property
    def l_aux(self) -> Tensor | Any:
        """The auxiliary loss of the last call; None before the first."""
        return None if self.outcome is None else _computed(self.outcome.l_aux)

    @l_aux.setter
    def l_aux(self, l_aux: Tensor | None) -> None:
        self.outcome = (self.outcome or Outcome())._replace(l_aux=l_aux)

    @property
    def exp_counts(self) -> Tensor | Any:
        """Routes that asked for each expert in the last call, [E] int64; None before the first."""
        load = None if self.outcome is None else self.outcome.load
        return None if load is None else load.to(torch.int64)

    @exp_counts.setter
    def exp_counts(self, exp_counts: Tensor | None) -> None:
        self.outcome = (self.outcome or Outcome())._replace(load=exp_counts)

    def _check_parts(self, gate: nn.Module, experts: nn.Module) -> None:
        """Raise ValueError for parts that this layer cannot call."""
        for name, part, method in (("gate", gate, "route"), ("experts", experts, "routed")):
            if not isinstance(part, nn.Module) or not hasattr(part, method):
                raise ValueError(
                    f"{type(self).__name__}: {name} must be an nn.Module with {method}(), "
                    f"got {type(part).__name__}"
                )

    def forward(
        self, hidden: Tensor, used_token: Tensor | None = None, *, expert_ids: Tensor | None = None
    ) -> Tensor:
        """Send every token through its experts.

        Args:
            hidden: [..., H]
            used_token: a value for every token of hidden; one with 0 (or False) has no route: its
                routed output is zero
            expert_ids: [T, K] int32, a recorded choice (`Aux.expert_ids`) to make again

        Returns:
            hidden's shape and dtype
        """
        # FSDP may replace the instance's method by another entry into the layer.
        entry = type(self).forward_with_aux
        if entry is Layer.forward_with_aux:
            out, outcome = self._forward(hidden, used_token, expert_ids)
        else:
            out, aux = entry(self, hidden, used_token, expert_ids=expert_ids)
            outcome = Outcome(*aux)
        if self.training and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            l_aux = _warning_of_lost_gradient(outcome.l_aux, type(self).__name__)
            outcome = outcome._replace(l_aux=l_aux)
        # Without nn.Module's own __setattr__, which looks for parameters first.
        object.__setattr__(self, "outcome", outcome)
        return out

    def forward_with_aux(
        self, hidden: Tensor, used_token: Tensor | None = None, *, expert_ids: Tensor | None = None
    ) -> tuple[Tensor, Aux]:
        """`forward` without side effects, of the same arguments.

        Returns:
            (out, Aux(l_aux, exp_counts, expert_ids))
        """
        out, outcome = self._forward(hidden, used_token, expert_ids)
        return out, outcome.aux()

    def _forward(
        self, hidden: Tensor, used_token: Tensor | None, expert_ids: Tensor | None
    ) -> tuple[Tensor, Outcome]:
        if not isinstance(hidden, Tensor) or hidden.dim() == 0:
            got = "[]" if isinstance(hidden, Tensor) else type(hidden).__name__
            raise RuntimeError(f"{type(self).__name__}: hidden must be [..., H], got {got}")
        if hidden.dim() == 2:
            # A view: the gradients of gate and experts meet here, before others of hidden join.
            tokens = hidden.view_as(hidden)
        else:
            tokens = hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1])
        plan, weights, outcome, routing = self._route(tokens, used_token, expert_ids)
        if plan.num_experts != self.num_experts:
            raise RuntimeError(
                f"{type(self).__name__}: gate must choose among E = {self.num_experts} experts, "
                f"got {plan.num_experts}"
            )
        if self.observer is not None:
            self.observer(plan, outcome.aux(), routing, used_token)
        out = self._routed(tokens, plan, weights)
        out = as_dtype(out, hidden.dtype)
        return out if out.shape == hidden.shape else out.view_as(hidden), outcome

    def _route(
        self, tokens: Tensor, used_token: Tensor | None, expert_ids: Tensor | None
    ) -> tuple[Plan, Tensor, Outcome, Routing | None]:
        route, is_lazy = route_of(self.gate)
        routing = route(tokens, used_token, expert_ids)
        return routing.plan, routing.weights, Outcome.of(routing, is_lazy), routing

    def _routed(self, tokens: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        return self.experts.routed(tokens, plan, weights)

    def unobserved(self) -> dict[str, Any]:
        """Attributes to set for a call that leaves no trace, as of `explain`, then to restore."""
        return {"outcome": self.outcome}

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "outcome": None, "observer": None}


def _check_fit(owner: str, gate: nn.Module, experts: nn.Module, num_experts: int) -> None:
    wanted = getattr(gate, "num_experts", num_experts)
    if wanted != num_experts:
        raise ValueError(
            f"{owner}: experts must have the gate's num_experts = {wanted}, got {num_experts}"
        )
    widths = getattr(gate, "model_dim", None), getattr(experts, "hidden_size", None)
    if None not in widths and widths[0] != widths[1]:
        raise ValueError(
            f"{owner}: experts must have the gate's model_dim = {widths[0]} as hidden_size, "
            f"got {widths[1]}"
        )


def total_l_aux(model: nn.Module) -> Tensor:
    """Sum the auxiliary losses of the last call of every layer in a model.

    `loss + 0.01 * total_l_aux(model)` balances the routers. A layer that was not called yet, or
    whose gate has no loss, adds nothing. A layer used several times counts once, with its last
    call. A layer that a step skips, as LayerDrop does, would add the loss of an earlier step: set
    its `l_aux` to None first.

    Args:
        model: a layer, or a module that contains MOELayers, MoEs or Layers, wrapped or not

    Returns:
        [], not scaled, on the device of the last layer that was called; differentiable where the
        layers ran with gradients

    Raises:
        TypeError: the model is not a module
        ValueError: the model has no layer
        RuntimeError: no layer of the model was called yet
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"total_l_aux: model must be an nn.Module, got {name}")
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    if not layers:
        raise ValueError(f"total_l_aux: model must contain a MOELayer or a Layer, {name} does not")
    called = [layer for layer in layers if layer.outcome and layer.outcome.load is not None]
    if not called:
        raise RuntimeError(
            f"total_l_aux: no layer in this {name} was called yet; call the model first. "
            "forward_with_aux leaves nothing: add the l_aux that it returns"
        )
    device = called[-1].exp_counts.device
    total = torch.zeros((), dtype=torch.float32, device=device)
    for layer in called:
        if (l_aux := layer.l_aux) is not None:
            total = total + torch.as_tensor(l_aux, device=device)
    return total
