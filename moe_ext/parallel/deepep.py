"""A transport by DeepEP's kernels, over NVLink and RDMA.

A token goes once to each rank that has any of its experts, with ids and weights, and the outputs
are summed on the way back: what `dedup` does by all-to-all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..ops.plan import make_plan
from .communicator import Communicator
from .consistency import CallRecord
from .transports import Result


class DeepEPTransport:
    """buffer: a deep_ep.ElasticBuffer of the communicator's group"""

    def __init__(self, buffer: Any, communicator: Communicator) -> None:
        self.buffer = buffer
        self.communicator = communicator

    def exchange(self, call: CallRecord, on_host: bool, tokens, plan, weights, run, work) -> Result:
        """As AllToAllTransport.exchange."""
        self.communicator.check_call(call, tokens.device, on_host)
        ids = torch.where(plan.slots >= 0, plan.expert_ids, -1).long()
        handle = _Handle(self.buffer, call.num_experts)
        received, weights, ids = _Dispatch.apply(tokens, weights, ids, handle)
        result = None if work is None else work()
        handle.event.current_stream_wait()
        plan = make_plan(ids.int(), call.num_experts // self.communicator.size, order="token")
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
