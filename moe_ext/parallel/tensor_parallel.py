"""Tensor parallelism: split tokens that all ranks of a group hold, and gather them again."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from ..process_group import GroupAttribute


def drop_tokens(input_: Tensor, dim: int = 0, group: dist.ProcessGroup | None = None) -> Tensor:
    """Keep this rank's part of `dim`; the gradient is gathered.

    group: ranks that hold the same input; None or a group of one keeps all
    """
    return input_ if _size(group) == 1 else _DropTokens.apply(input_, dim, group)


def gather_tokens(input_: Tensor, dim: int = 0, group: dist.ProcessGroup | None = None) -> Tensor:
    """Gather the parts of all ranks along `dim`; the gradient is this rank's part.

    group: ranks that hold a part each; None or a group of one has all
    """
    return input_ if _size(group) == 1 else _GatherTokens.apply(input_, dim, group)


class TokenShards:
    """Shares of tokens among the ranks of a tensor_group; None keeps all tokens on the rank."""

    group = GroupAttribute()

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.size = _size(group)
        self.rank = 0 if group is None else group.rank()

    def split(self, tensor: Tensor, dim: int, filler: int = 0) -> Tensor:
        """This rank's share of `dim`, which is padded with `filler` to equal shares."""
        if missing := -tensor.shape[dim] % self.size:
            padding = [0, 0] * (tensor.dim() - 1 - dim) + [0, missing]
            tensor = F.pad(tensor, padding, value=filler)
        return drop_tokens(tensor, dim, self.group)

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """All shares along `dim`, padding included."""
        return gather_tokens(tensor, dim, self.group)


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
