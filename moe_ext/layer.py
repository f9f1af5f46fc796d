"""The layer: a gate and experts."""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from . import options
from .deepspeed import masks
from .deepspeed.timers import Timers
from .experts.base import Experts, refuse_wrapped, routed
from .ops.plan import Plan
from .process_group import GroupAttribute
from .routing.gate import TopKGate
from .routing.route import Routing

MOE_TIMER = "moe"


class Aux(NamedTuple):
    """What a layer says beside its output. A pytree.

    Attributes:
        l_aux: [] auxiliary loss, not scaled
        exp_counts: [E] int64, routes that asked for an expert, before dropping
        expert_ids: [T, K] int32, the choice, -1 where there is none; `layer(hidden,
            expert_ids=...)` makes it again
    """

    l_aux: Tensor
    exp_counts: Tensor
    expert_ids: Tensor


# Of a call: where routes go, what the layer says of it, the gate's own decision, used_token.
Observer = Callable[[Plan, Aux | None, Routing | None, Tensor | None], None]


class _Router(Protocol):
    def route(self, tokens: Tensor, used_token: Tensor | None, *recorded: Tensor) -> Routing: ...


def _routes_itself(gate: nn.Module) -> TypeGuard[_Router]:
    """Whether a gate has `route`, and means it: a TopKGate with a forward of its own is used by
    that, as DeepSpeed's layer would."""
    if isinstance(gate, TopKGate) and type(gate).route is TopKGate.route:
        return type(gate).forward is TopKGate.forward
    refuse_wrapped("gate", gate, "wrap the layer")
    return hasattr(gate, "route") and hasattr(gate, "num_experts")


def _takes_recorded(gate: nn.Module) -> bool:
    if not _routes_itself(gate):
        return False
    try:
        inspect.signature(gate.route).bind(None, None, None)
    except TypeError:
        return False
    return True


def _route(
    gate: nn.Module, tokens: Tensor, used_token: Tensor | None, expert_ids: Tensor | None
) -> tuple[Plan, Tensor, Aux, Routing | None]:
    """With a gate written for DeepSpeed there is no Routing."""
    if expert_ids is not None and not _takes_recorded(gate):
        raise RuntimeError(
            f"MOELayer: expert_ids must be None with a gate of type {type(gate).__name__}, "
            "which has no route(tokens, used_token, expert_ids)"
        )
    if _routes_itself(gate):
        recorded = () if expert_ids is None else (expert_ids,)
        routing = gate.route(tokens, used_token, *recorded)
        if not isinstance(routing, Routing):
            raise RuntimeError(
                f"MOELayer: {type(gate).__name__}.route must return a moe_ext.Routing, "
                f"got {type(routing).__name__}"
            )
        plan = routing.plan
        aux = Aux(routing.l_aux, plan.load.to(torch.int64), plan.expert_ids)
        return plan, routing.weights, aux, routing
    knows_sparse = "sparse_routes" in inspect.signature(gate.forward).parameters
    result = gate(tokens, used_token, **({"sparse_routes": True} if knows_sparse else {}))
    plan, weights, l_aux, exp_counts = masks.plan_of(result, tokens)
    return plan, weights, Aux(l_aux, exp_counts, plan.expert_ids), None


class _LostGradient(Function):
    """The same value, without a way back to what it was computed from."""

    @staticmethod
    def forward(ctx, l_aux: Tensor) -> Tensor:
        return l_aux.view_as(l_aux)

    @staticmethod
    def backward(ctx, grad: Tensor) -> None:
        warnings.warn(
            "MOELayer: the gradient of l_aux is lost, so the loss does not balance the router. The "
            "layer ran without gradients, as in checkpoint(use_reentrant=True). Set "
            "use_reentrant=False, or return l_aux from the checkpointed function",
            stacklevel=2,
        )


def _warning_of_lost_gradient(l_aux: Tensor | Any) -> Tensor | Any:
    """l_aux of a call without gradients. Inside an autograd.Function, as checkpoint makes of the
    call with use_reentrant=True, it warns when a gradient reaches it.

    A Function that returns l_aux gives it a gradient: then it does not warn.
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
                return _LostGradient.apply(l_aux.detach().requires_grad_())
    return l_aux


class MOELayer(nn.Module):
    """Mixture of experts under DeepSpeed's name and arguments: a gate, and experts.

    `layer(hidden, used_token=None)` returns a tensor like hidden and leaves `l_aux` and
    `exp_counts` of that call as attributes; `total_l_aux(model)` sums those of a model. Under
    checkpointing (use_reentrant=False), export and compile + checkpoint use `forward_with_aux`,
    which returns them. In checkpoint(use_reentrant=True) the attribute `l_aux` has no gradient: a
    loss that takes it warns. Copies and pickles hold None for both.

    `observer(plan, aux, routing, used_token)`, where there is one, is told of every call, and that
    of stats.track counts it; routing is None with a gate written for DeepSpeed. Gate and experts
    may be replaced by others of as many experts. With `wall_clock_breakdown` set, `time_moe` is the
    time of all calls in milliseconds; torch.compile does not take that.

    Args:
        gate: a TopKGate, or a module with its `num_experts` and `route(tokens, used_token)`, which
            for recorded choices takes a third, `expert_ids`; or a gate written for DeepSpeed, whose
            `gate(tokens, used_token)` returns (l_aux, combine_weights [T, E, C], dispatch_mask
            [T, E, C], exp_counts [E]) or, where it knows `sparse_routes`, its seven of routes
        experts: Experts of as many; or a module written for DeepSpeed, that maps
            [1, num_local_experts, C, H] to the same shape. Without dropping C is the largest load
            then, which is read back from the device.
        ep_group_name: for DeepSpeed's callers, whose `experts` are one of ep_size parts, this
            process's: `_set_ep_group` makes an ExpertParallel of them. Others give one as experts.
        ep_size: for DeepSpeed's callers, parts that the experts have
        num_local_experts: experts in this process, where `experts` does not say it
        use_tutel: taken for DeepSpeed's callers; Tutel is not used

    Raises:
        ValueError: gate and experts do not fit
    """

    ep_group = GroupAttribute()

    def __init__(
        self,
        gate: nn.Module,
        experts: nn.Module,
        ep_group_name: str | None = None,
        ep_size: int = 1,
        num_local_experts: int | None = None,
        use_tutel: bool = False,
    ) -> None:
        super().__init__()
        if num_local_experts is None and isinstance(experts, nn.Module):
            num_local_experts = _num_experts(experts)
        self.num_experts = _check_fit(gate, experts, ep_size, num_local_experts)
        self.gate = gate
        self.experts = experts
        self.ep_group_name = ep_group_name
        self.ep_group = None
        self.ep_size = ep_size
        self.num_local_experts = _num_local_experts(experts, num_local_experts)
        self.use_tutel = False
        self.timers = Timers()
        self.wall_clock_breakdown = False
        self.time_moe = 0.0
        # Of exchanges between processes: they run beside other work and have no time of their own.
        self.time_falltoall = 0.0
        self.time_salltoall = 0.0
        # None before the first call, which `Tensor | None` would have every reader rule out.
        self.l_aux: Tensor | Any = None
        self.exp_counts: Tensor | Any = None
        self.observer: Observer | None = None

    def _set_ep_group(self, ep_group: dist.ProcessGroup | None) -> None:
        size = 1 if ep_group is None else ep_group.size()
        if size != self.ep_size:
            raise RuntimeError(
                f"MOELayer: ep_group must have ep_size = {self.ep_size} processes, got {size}"
            )
        set_group = getattr(self.gate, "_set_ep_group", None)
        if set_group is not None:
            set_group(ep_group)
        self.ep_group = ep_group
        if ep_group is not None and size > 1:
            from .parallel import ExpertParallel

            self.experts = ExpertParallel(
                self.experts,
                ep_group,
                num_local_experts=self.num_local_experts,
                ep_group_name=self.ep_group_name,
            )

    def forward(
        self,
        hidden: Tensor,
        used_token: Tensor | None = None,
        *,
        expert_ids: Tensor | None = None,
    ) -> Tensor:
        """Every token through its experts.

        Args:
            hidden: [..., H]
            used_token: a value for every token of hidden; one with 0 (or False) has no route: its
                routed output is zero
            expert_ids: [T, K] int32, a recorded choice (`Aux.expert_ids`) to make again

        Returns:
            hidden's shape and dtype
        """
        # Not the instance's, which FSDP makes another way into the layer.
        out, aux = type(self).forward_with_aux(self, hidden, used_token, expert_ids=expert_ids)
        self.l_aux, self.exp_counts = aux.l_aux, aux.exp_counts
        if self.training and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.l_aux = _warning_of_lost_gradient(aux.l_aux)
        return out

    def forward_with_aux(
        self,
        hidden: Tensor,
        used_token: Tensor | None = None,
        *,
        expert_ids: Tensor | None = None,
    ) -> tuple[Tensor, Aux]:
        """`forward` without side effects.

        Args:
            hidden: as of `forward`
            used_token: as of `forward`
            expert_ids: as of `forward`

        Returns:
            (out, Aux(l_aux, exp_counts, expert_ids))
        """
        if not isinstance(hidden, Tensor) or hidden.dim() == 0:
            got = "[]" if isinstance(hidden, Tensor) else type(hidden).__name__
            raise RuntimeError(f"MOELayer: hidden must be [..., H], got {got}")
        if not self.wall_clock_breakdown:
            return self._forward(hidden, used_token, expert_ids)
        with self.timers.time(MOE_TIMER):
            result = self._forward(hidden, used_token, expert_ids)
        self.time_moe = self.timers(MOE_TIMER).elapsed(reset=False)
        return result

    def _forward(
        self, hidden: Tensor, used_token: Tensor | None, expert_ids: Tensor | None
    ) -> tuple[Tensor, Aux]:
        tokens = hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1])
        if self.ep_size > 1 and self.ep_group is None:
            raise RuntimeError(
                f"MOELayer: with ep_size = {self.ep_size} its process group must be set first, by "
                "MoE.set_deepspeed_parallelism() or _set_ep_group(group). deepspeed.initialize "
                "does so; deepspeed.init_inference does not, and is not supported with ep_size > 1"
            )
        plan, weights, aux, routing = _route(self.gate, tokens, used_token, expert_ids)
        if plan.num_experts != self.num_experts:
            raise RuntimeError(
                f"MOELayer: gate must choose among E = {self.num_experts} experts, "
                f"got {plan.num_experts}"
            )
        if self.observer is not None:
            self.observer(plan, aux, routing, used_token)
        out = routed(self.experts, tokens, plan, weights)
        return out.to(hidden.dtype).view(hidden.shape), aux

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "l_aux": None, "exp_counts": None, "observer": None}


def total_l_aux(model: nn.Module) -> Tensor:
    """Sum the auxiliary losses that the layers of a model left in their last call.

    `loss + 0.01 * total_l_aux(model)` keeps the routers of a model balanced. A layer that was not
    called yet, or whose gate has no loss, adds nothing. A layer in several places of the model
    counts once, with its last call.

    Args:
        model: a MOELayer, or a module with MOELayers or MoEs in it, wrapped or not

    Returns:
        [], not scaled, on the device of the last layer that was called; differentiable where the
        layers ran with gradients

    Raises:
        TypeError: the model is not a module
        ValueError: the model has no MOELayer
        RuntimeError: no MOELayer of the model was called yet
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"total_l_aux: model must be an nn.Module, got {name}")
    layers = [module for module in model.modules() if isinstance(module, MOELayer)]
    if not layers:
        raise ValueError(f"total_l_aux: model must have a MOELayer in it, {name} has none")
    called = [layer for layer in layers if layer.exp_counts is not None]
    if not called:
        raise RuntimeError(
            f"total_l_aux: no MOELayer in this {name} was called yet; call the model first. "
            "forward_with_aux leaves nothing: add the l_aux that it returns"
        )
    device = called[-1].exp_counts.device
    total = torch.zeros((), device=device)
    for layer in called:
        if layer.l_aux is not None:
            total = total + torch.as_tensor(layer.l_aux, device=device)
    return total


def _num_experts(experts: nn.Module) -> int:
    for name in ("num_experts", "num_local_experts"):
        if isinstance(getattr(experts, name, None), int):
            return getattr(experts, name)
    raise ValueError(
        "MOELayer: num_local_experts must be given where experts are not moe_ext.Experts, got "
        f"{type(experts).__name__}; moe_ext.ModuleExperts takes an nn.ModuleList of one module per "
        "expert, or one module to copy"
    )


def _num_local_experts(experts: nn.Module, num_experts: int) -> int:
    """Of moe_ext's own those that are here; others are all here."""
    is_own = isinstance(experts, Experts)
    return getattr(experts, "num_local_experts", num_experts) if is_own else num_experts


def _check_gate(gate: nn.Module) -> None:
    name = type(gate).__name__
    if not isinstance(gate, nn.Module) or isinstance(gate, Experts):
        raise ValueError(f"MOELayer: gate must be an nn.Module with route(), got {name}")
    if hasattr(gate, "route"):
        if not hasattr(gate, "num_experts"):
            raise ValueError(f"MOELayer: {name} has route, but no num_experts")
        return
    try:
        inspect.signature(gate.forward).bind(None, None)
    except TypeError:
        raise ValueError(
            "MOELayer: gate must have route(tokens, used_token), or DeepSpeed's forward(tokens, "
            f"used_token), got {name}; to make logits with it use TopKGate(model_dim, num_experts, "
            "router=gate)"
        ) from None
    except ValueError:  # a signature that Python does not know
        pass


def _check_fit(gate: nn.Module, experts: nn.Module, ep_size: int, num_local_experts: int) -> int:
    """Returns the number of all experts."""
    _check_gate(gate)
    if not isinstance(experts, nn.Module) or isinstance(experts, TopKGate):
        raise ValueError(f"MOELayer: experts must be a module, got {type(experts).__name__}")
    options.integer("MOELayer", "ep_size", ep_size, 1)
    if ep_size > 1 and _num_local_experts(experts, num_local_experts) < num_local_experts:
        raise ValueError(
            f"MOELayer: ep_size must be 1 with experts that are ExpertParallel, got {ep_size}"
        )
    if isinstance(experts, Experts) and num_local_experts != experts.num_experts:
        raise ValueError(
            f"MOELayer: num_local_experts must be {experts.num_experts}, got {num_local_experts}"
        )
    num_experts = ep_size * num_local_experts
    if getattr(gate, "num_experts", num_experts) != num_experts:
        raise ValueError(
            f"MOELayer: experts must have the gate's num_experts = {gate.num_experts}, "
            f"got {num_experts}"
        )
    widths = getattr(gate, "model_dim", None), getattr(experts, "hidden_size", None)
    if None not in widths and widths[0] != widths[1]:
        raise ValueError(
            f"MOELayer: experts must have the gate's model_dim = {widths[0]} as hidden_size, "
            f"got {widths[1]}"
        )
    return num_experts
