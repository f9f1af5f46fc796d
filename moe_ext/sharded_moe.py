"""Routes in DeepSpeed's words and forms: S tokens, E experts, C capacity, locations in an expert.

Source: deepspeed/moe/sharded_moe.py of DeepSpeed 0.19. The masks are quadratic in the tokens, since
E * C grows with S; the layer works on the plan instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .topk_gate import Routing


def _exp_counts(routing: Routing) -> Tensor:
    return routing.plan.load.to(torch.int64)


def _capacity(routing: Routing) -> int:
    """C, in a plan without capacity the largest load: read back from the device."""
    plan = routing.plan
    return int(plan.load.max()) if plan.capacity is None else plan.capacity


def _locations(routing: Routing) -> tuple[Tensor, Tensor]:
    """Expert, -1 where dropped, and row within the expert, 0 where dropped. Both [S, K] int64."""
    plan = routing.plan
    kept = plan.slots >= 0
    experts = torch.where(kept, plan.experts, -1).long()
    starts = plan.offsets[experts.clamp(min=0)]
    return experts, torch.where(kept, plan.slots - starts, 0).long()


def dense_routes(routing: Routing) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(l_aux, combine_weights [S, E, C], dispatch_mask [S, E, C] bool, exp_counts [E] int64)."""
    S, E, C = routing.weights.shape[0], routing.plan.num_experts, _capacity(routing)
    experts, locations = _locations(routing)
    # A last column takes the dropped routes, and is cut off.
    index = torch.where(experts >= 0, experts * C + locations, E * C)
    flat = routing.weights.new_zeros(S, E * C + 1).scatter(1, index, routing.weights)
    combine_weights = flat[:, :-1].reshape(S, E, C)
    return routing.l_aux, combine_weights, combine_weights.bool(), _exp_counts(routing)


def sparse_routes(routing: Routing) -> tuple:
    """(l_aux, C [] int64, E, indices, locations, gates, exp_counts [E] int64), routes [K, S].

    indices int32, -1 where dropped; locations int32 and gates like the weights, 0 where dropped.
    """
    experts, locations = _locations(routing)
    return (
        routing.l_aux,
        torch.tensor(_capacity(routing)),
        routing.plan.num_experts,
        experts.t().to(torch.int32).contiguous(),
        locations.t().to(torch.int32).contiguous(),
        routing.weights.t().contiguous(),
        _exp_counts(routing),
    )


def tutel_routes(routing: Routing) -> tuple:
    """(l_aux, C [] int64, E, indices, locations, gates, exp_counts), lists of K tensors [S]."""
    experts, locations = _locations(routing)
    return (
        routing.l_aux,
        torch.tensor(_capacity(routing)),
        routing.plan.num_experts,
        list(experts.unbind(dim=1)),
        list(locations.unbind(dim=1)),
        list(routing.weights.unbind(dim=1)),
        _exp_counts(routing),
    )
