"""What goes out to the experts of other processes, and what becomes of it there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ..ops.checks import accumulate_dtype
from ..ops.functional import dispatch, has_autocast
from ..ops.plan import Plan, make_plan
from ..routing.losses import expert_load
from .all_to_all import Exchange, Move, Path, Travelling, back, finish, start
from .consistency import Call


class Trip(NamedTuple):
    """A part of the work: what goes out, and what becomes of it.

    out: tensors [R, ...] that travel together
    arrive: of what came, gives the arguments of `run`: the tokens, plan and weights of the experts
        here, or their rooms
    """

    path: Path
    out: tuple[Tensor, ...]
    arrive: Callable[..., tuple]


_Departed = tuple[Path, Callable[..., tuple], list[Travelling]]


def travel(
    trips: Iterable[Trip], run: Callable[..., Tensor], work: Callable[[], Tensor] | None
) -> Travelled:
    """Every part to its experts and back. The next one travels while the experts work.

    After an exception all rows travel still, NaN in place of what a `run` would give: another rank
    that waits for them would take the next message for rows. `run` may exchange rows too, so that
    it is called for every part.
    """
    attempt = _Attempt()
    leaving, result, nodes = [], None, []
    departed = map(_depart, trips)
    # One ahead; what has left is not kept.
    coming: _Departed | None = next(departed)
    if work is not None:
        result = attempt(work)
    while coming is not None:
        (path, arrive, arriving), coming = coming, next(departed, None)
        if not torch.compiler.is_compiling():
            nodes += [tensor.rows.grad_fn for tensor in arriving if tensor.rows.requires_grad]
        arrived = list(map(finish, arriving))
        rows = attempt(_at_experts, run, arrive, arrived)
        if rows is None:  # which no experts give
            rows = arrived[0].new_full(arrived[0].shape, torch.nan)
        leaving.append(start(rows, back(path)))
    return Travelled(list(map(finish, leaving)), result, attempt.failure, nodes)


def _at_experts(run: Callable[..., Tensor], arrive: Callable, arrived: list[Tensor]) -> Tensor:
    rows = run(*arrive(*arrived))
    expected, dtype, device = arrived[0].shape, arrived[0].dtype, arrived[0].device
    if not isinstance(rows, Tensor) or rows.shape != expected:
        got = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise RuntimeError(
            f"ExpertParallel: experts must return [R, H] = {list(expected)}, got {got}"
        )
    # All ranks send rows of a width that the call tells.
    if has_autocast(device) and rows.dtype == torch.get_autocast_dtype(device.type):
        return rows
    return rows.to(dtype)


class Travelled(NamedTuple):
    """What `travel` gives.

    backs: the rows that came back
    result: of `work`
    failure: the first exception that `run` or `work` raised
    nodes: in the backward, those that send the gradients of what went out
    """

    backs: list[Tensor]
    result: Tensor | None
    failure: BaseException | None
    nodes: list[Node | None]


class _Attempt:
    """Calls functions and keeps the first exception that one raises."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None

    def __call__(self, function: Callable[..., Tensor], *args) -> Tensor | None:
        if torch.compiler.is_compiling():
            return function(*args)
        try:
            return function(*args)
        except BaseException as error:  # an interrupt too
            self.failure = self.failure or error
        return None


def _depart(trip: Trip) -> _Departed:
    return trip.path, trip.arrive, [start(tensor, trip.path) for tensor in trip.out]


def rooms_of_experts(
    exchange: Exchange,
    call: Call,
    rooms: Tensor,
    kept: Tensor,
    overlap: int,
    is_named: bool,
    as_rooms: bool,
) -> list[Trip]:
    """Every expert's room goes to its process, empty rows too.

    rooms: [E, C, H], of which kept [E] rows of each expert are filled
    as_rooms: the experts take rooms [ranks, experts here, C, H], not tokens, a plan and weights
    """
    E, _, H = rooms.shape
    W, L = exchange.size, E // exchange.size
    load = exchange.counts(call, kept.view(W, L), is_named)
    trips, done = [], 0
    for part in rooms.tensor_split(overlap, dim=1):
        C = part.shape[1]
        ids = _ids_of_rooms((load - done).clamp(0, C), C)

        def arrive(rows: Tensor, ids: Tensor = ids, C: int = C) -> tuple:
            if as_rooms:
                return (rows.view(W, L, C, H),)
            return rows, make_plan(ids, L, W * C), _ones(rows)

        trips.append(Trip(exchange.equal(L * C), (part.reshape(-1, H),), arrive))
        done += C
    return trips


def once_per_route(
    exchange: Exchange, call: Call, parts: list
) -> tuple[Iterator[Trip], list[Plan]]:
    """parts: tokens [T, H], experts [T, K] and weights [T, K] of each. Every route has a row of
    its own. Also the plans of the rows that go out.
    """
    W, L = exchange.size, call.num_experts // exchange.size
    plans = [make_plan(ids, call.num_experts, order="token") for _, ids, _ in parts]
    loads = torch.stack([plan.load.view(W, L) for plan in plans], dim=1)
    counts = torch.cat([loads.sum(dim=2, keepdim=True, dtype=loads.dtype), loads], dim=2)
    paths, received, sums = exchange.counted(call, counts)
    plans = [_without_empty_rows(*pair) for pair in zip(plans, paths, strict=True)]
    local = torch.arange(L, dtype=torch.int32, device=counts.device).repeat(W)

    def trip(i: int) -> Trip:
        plan, load, total = plans[i], received[:, i, 1:], sums[i][0]

        def arrive(rows: Tensor) -> tuple[Tensor, Plan, Tensor]:
            ids = local.repeat_interleave(load.flatten(), output_size=total)
            return rows, make_plan(ids[:, None], L, order="token"), _ones(rows)

        return Trip(paths[i], (dispatch(parts[i][0], plan),), arrive)

    return map(trip, range(len(parts))), plans


def once_per_process(
    exchange: Exchange, call: Call, parts: list
) -> tuple[Iterator[Trip], list[Plan]]:
    """The same, where a token goes once to a process, with its ids and weights."""
    W, L = exchange.size, call.num_experts // exchange.size
    owners = [torch.where(ids >= 0, ids // L, -1) for _, ids, _ in parts]
    plans = [make_plan(_first_of_each(ranks), W, order="token") for ranks in owners]
    rows = torch.stack([plan.load for plan in plans], dim=1)
    routes = torch.stack([expert_load(ranks, W) for ranks in owners], dim=1)
    counts = torch.stack([rows.to(routes.dtype), routes], dim=2)
    paths, _, sums = exchange.counted(call, counts)
    plans = [_without_empty_rows(*pair) for pair in zip(plans, paths, strict=True)]

    def trip(i: int) -> Trip:
        plan, ranks, total = plans[i], owners[i], sums[i][1]
        tokens, ids, weights = parts[i]
        token = plan.sources // ids.shape[1]
        is_there = ranks[token] == ranks.flatten()[plan.sources][:, None]
        there = torch.where(is_there, ids[token] % L, -1)

        def arrive(rows: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Plan, Tensor]:
            plan = make_plan(ids, L, order="token")
            return rows, plan._replace(sources=plan.sources[:total]), weights

        return Trip(paths[i], (dispatch(tokens, plan), there, dispatch(weights, plan)), arrive)

    return map(trip, range(len(parts))), plans


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
    first = path[0]
    sent = first.send if isinstance(first, Move) else first.sizes
    return plan._replace(sources=plan.sources[: sum(sent)])
