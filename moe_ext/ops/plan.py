"""The placement of routes in rows, which dispatch, the experts and combine share."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..options import Order
from . import registry


class Plan(NamedTuple):
    """A row for every kept route. A pytree; integers only, no gradient.

    Attributes:
        slots: [T, K] int32, the row of a route, -1 where it was dropped or is none
        sources: [R] int32, the route t * K + k of a row, -1 where it is empty
        offsets: [E+1] int32, the first row of every expert
        load: [E] int32, routes that asked for an expert, before dropping
        expert_ids: [T, K] int32, the ids the plan was made from
        num_experts: E
        capacity: rows per expert, None where nothing is dropped

    The rows of expert e that a route owns are offsets[e] and the min(load[e], room) after it, room
    being offsets[e+1] - offsets[e]. With a capacity C the rows are a view as [E, C, H].
    """

    slots: Tensor
    sources: Tensor
    offsets: Tensor
    load: Tensor
    expert_ids: Tensor
    num_experts: int
    capacity: int | None

    def kept(self) -> Tensor:
        """Routes of every expert that have a row. [E] int32."""
        return torch.minimum(self.load, self.offsets.diff())


def make_plan(
    expert_ids: Tensor,
    num_experts: int,
    capacity: int | None = None,
    *,
    priority: Tensor | None = None,
    order: Order = "choice",
    align: int = 1,
) -> Plan:
    """Give every route of `expert_ids` a row, or drop it.

    Args:
        expert_ids: [T, K] int32 ids in 0..E-1, -1 where a token has no such choice. On the CPU
            another id is an error, elsewhere it counts as -1.
        num_experts: E
        capacity: rows per expert, R = E * capacity; None drops nothing
        priority: [T, K] float32, who is kept where routes are dropped: per expert the largest, NaN
            below every number, equal ones in the order of the queue
        order: how routes queue, "choice" (all first choices, then all second ones) or "token".
            Without a priority the first ones are kept; rows are given in this order either way.
        align: without a capacity, every expert's rows are rounded up to a multiple of it. R follows
            from shapes alone: N = T * K for align 1, else
            align * floor((N + min(E, N) * (align - 1)) / align).

    Raises:
        RuntimeError: an argument breaks this contract
    """
    slots, sources, offsets, load = registry.operator("plan")(
        expert_ids, priority, num_experts, capacity, order, align
    )
    return Plan(slots, sources, offsets, load, expert_ids, num_experts, capacity)
