"""Plans for experts that do not divide evenly among ranks.

An exchange sends every rank the rows of as many places. A rank with fewer experts has one place
without an expert, its last one, which gets no routes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.plan import Plan


def places_of_rank(num_experts: int, size: int) -> int:
    """How many places each of `size` ranks has: the experts of the first rank."""
    return -(-num_experts // size)


def to_places(plan: Plan, size: int) -> Plan:
    """Number a plan's experts by their places, of which `size` ranks have equally many.

    The rows of experts stay in their order. With a capacity, a place without an expert has a buffer
    of empty rows.
    """
    E, C, P = plan.num_experts, plan.capacity, size * places_of_rank(plan.num_experts, size)
    ids = torch.arange(E, dtype=plan.load.dtype, device=plan.load.device)
    place = (ids + _gaps_before(ids, E, size)).long()
    gaps = _gaps_before(plan.expert_ids, E, size)
    load = plan.load.new_zeros(P).index_copy(0, place, plan.load)
    slots, sources = plan.slots, plan.sources
    if C is None:
        rows = plan.offsets.new_zeros(P).index_copy(0, place, plan.offsets.diff())
        offsets = F.pad(rows.cumsum(0, dtype=rows.dtype), (1, 0))
    else:
        slots = torch.where(slots >= 0, slots + gaps * C, -1)
        sources = sources.new_full((P, C), -1).index_copy(0, place, sources.view(E, C)).flatten()
        offsets = torch.arange(P + 1, dtype=plan.offsets.dtype, device=plan.offsets.device) * C
    return Plan(slots, sources, offsets, load, plan.expert_ids + gaps, P, C)


def without_gap(plan: Plan, num_experts: int) -> Plan:
    """Cut a plan of one rank's places to its experts, which have the first ones."""
    if num_experts == plan.num_experts:
        return plan
    sources = plan.sources
    if plan.capacity is not None:
        sources = sources[: num_experts * plan.capacity]
    return plan._replace(
        sources=sources,
        offsets=plan.offsets[: num_experts + 1],
        load=plan.load[:num_experts],
        num_experts=num_experts,
    )


def _gaps_before(ids: Tensor, num_experts: int, size: int) -> Tensor:
    """How many places without an expert come before that of each id; 0 for the id -1."""
    fewer, ranks_with_more = divmod(num_experts, size)
    return (ids - ranks_with_more * (fewer + 1)).clamp(min=0) // fewer
