"""Tokens that all tensor-parallel ranks hold: keep a part of them, and gather the parts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


def drop_tokens(input_: Tensor, dim: int = 0, group: dist.ProcessGroup | None = None) -> Tensor:
    """This process's part of `dim`; the gradient is gathered.

    group: the processes that hold the same input; None or one process keeps all
    """
    return input_ if _size(group) == 1 else _DropTokens.apply(input_, dim, group)


def gather_tokens(input_: Tensor, dim: int = 0, group: dist.ProcessGroup | None = None) -> Tensor:
    """The parts of all processes, along `dim`; the gradient is this process's part.

    group: the processes that hold a part each; None or one process has all
    """
    return input_ if _size(group) == 1 else _GatherTokens.apply(input_, dim, group)


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


class _DropTokens(Function):
    @staticmethod
    def forward(ctx, input_, dim, group):
        ctx.dim, ctx.group = dim, group
        parts, length = _size(group), input_.shape[dim]
        if length % parts:
            raise RuntimeError(
                f"drop_tokens: dimension {dim} must be a multiple of the group's size {parts}, "
                f"got {length}"
            )
        part = length // parts
        return input_.narrow(dim, dist.get_rank(group) * part, part).clone()

    @staticmethod
    def backward(ctx, grad):
        return _GatherTokens.apply(grad, ctx.dim, ctx.group), None, None


class _GatherTokens(Function):
    @staticmethod
    def forward(ctx, input_, dim, group):
        ctx.dim, ctx.group = dim, group
        parts = [torch.empty_like(input_.contiguous()) for _ in range(_size(group))]
        dist.all_gather(parts, input_.contiguous(), group=group)
        return torch.cat(parts, dim=dim)

    @staticmethod
    def backward(ctx, grad):
        return _DropTokens.apply(grad, ctx.dim, ctx.group), None, None
