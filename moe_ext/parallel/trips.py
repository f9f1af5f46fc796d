"""What goes out to the experts of other processes, and what becomes of it there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..contracts import accumulate_dtype
from ..functional import dispatch
from ..losses import expert_load
from ..plan import Plan, make_plan
from .exchange import Exchange, Path, back, finish, start


class Trip(NamedTuple):
    """A part of the work: what goes out, and what becomes of it.

    out: tensors [R, ...] that travel together
    arrive: of what came, gives the tokens, plan and weights of the experts here
    """

    path: Path
    out: tuple[Tensor, ...]
    arrive: Callable[..., tuple[Tensor, Plan, Tensor]]


def travel(
    trips: list[Trip], run: Callable[..., Tensor], work: Callable[[], Tensor] | None
) -> tuple[list[Tensor], Tensor | None]:
    """Every part to its experts and back. The next one travels while the experts work."""

    def depart(trip: Trip):
        return [start(tensor, trip.path) for tensor in trip.out]

    coming = depart(trips[0])
    result = None if work is None else work()
    leaving = []
    for i, trip in enumerate(trips):
        arriving = coming
        if i + 1 < len(trips):
            coming = depart(trips[i + 1])
        arrived = trip.arrive(*(finish(tensor) for tensor in arriving))
        leaving.append(start(run(*arrived), back(trip.path)))
    return [finish(rows) for rows in leaving], result


def rooms_of_experts(exchange: Exchange, rooms: Tensor, kept: Tensor, overlap: int) -> list[Trip]:
    """Every expert's room goes to its process, empty rows too.

    rooms: [E, C, H], of which kept [E] rows of each expert are filled
    """
    E, _, H = rooms.shape
    W, L = exchange.size, E // exchange.size
    load = exchange.counts(kept.view(W, L))
    trips, done = [], 0
    for part in rooms.tensor_split(overlap, dim=1):
        C = part.shape[1]
        ids = _ids_of_rooms((load - done).clamp(0, C), C)

        def arrive(rows: Tensor, ids: Tensor = ids, C: int = C):
            return rows, make_plan(ids, L, W * C), _ones(rows)

        trips.append(Trip(exchange.equal(L * C), (part.reshape(-1, H),), arrive))
        done += C
    return trips


def once_per_route(
    exchange: Exchange, num_experts: int, parts: list
) -> tuple[list[Trip], list[Plan]]:
    """parts: tokens [T, H], experts [T, K] and weights [T, K] of each. Every route has a row of
    its own. Also the plans of the rows that go out.
    """
    W, L = exchange.size, num_experts // exchange.size
    plans = [make_plan(ids, num_experts, order="token") for _, ids, _ in parts]
    loads = torch.stack([plan.load.view(W, L) for plan in plans], dim=1)
    counts = torch.cat([loads.sum(dim=2, keepdim=True, dtype=loads.dtype), loads], dim=2)
    paths, received, sums = exchange.counted(counts)
    plans = [_without_empty_rows(*pair) for pair in zip(plans, paths, strict=True)]
    local = torch.arange(L, dtype=torch.int32, device=counts.device).repeat(W)
    trips = []
    for i, (plan, path, (tokens, _, _)) in enumerate(zip(plans, paths, parts, strict=True)):

        def arrive(rows: Tensor, load: Tensor = received[:, i, 1:], total: int = sums[i][0]):
            ids = local.repeat_interleave(load.flatten(), output_size=total)
            return rows, make_plan(ids[:, None], L, order="token"), _ones(rows)

        trips.append(Trip(path, (dispatch(tokens, plan),), arrive))
    return trips, plans


def once_per_process(
    exchange: Exchange, num_experts: int, parts: list
) -> tuple[list[Trip], list[Plan]]:
    """The same, where a token goes once to a process, with its ids and weights."""
    W, L = exchange.size, num_experts // exchange.size
    owners = [torch.where(ids >= 0, ids // L, -1) for _, ids, _ in parts]
    plans = [make_plan(_first_of_each(ranks), W, order="token") for ranks in owners]
    rows = torch.stack([plan.load for plan in plans], dim=1)
    routes = torch.stack([expert_load(ranks, W) for ranks in owners], dim=1)
    counts = torch.stack([rows.to(routes.dtype), routes], dim=2)
    paths, _, sums = exchange.counted(counts)
    plans = [_without_empty_rows(*pair) for pair in zip(plans, paths, strict=True)]
    trips = []
    for i, (plan, path, ranks, (tokens, ids, weights)) in enumerate(
        zip(plans, paths, owners, parts, strict=True)
    ):
        token = plan.sources // ids.shape[1]
        to = ranks.flatten()[plan.sources]
        is_there = ranks[token] == to[:, None]
        there = torch.where(is_there, ids[token] % L, -1)
        weighed = torch.where(is_there, dispatch(weights, plan), 0)

        def arrive(rows: Tensor, ids: Tensor, weights: Tensor, total: int = sums[i][1]):
            plan = make_plan(ids, L, order="token")
            return rows, plan._replace(sources=plan.sources[:total]), weights

        trips.append(Trip(path, (dispatch(tokens, plan), there, weighed), arrive))
    return trips, plans


def _ones(rows: Tensor) -> Tensor:
    return torch.ones(rows.shape[0], 1, dtype=accumulate_dtype(rows.dtype), device=rows.device)


def _ids_of_rooms(load: Tensor, capacity: int) -> Tensor:
    """The experts [W * L * C, 1] of rows in rooms of which the first `load` [W, L] are filled."""
    L = load.shape[1]
    ids = torch.arange(L, dtype=torch.int32, device=load.device)[:, None]
    place = torch.arange(capacity, dtype=torch.int32, device=load.device)
    return torch.where(place < load[..., None], ids, -1).view(-1, 1)


def _first_of_each(ranks: Tensor) -> Tensor:
    """[T, K] with -1 for what stands in an earlier column too."""
    equal = ranks[:, :, None] == ranks[:, None, :]
    return torch.where(equal.tril(-1).any(dim=2), -1, ranks)


def _without_empty_rows(plan: Plan, path: Path) -> Plan:
    # All rows of a plan without gaps that routes own come first.
    sent = path[0].send if hasattr(path[0], "send") else path[0].sizes
    return plan._replace(sources=plan.sources[: sum(sent)])
