"""All-to-all of rows between the ranks of a group, with gradients.

Rows lie in blocks, one for each rank of the group, in the group's order. Received blocks are in the
order of their source ranks. A flat group needs one all-to-all. On a mesh of nodes and local ranks,
rows for one node are collected inside the source node first, and cross to it in one message:

    blocks by destination (node, local rank)
      Transpose   to (local rank, node)
      AllToAll    inside the node: blocks by (source's local rank, node)
      Transpose   to (node, source's local rank)
      AllToAll    between nodes, among equal local ranks: blocks by source (node, local rank)

Expert outputs and gradients return by the reversed steps in reverse order. `start` launches an
all-to-all and `finish` waits for it. Work between the two overlaps with communication; so does its
backward, which runs the two in reverse order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

_collectives = torch.ops._c10d_functional
_DENSE = torch.contiguous_format


class AllToAll(NamedTuple):
    """Send and receive counts, in rows, for each rank of the group of this name."""

    group: str
    send_counts: list[int]
    recv_counts: list[int]

    def reversed(self) -> AllToAll:
        return AllToAll(self.group, self.recv_counts, self.send_counts)


class Transpose(NamedTuple):
    """Transpose a [n, columns] matrix of blocks, which have these sizes in rows."""

    columns: int
    sizes: list[int]

    def reversed(self) -> Transpose:
        return Transpose(len(self.sizes) // self.columns, _transposed(self.sizes, self.columns))


Steps = tuple[AllToAll | Transpose, ...]


def reverse(steps: Steps) -> Steps:
    return tuple(step.reversed() for step in reversed(steps))


def _transposed(items: list, columns: int) -> list:
    return [item for column in range(columns) for item in items[column::columns]]


def _transpose(rows: Tensor, step: Transpose) -> Tensor:
    return torch.cat(_transposed(list(rows.split(step.sizes)), step.columns))


def all_to_all(rows: Tensor, step: AllToAll) -> Tensor:
    return _collectives.wait_tensor(_launch(rows, step))


def _launch(rows: Tensor, step: AllToAll) -> Tensor:
    # As bytes, since gloo lacks some dtypes. An empty tensor is contiguous whatever its strides.
    rows = rows.contiguous() if rows.stride(-1) == 1 else rows.clone(memory_format=_DENSE)
    out = _collectives.all_to_all_single(
        rows.view(torch.uint8), step.recv_counts, step.send_counts, step.group
    )
    return out.view(rows.dtype)


class _Pending:
    """An all-to-all in progress, and later that of its gradient."""

    def __init__(self, step: AllToAll) -> None:
        self.step = step
        self.rows: Tensor | None = None
        self.backward: _Pending | None = None


# The two functions cannot pass rows to each other: sent and received rows, and so their gradients,
# differ in shape. An empty tensor links them in the graph.


class _Start(Function):
    @staticmethod
    def forward(rows, pending):
        pending.rows = _launch(rows, pending.step)
        return rows.new_empty(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.pending = inputs

    @staticmethod
    def backward(ctx, link):
        return _Wait.apply(link, ctx.pending.backward), None


class _Wait(Function):
    @staticmethod
    def forward(link, pending):
        rows, pending.rows = pending.rows, None
        return _collectives.wait_tensor(rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.pending = inputs

    @staticmethod
    def backward(ctx, grad):
        ctx.pending.backward = _Pending(ctx.pending.step.reversed())
        return _Start.apply(grad, ctx.pending.backward), None


class _StartAndWait(Function):
    """Both in one, for torch.compile, which schedules the two itself, and for later steps."""

    @staticmethod
    def forward(rows, step):
        return all_to_all(rows, step)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.step = inputs

    @staticmethod
    def backward(ctx, grad):
        return _StartAndWait.apply(grad, ctx.step.reversed()), None


class PendingRows(NamedTuple):
    """Rows between `start` and `finish`. pending: None in compiled code, which starts later"""

    rows: Tensor
    pending: _Pending | None
    remaining: Steps


def start(rows: Tensor, steps: Steps) -> PendingRows:
    """rows: [R, ...] with R the sum of the first step's counts"""
    while isinstance(steps[0], Transpose):
        rows, steps = _transpose(rows, steps[0]), steps[1:]
    if torch.compiler.is_compiling():
        return PendingRows(rows, None, steps)
    pending = _Pending(steps[0])
    return PendingRows(_Start.apply(rows, pending), pending, steps[1:])


def finish(started: PendingRows) -> Tensor:
    rows, pending, remaining = started
    if pending is not None:
        rows = _Wait.apply(rows, pending)
    for step in remaining:
        if isinstance(step, Transpose):
            rows = _transpose(rows, step)
        else:
            rows = _StartAndWait.apply(rows, step)
    return rows
