"""Gates written for DeepSpeed's layer, called as moe_ext's layer calls its own."""

import functools
import inspect
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn

from ..experts.base import Experts
from ..experts.padded import refuse_wrapped
from ..layer import Outcome, route_of
from ..ops.plan import Plan
from ..routing.route import Routing
from . import masks
from .gate import TopKGate

Decision = tuple[Plan, Tensor, Outcome, Routing | None]


def has_route(gate: nn.Module) -> bool:
    """Whether a gate is asked by its `route`; otherwise by DeepSpeed's forward. See MOELayer.

    Raises:
        ValueError: the module has neither
        RuntimeError: the module is wrapped alone, as by torch.compile
    """
    name = type(gate).__name__
    if not isinstance(gate, nn.Module) or isinstance(gate, Experts):
        raise ValueError(f"MOELayer: gate must be an nn.Module with route(), got {name}")
    # A TopKGate with a forward of its own is used by that, as in DeepSpeed's layer.
    changes_forward = isinstance(gate, TopKGate) and type(gate).route is TopKGate.route
    if changes_forward and type(gate).forward is not TopKGate.forward:
        return False
    refuse_wrapped("gate", gate)
    if hasattr(gate, "route"):
        if not hasattr(gate, "num_experts"):
            raise ValueError(f"MOELayer: {name} has route, but no num_experts")
        return True
    if not _takes(gate, "forward", 2):
        raise ValueError(
            "MOELayer: gate must have route(tokens, used_token), or DeepSpeed's forward(tokens, "
            f"used_token), got {name}; to make logits with it use "
            "TopKGate(model_dim, num_experts, router=gate)"
        )
    return False


def decide(
    gate: nn.Module, tokens: Tensor, used_token: Tensor | None, expert_ids: Tensor | None
) -> Decision:
    """Ask a gate; without `route` it gives no Routing.

    Raises:
        ValueError, RuntimeError: as `has_route`, or the gate's result is not one
    """
    name, by_route = type(gate).__name__, has_route(gate)
    recorded = () if expert_ids is None else (expert_ids,)
    if recorded and not (by_route and _takes(gate, "route", 3)):
        raise RuntimeError(
            f"MOELayer: expert_ids must be None with a gate of type {name}, which has no "
            "route(tokens, used_token, expert_ids)"
        )
    if by_route:
        route, is_lazy = route_of(gate)
        routing = route(tokens, used_token, *recorded)
        if not isinstance(routing, Routing):
            raise RuntimeError(
                f"MOELayer: {name}.route must return a moe_ext.Routing, "
                f"got {type(routing).__name__}"
            )
        return routing.plan, routing.weights, Outcome.of(routing, is_lazy), routing
    signature = _signature(gate, "forward")
    knows_sparse = signature is not None and "sparse_routes" in signature.parameters
    result = gate(tokens, used_token, **({"sparse_routes": True} if knows_sparse else {}))
    plan, weights, l_aux, exp_counts = masks.plan_of(result, tokens)
    return plan, weights, Outcome(l_aux, exp_counts, plan.expert_ids), None


def _takes(gate: nn.Module, name: str, arguments: int) -> bool:
    signature = _signature(gate, name)
    if signature is None:
        return True
    try:
        signature.bind(*(None,) * arguments)
    except TypeError:
        return False
    return True


def _signature(gate: nn.Module, name: str) -> inspect.Signature | None:
    """The signature of a gate's method; None where Python does not know it, as of builtins."""
    method = getattr(gate, name)
    # torch.compile would trace through the cache, and warn of it.
    if not torch.compiler.is_compiling():
        function = getattr(type(gate), name, None)
        is_method = isinstance(method, MethodType) and method.__func__ is function
        if is_method and isinstance(function, FunctionType):
            return _signature_of_method(function)
    try:
        return inspect.signature(method)
    except ValueError:
        return None


@functools.lru_cache
def _signature_of_method(function: FunctionType) -> inspect.Signature:
    """The signature without `self`, read once for each function of a class."""
    return inspect.signature(MethodType(function, object()))
