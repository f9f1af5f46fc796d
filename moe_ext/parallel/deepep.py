"""Tokens that travel by DeepEP's kernels, and their gradients.

A token goes once to every process that has one of its experts, with its ids and weights, and what
its experts give is summed on the way back: what `dedup` does, by NVLink and RDMA.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Journey:
    """One way there and back. buffer: a deep_ep.ElasticBuffer of the group"""

    def __init__(self, buffer: Any, num_experts: int) -> None:
        self.buffer = buffer
        self.num_experts = num_experts
        self.handle: Any = None
        self.event: Any = None

    def depart(
        self, tokens: Tensor, weights: Tensor, experts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [T, H], weights [T, K], experts [T, K] int32 -> those that come here, and their
        ids among the experts here, -1 for others. Not to be read before `wait`."""
        return _Depart.apply(tokens, weights, experts.long(), self)

    def wait(self) -> None:
        self.event.current_stream_wait()

    def come_back(self, rows: Tensor) -> Tensor:
        """What every token that came has, [R, H] -> their sums [T, H]."""
        return _ComeBack.apply(rows, self)


class _Depart(Function):
    @staticmethod
    def forward(ctx, tokens, weights, experts, journey):
        ctx.journey = journey
        arrived, ids, weights_there, journey.handle, journey.event = journey.buffer.dispatch(
            tokens.contiguous(),
            topk_idx=experts,
            topk_weights=weights.contiguous(),
            num_experts=journey.num_experts,
            do_cpu_sync=True,
            do_expand=False,
            async_with_compute_stream=True,
        )
        ctx.mark_non_differentiable(ids)
        return arrived, weights_there, ids

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_tokens, grad_weights, _):
        buffer, handle = ctx.journey.buffer, ctx.journey.handle
        tokens, weights, _ = buffer.combine(
            grad_tokens.contiguous(), handle, topk_weights=grad_weights.contiguous()
        )
        return tokens, weights, None, None


class _ComeBack(Function):
    @staticmethod
    def forward(ctx, rows, journey):
        ctx.journey = journey
        return journey.buffer.combine(rows.contiguous(), journey.handle)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        journey = ctx.journey
        return journey.buffer.dispatch(grad.contiguous(), handle=journey.handle)[0], None
