"""Gates written for DeepSpeed's layer, called as moe_ext's layer calls its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..experts.base import Experts
from ..experts.padded import refuse_wrapped
from ..layer import Aux
from ..ops.plan import Plan
from ..routing.route import Routing
from . import masks
from .gate import TopKGate

Decision = tuple[Plan, Tensor, Aux, Routing | None]
# (gate, tokens, used_token, expert_ids) -> a decision; Routing is None where the gate gives none.
Decide = Callable[[nn.Module, Tensor, Tensor | None, Tensor | None], Decision]


def decide_by(gate: nn.Module) -> Decide:
    """The function that asks a gate of this kind.

    Args:
        gate: a module with `num_experts` and `route(tokens, used_token)`, with or without a third
            argument for recorded choices; or a module whose `gate(tokens, used_token)` returns one
            of DeepSpeed's tuples

    Raises:
        ValueError: the module is neither
        RuntimeError: the module is wrapped alone, as by torch.compile
    """
    name = type(gate).__name__
    if not isinstance(gate, nn.Module) or isinstance(gate, Experts):
        raise ValueError(f"MOELayer: gate must be an nn.Module with route(), got {name}")
    # A TopKGate with a forward of its own is used by that, as in DeepSpeed's layer.
    changes_forward = isinstance(gate, TopKGate) and type(gate).route is TopKGate.route
    if changes_forward and type(gate).forward is not TopKGate.forward:
        return _by_forward(gate)
    refuse_wrapped("gate", gate, "wrap the layer")
    if not hasattr(gate, "route"):
        return _by_forward(gate)
    if not hasattr(gate, "num_experts"):
        raise ValueError(f"MOELayer: {name} has route, but no num_experts")
    return partial(_by_route, _takes(gate.route, 3))


def _takes(function: Any, arguments: int) -> bool:
    try:
        inspect.signature(function).bind(*(None,) * arguments)
    except TypeError:
        return False
    except ValueError:  # a signature that Python does not know
        pass
    return True


def _by_forward(gate: nn.Module) -> Decide:
    if not _takes(gate.forward, 2):
        raise ValueError(
            "MOELayer: gate must have route(tokens, used_token), or DeepSpeed's forward(tokens, "
            f"used_token), got {type(gate).__name__}; to make logits with it use "
            "TopKGate(model_dim, num_experts, router=gate)"
        )
    knows_sparse = "sparse_routes" in inspect.signature(gate.forward).parameters
    return partial(_by_tuple, {"sparse_routes": True} if knows_sparse else {})


def _by_route(
    takes_recorded: bool,
    gate: nn.Module,
    tokens: Tensor,
    used_token: Tensor | None,
    expert_ids: Tensor | None,
) -> Decision:
    if takes_recorded:
        routing = gate.route(tokens, used_token, expert_ids)  # type: ignore[operator]
    else:
        _refuse_recorded(gate, expert_ids)
        routing = gate.route(tokens, used_token)  # type: ignore[operator]
    if not isinstance(routing, Routing):
        raise RuntimeError(
            f"MOELayer: {type(gate).__name__}.route must return a moe_ext.Routing, "
            f"got {type(routing).__name__}"
        )
    return routing.plan, routing.weights, Aux.of(routing), routing


def _by_tuple(
    options: dict[str, bool],
    gate: nn.Module,
    tokens: Tensor,
    used_token: Tensor | None,
    expert_ids: Tensor | None,
) -> Decision:
    _refuse_recorded(gate, expert_ids)
    result = gate(tokens, used_token, **options)
    plan, weights, l_aux, exp_counts = masks.plan_of(result, tokens)
    return plan, weights, Aux(l_aux, exp_counts, plan.expert_ids), None


def _refuse_recorded(gate: nn.Module, expert_ids: Tensor | None) -> None:
    if expert_ids is not None:
        raise RuntimeError(
            f"MOELayer: expert_ids must be None with a gate of type {type(gate).__name__}, "
            "which has no route(tokens, used_token, expert_ids)"
        )
