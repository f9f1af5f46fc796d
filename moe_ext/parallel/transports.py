"""Transports: how tokens reach the ranks of their experts, and how expert outputs return.

A transport dispatches tokens, calls `run` with what this rank's experts get, and combines their
outputs. Its options are those of the `CallRecord`, which all ranks compare.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from ..experts.base import check_shape
from ..ops.functional import combine, dispatch, has_autocast
from ..ops.plan import Plan, make_plan
from .all_to_all import PendingRows, finish, reverse, start
from .communicator import CheckBackward, Communicator
from .consistency import CallRecord
from .permute import Chunk, capacity_chunks, route_chunks, token_chunks
from .tensor_parallel import TokenShards

Run = Callable[..., Tensor]
"""This rank's experts: (tokens, plan, weights) or (capacity buffer) -> rows [R, H]."""

Work = Callable[[], Tensor] | None
"""Independent work to overlap with communication."""

Result = tuple[Tensor, Tensor | None]
"""The weighted sum of each token's experts [T, H], and the result of the work."""


class AllToAllTransport:
    """Rows sent by all-to-all.

    shards: splits tokens that the ranks of a tensor_group share
    as_buffer: the experts take capacity buffers where there is a capacity
    all_ranks: the layer's ranks, which check the call; the communicator's by default
    """

    def __init__(
        self,
        communicator: Communicator,
        shards: TokenShards,
        *,
        as_buffer: bool = False,
        all_ranks: Communicator | None = None,
    ) -> None:
        self.communicator = communicator
        self.all_ranks = all_ranks or communicator
        self.shards = shards
        self.as_buffer = as_buffer

    def exchange(
        self,
        call: CallRecord,
        on_host: bool,
        tokens: Tensor,
        plan: Plan,
        weights: Tensor,
        run: Run,
        work: Work,
    ) -> Result:
        """Send tokens to their experts and return the outputs, as every transport does.

        on_host: as in Communicator.exchange_counts
        """
        if call.has_equal_capacity:
            return self._exchange_buffers(call, on_host, tokens, plan, weights, run, work)
        return self._exchange_rows(call, tokens, plan, weights, run, work)

    def _exchange_buffers(
        self, call: CallRecord, on_host: bool, tokens, plan, weights, run, work
    ) -> Result:
        """Every expert's capacity buffer [C, H], of a size known beforehand."""
        E, H = plan.num_experts, tokens.shape[1]
        buffer = self.shards.split(dispatch(tokens, plan).view(E, plan.capacity, H), 1)
        before = self.shards.rank * buffer.shape[1]
        kept = (plan.kept() - before).clamp(0, buffer.shape[1])
        self.all_ranks.begin_exchange()
        chunks = capacity_chunks(self.communicator, call, buffer, kept, on_host, self.as_buffer)
        returned, result, failure = self._run_chunks(call, chunks, run, work)
        buffer = _concatenated([rows.view(E, -1, H) for rows in returned], 1)
        buffer = self.shards.gather(buffer, 1)[:, : plan.capacity]
        if failure is not None:
            raise failure
        return combine(buffer.reshape(E * plan.capacity, H), plan, weights), result

    # Sizes differ in every call: compiled, each would be a program of its own.
    @torch.compiler.disable
    def _exchange_rows(self, call: CallRecord, tokens, plan, weights, run, work) -> Result:
        """Rows that routes own, counted first."""
        num_tokens = tokens.shape[0]
        ids = self.shards.split(torch.where(plan.slots >= 0, plan.expert_ids, -1), 0, -1)
        tokens, weights = self.shards.split(tokens, 0), self.shards.split(weights, 0)
        split = [x.tensor_split(call.overlap) for x in (tokens, ids, weights)]
        parts = list(zip(*split, strict=True))
        self.all_ranks.begin_exchange()
        # With dedup the experts' rank weights the outputs.
        pack = token_chunks if call.dedup else route_chunks
        chunks, plans = pack(self.communicator, call, parts)
        returned, result, failure = self._run_chunks(call, chunks, run, work)
        outs = [
            combine(rows, plan, None if call.dedup else weights)
            for rows, plan, (_, _, weights) in zip(returned, plans, parts, strict=True)
        ]
        out = self.shards.gather(_concatenated(outs, 0), 0)
        if failure is not None:
            raise failure
        return out[:num_tokens], result

    def _run_chunks(
        self, call: CallRecord, chunks: Iterable[Chunk], run: Run, work: Work
    ) -> tuple[list[Tensor], Tensor | None, BaseException | None]:
        """Send each chunk to its experts and return their outputs. The next chunk is sent first.

        After an exception rows are still sent, with NaN in place of the outputs: a rank that waits
        for them would take the next message for rows. `run` may communicate too, so that every
        chunk calls it.

        Returns the outputs of each chunk, the result of `work`, and the first exception of `run` or
        `work`. The caller raises it when the other ranks have all that they wait for.
        """
        guard = _Guard()
        returning, result, nodes = [], None, []
        sent = map(_send, chunks)
        current: _Sent | None = next(sent)
        if work is not None:
            result = guard(work)
        while current is not None:
            (chunk, pending), current = current, next(sent, None)
            if not torch.compiler.is_compiling():
                nodes += [rows.rows.grad_fn for rows in pending if rows.rows.requires_grad]
            received = list(map(finish, pending))
            rows = guard(_expert_outputs, run, chunk, received)
            if rows is None:  # after an exception
                rows = received[0].new_full(received[0].shape, torch.nan)
            returning.append(start(rows, reverse(chunk.steps)))
        returned = list(map(finish, returning))
        if not torch.compiler.is_compiling():
            self.all_ranks.state.is_exchanging = False
        if guard.failure is not None:
            self.all_ranks.state.has_failed = True
        returned = list(CheckBackward.apply(*returned, self.all_ranks, call, nodes))
        return returned, result, guard.failure


class TwoLevelTransport:
    """Tokens sent once to a node, and there once to a rank.

    mesh: of nodes and local ranks
    """

    def __init__(self, mesh: DeviceMesh, shards: TokenShards) -> None:
        self.all_ranks = Communicator(mesh)
        between, inside = map(Communicator, mesh.get_all_groups())
        self.between = AllToAllTransport(between, shards, all_ranks=self.all_ranks)
        self.inside = AllToAllTransport(inside, TokenShards(None))

    def exchange(self, call: CallRecord, on_host: bool, tokens, plan, weights, run, work) -> Result:
        # `between` opens with a check among equal local ranks alone.
        self.all_ranks.check_call(call, tokens.device, on_host)
        per_node = call.num_places // self.between.communicator.size
        inside = call._replace(num_experts=per_node, num_gaps=0, overlap=1)
        run = partial(self._run_in_node, inside, run)
        return self.between.exchange(call, on_host, tokens, plan, weights, run, work)

    def _run_in_node(self, call: CallRecord, run: Run, tokens, plan, weights) -> Tensor:
        with self.all_ranks.state.call():
            return self.inside.exchange(call, False, tokens, plan, weights, run, None)[0]


def _concatenated(parts: list[Tensor], dim: int) -> Tensor:
    # torch.cat would copy a single part.
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


_Sent = tuple[Chunk, list[PendingRows]]


def _send(chunk: Chunk) -> _Sent:
    # Sent tensors are not kept.
    return chunk._replace(send=()), [start(tensor, chunk.steps) for tensor in chunk.send]


def _expert_outputs(run: Run, chunk: Chunk, received: list[Tensor]) -> Tensor:
    rows = run(*chunk.expert_inputs(*received))
    expected = received[0]
    check_shape("ExpertParallel: experts must return [R, H]", rows, expected.shape)
    # All ranks must send rows of one width. Under autocast that is the CallRecord's
    # autocast_dtype, otherwise the tokens' dtype.
    device = expected.device
    if has_autocast(device) and rows.dtype == torch.get_autocast_dtype(device.type):
        return rows
    return rows.to(expected.dtype)


class _Guard:
    """Call functions and keep the first exception."""

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


class DeepEPTransport:
    """Tokens sent by DeepEP's kernels, over NVLink and RDMA.

    A token goes once to each rank that has any of its experts, with ids and weights, and the
    outputs are summed on the way back: what `dedup` does by all-to-all.

    buffer: a deep_ep.ElasticBuffer of the communicator's group
    """

    def __init__(self, buffer: Any, communicator: Communicator) -> None:
        self.buffer = buffer
        self.communicator = communicator

    def exchange(self, call: CallRecord, on_host: bool, tokens, plan, weights, run, work) -> Result:
        self.communicator.check_call(call, tokens.device, on_host)
        ids = torch.where(plan.slots >= 0, plan.expert_ids, -1).long()
        handle = _Handle(self.buffer, call.num_places)
        received, weights, ids = _Dispatch.apply(tokens, weights, ids, handle)
        result = None if work is None else work()
        handle.event.current_stream_wait()
        plan = make_plan(ids.int(), call.num_places // self.communicator.size, order="token")
        return _Combine.apply(run(received, plan, weights), handle), result


class _Handle:
    """One dispatch and its combine. DeepEP's own handle and event are known after the dispatch."""

    def __init__(self, buffer: Any, num_experts: int) -> None:
        self.buffer = buffer
        self.num_experts = num_experts
        self.handle: Any = None
        self.event: Any = None


class _Dispatch(Function):
    """tokens [T, H], weights [T, K], ids [T, K] int64 -> those that this rank receives; ids count
    its experts, -1 for others. The event must be waited for before they are read."""

    @staticmethod
    def forward(ctx, tokens, weights, ids, handle):
        ctx.handle = handle
        received, local_ids, local_weights, handle.handle, handle.event = handle.buffer.dispatch(
            tokens.contiguous(),
            topk_idx=ids,
            topk_weights=weights.contiguous(),
            num_experts=handle.num_experts,
            do_cpu_sync=True,
            do_expand=False,
            async_with_compute_stream=True,
        )
        ctx.mark_non_differentiable(local_ids)
        return received, local_weights, local_ids

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_tokens, grad_weights, _):
        buffer, handle = ctx.handle.buffer, ctx.handle.handle
        tokens, weights, _ = buffer.combine(
            grad_tokens.contiguous(), handle, topk_weights=grad_weights.contiguous()
        )
        return tokens, weights, None, None


class _Combine(Function):
    """Return expert outputs [R, H] to their source ranks and sum them per token: [T, H]."""

    @staticmethod
    def forward(ctx, rows, handle):
        ctx.handle = handle
        return handle.buffer.combine(rows.contiguous(), handle.handle)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        buffer, handle = ctx.handle.buffer, ctx.handle.handle
        return buffer.dispatch(grad.contiguous(), handle=handle)[0], None
