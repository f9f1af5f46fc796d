"""Permute tokens into blocks for an all-to-all, and prepare received rows for the experts."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.checks import accumulate_dtype
from ..ops.functional import dispatch
from ..ops.plan import Plan, make_plan
from ..routing.losses import expert_load
from .all_to_all import AllToAll, Steps
from .communicator import Communicator
from .consistency import CallRecord


class Chunk(NamedTuple):
    """One overlap chunk of an exchange.

    send: tensors [R, ...] sent by the same steps; the first holds tokens
    expert_inputs: turns the received tensors into the experts' arguments, which are tokens, plan
        and weights, or a capacity buffer alone
    """

    steps: Steps
    send: tuple[Tensor, ...]
    expert_inputs: Callable[..., tuple]


Part = tuple[Tensor, Tensor, Tensor]
"""Tokens [T, H], expert ids [T, K] and weights [T, K] of one overlap chunk."""


def capacity_chunks(
    communicator: Communicator,
    call: CallRecord,
    buffer: Tensor,
    kept: Tensor,
    on_host: bool,
    as_buffer: bool,
) -> list[Chunk]:
    """Send every expert's capacity buffer to its rank, empty rows too.

    buffer: [E, C, H], of which kept [E] rows of each expert are filled
    on_host: as in Communicator.exchange_counts
    as_buffer: the experts take buffers [ranks, E_local, C, H] in place of tokens, plan and weights
    """
    E, _, H = buffer.shape
    ranks, E_local = communicator.size, E // communicator.size
    load = communicator.exchange_counts(call, kept.view(ranks, E_local), on_host)
    chunks, done = [], 0
    for part in buffer.tensor_split(call.overlap, dim=1):
        C = part.shape[1]
        ids = _ids_of_buffers((load - done).clamp(0, C), C)

        def expert_inputs(rows: Tensor, ids: Tensor = ids, C: int = C) -> tuple:
            if as_buffer:
                return (rows.view(ranks, E_local, C, H),)
            return rows, make_plan(ids, E_local, ranks * C), _ones(rows)

        steps = communicator.equal_steps(E_local * C)
        chunks.append(Chunk(steps, (part.reshape(-1, H),), expert_inputs))
        done += C
    return chunks


def route_chunks(
    communicator: Communicator, call: CallRecord, parts: list[Part]
) -> tuple[Iterator[Chunk], list[Plan]]:
    """Send one row per route. Returns chunks, and the plan of each one's sent rows."""
    ranks, E_local = communicator.size, call.num_places // communicator.size
    plans = [make_plan(ids, call.num_places, order="token") for _, ids, _ in parts]
    loads = torch.stack([plan.load.view(ranks, E_local) for plan in plans], dim=1)
    counts = torch.cat([loads.sum(dim=2, keepdim=True, dtype=loads.dtype), loads], dim=2)
    steps, received, sums = communicator.exchange_steps(call, counts)
    plans = [_without_empty_rows(*pair) for pair in zip(plans, steps, strict=True)]
    local_ids = torch.arange(E_local, dtype=torch.int32, device=counts.device).repeat(ranks)

    def chunk(i: int) -> Chunk:
        plan, load, total = plans[i], received[:, i, 1:], sums[i][0]

        def expert_inputs(rows: Tensor) -> tuple[Tensor, Plan, Tensor]:
            ids = local_ids.repeat_interleave(load.flatten(), output_size=total)
            return rows, make_plan(ids[:, None], E_local, order="token"), _ones(rows)

        return Chunk(steps[i], (dispatch(parts[i][0], plan),), expert_inputs)

    return map(chunk, range(len(parts))), plans


def token_chunks(
    communicator: Communicator, call: CallRecord, parts: list[Part]
) -> tuple[Iterator[Chunk], list[Plan]]:
    """Send a token once to each rank that has any of its experts, with ids and weights.

    Returns chunks, and the plan of each one's sent rows.
    """
    ranks, E_local = communicator.size, call.num_places // communicator.size
    owners = [torch.where(ids >= 0, ids // E_local, -1) for _, ids, _ in parts]
    plans = [make_plan(_without_duplicates(ids), ranks, order="token") for ids in owners]
    rows = torch.stack([plan.load for plan in plans], dim=1)
    routes = torch.stack([expert_load(ids, ranks) for ids in owners], dim=1)
    counts = torch.stack([rows.to(routes.dtype), routes], dim=2)
    steps, _, sums = communicator.exchange_steps(call, counts)
    plans = [_without_empty_rows(*pair) for pair in zip(plans, steps, strict=True)]

    def chunk(i: int) -> Chunk:
        plan, owner, total = plans[i], owners[i], sums[i][1]
        tokens, ids, weights = parts[i]
        token = plan.sources // ids.shape[1]
        is_there = owner[token] == owner.flatten()[plan.sources][:, None]
        there = torch.where(is_there, ids[token] % E_local, -1)

        def expert_inputs(
            rows: Tensor, ids: Tensor, weights: Tensor
        ) -> tuple[Tensor, Plan, Tensor]:
            plan = make_plan(ids, E_local, order="token")
            return rows, plan._replace(sources=plan.sources[:total]), weights

        send = dispatch(tokens, plan), there, dispatch(weights, plan)
        return Chunk(steps[i], send, expert_inputs)

    return map(chunk, range(len(parts))), plans


def _ones(rows: Tensor) -> Tensor:
    return torch.ones(rows.shape[0], 1, dtype=accumulate_dtype(rows.dtype), device=rows.device)


def _ids_of_buffers(load: Tensor, capacity: int) -> Tensor:
    """The expert id of each row [ranks * E_local * C, 1], -1 for an empty one.

    load: [ranks, E_local], how many rows of each buffer are filled
    """
    ids = torch.arange(load.shape[1], dtype=torch.int32, device=load.device)[:, None]
    position = torch.arange(capacity, dtype=torch.int32, device=load.device)
    return torch.where(position < load[..., None], ids, -1).view(-1, 1)


def _without_duplicates(ids: Tensor) -> Tensor:
    """[T, K] with -1 for an id that an earlier column has too."""
    equal = ids[:, :, None] == ids[:, None, :]
    return torch.where(equal.tril(-1).any(dim=2), -1, ids)


def _without_empty_rows(plan: Plan, steps: Steps) -> Plan:
    # A plan without gaps has its empty rows at the end.
    first = steps[0]
    sent = first.send_counts if isinstance(first, AllToAll) else first.sizes
    return plan._replace(sources=plan.sources[: sum(sent)])
