"""Rows that go from process to process, and their gradients back the same way.

Rows lie in blocks, one for every process of the group in its order. A path is the steps that bring
every block to its process and leave those that came in the order of their senders. In a group it is
one Move. In a mesh of nodes and, inside each, places, the blocks of a node travel between nodes
together, once, and are sorted out inside:

    blocks by (node, place) they are for
      Swap        (place, node)
      Move        inside the node, to the process at that place: by (sender's place, node)
      Swap        (node, sender's place)
      Move        between the nodes, among equal places: by (sender's node, sender's place)

A path backwards is its steps backwards, for results as for gradients. What it moves is started by
`start` and there after `finish`; what runs between the two runs while rows travel, and so does its
backward, which meets the same two in the opposite order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import Node
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import _disable_current_modes

from ..process_group import GroupAttribute, resolve
from .consistency import BLOCK, NUM_WORDS, Call, check, check_on_host, record_of

collectives = torch.ops._c10d_functional
_DENSE = torch.contiguous_format


class Move(NamedTuple):
    """Rows for, and from, every process of the group of this name."""

    group: str
    send: list[int]
    receive: list[int]

    def back(self) -> Move:
        return Move(self.group, self.receive, self.send)


class Swap(NamedTuple):
    """Blocks [n, columns], of so many rows each, are transposed."""

    columns: int
    sizes: list[int]

    def back(self) -> Swap:
        return Swap(len(self.sizes) // self.columns, _transposed(self.sizes, self.columns))


Path = tuple[Move | Swap, ...]


def _transposed(items: list, columns: int) -> list:
    return [item for column in range(columns) for item in items[column::columns]]


def back(path: Path) -> Path:
    return tuple(step.back() for step in reversed(path))


def _all_to_all(rows: Tensor, move: Move) -> Tensor:
    # As bytes: gloo does not know every type. (An empty tensor is contiguous whatever its strides.)
    rows = rows.contiguous() if rows.stride(-1) == 1 else rows.clone(memory_format=_DENSE)
    bytes_ = rows.view(torch.uint8)
    out = collectives.all_to_all_single(bytes_, move.receive, move.send, move.group)
    return out.view(rows.dtype)


class _Flight:
    """Rows on their way, and their gradients' way back once there is one."""

    def __init__(self, move: Move) -> None:
        self.move = move
        self.rows: Tensor | None = None
        self.back: _Flight | None = None


# Rows that have left have one shape, those that arrive another, and so have their gradients: what
# ties the two functions together is an empty tensor.


class _Start(Function):
    @staticmethod
    def forward(rows, flight):
        flight.rows = _all_to_all(rows, flight.move)
        return rows.new_empty(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.flight = inputs

    @staticmethod
    def backward(ctx, tie):
        return _Wait.apply(tie, ctx.flight.back), None


class _Wait(Function):
    @staticmethod
    def forward(tie, flight):
        rows, flight.rows = flight.rows, None
        return collectives.wait_tensor(rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.flight = inputs

    @staticmethod
    def backward(ctx, grad):
        ctx.flight.back = _Flight(ctx.flight.move.back())
        return _Start.apply(grad, ctx.flight.back), None


class _Moved(Function):
    """Both at once, for torch.compile, which orders the two itself."""

    @staticmethod
    def forward(rows, move):
        return collectives.wait_tensor(_all_to_all(rows, move))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.move = inputs

    @staticmethod
    def backward(ctx, grad):
        return _Moved.apply(grad, ctx.move.back()), None


class Travelling(NamedTuple):
    rows: Tensor
    flight: _Flight | None
    rest: Path


def start(rows: Tensor, path: Path) -> Travelling:
    """rows: [R, ...], of which R is what the path counts"""
    while isinstance(path[0], Swap):
        rows, path = _swapped(rows, path[0]), path[1:]
    if torch.compiler.is_compiling():
        return Travelling(rows, None, path)
    flight = _Flight(path[0])
    return Travelling(_Start.apply(rows, flight), flight, path[1:])


def finish(travelling: Travelling) -> Tensor:
    rows, flight, rest = travelling
    if flight is not None:
        rows = _Wait.apply(rows, flight)
    for step in rest:
        rows = _swapped(rows, step) if isinstance(step, Swap) else _Moved.apply(rows, step)
    return rows


def _swapped(rows: Tensor, swap: Swap) -> Tensor:
    return torch.cat(_transposed(list(rows.split(swap.sizes)), swap.columns))


class _Hop(NamedTuple):
    group: str
    size: int


class _Turn(NamedTuple):
    rows: int
    columns: int


class Exchange:
    """The way between the processes of a group.

    group: a process group, a mesh of one dimension, or one of two: nodes, and places in a node
    """

    group = GroupAttribute()
    _steps: tuple[_Turn | _Hop, ...]

    def __init__(self, group: dist.ProcessGroup | DeviceMesh) -> None:
        # By their names, so that modules which hold them can be copied.
        if isinstance(group, DeviceMesh) and group.ndim == 2:
            self.group = None
            nodes, places = group.shape
            across, inside = (g.group_name for g in group.get_all_groups())
            self.rank = group.get_local_rank(0) * places + group.get_local_rank(1)
            self.size = nodes * places
            self._steps = (
                _Turn(nodes, places),
                _Hop(inside, places),
                _Turn(places, nodes),
                _Hop(across, nodes),
            )
            return
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(f"group must be a mesh of one or two dimensions, got {group}")
            group = group.get_group()
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                "group must be a process group of which this process is a member, or a mesh, got "
                f"{group!r}"
            )
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self._steps = (_Hop(group.group_name, self.size),)

    @property
    def first_group(self) -> dist.ProcessGroup:
        """The group of the first move."""
        return next(resolve(step.group) for step in self._steps if isinstance(step, _Hop))

    def ranks(self) -> list[list[int]]:
        """The world's ranks in the group of every move."""
        hops = (step for step in self._steps if isinstance(step, _Hop))
        return [dist.get_process_group_ranks(resolve(hop.group)) for hop in hops]

    def rank_here(self) -> int:
        """`rank`, asked anew: that of a copy may be another process's."""
        rank = 0
        for ranks in reversed(self.ranks()):
            rank = rank * len(ranks) + ranks.index(dist.get_rank())
        return rank

    def equal(self, rows: int) -> Path:
        """The path of as many rows from every process to every process."""
        path: list[Move | Swap] = []
        for step in self._steps:
            if isinstance(step, _Turn):
                path.append(Swap(step.columns, [rows] * self.size))
            else:
                sizes = [rows * (self.size // step.size)] * step.size
                path.append(Move(step.group, sizes, sizes))
        return tuple(path)

    def counts(self, call: Call, counts: Tensor, is_named: bool = False) -> Tensor:
        """Open an exchange: what every rank says to every other.

        counts: [size, n] integers
        is_named: an error names what differs on a GPU too, for which the host waits

        Returns [size, n] int64. Raises Disagreement where a rank makes another call.
        """
        opened = self._open(call, counts.unsqueeze(2))
        if is_named:
            # Selective checkpointing must not see what a recomputation does not repeat.
            with _disable_current_modes():
                check_on_host(opened.words.tolist())
        check(opened.sent, opened.words)
        return opened.trace[-1][1].squeeze(2)

    def counted(self, call: Call, counts: Tensor) -> tuple[list[Path], Tensor, list[list[int]]]:
        """Open an exchange of rows that only their sender has counted.

        counts: [size, n, m] integers; [:, i, 0] are the rows of the i-th of n paths
        Returns the paths, what the others have counted, and the sums of that over them [n][m]. The
        host waits for the device, once. Raises Disagreement where a rank makes another call.
        """
        n, m = counts.shape[1:]
        opened = self._open(call, counts)
        received = opened.trace[-1][1]
        sizes = [opened.words]
        for step, (before, after) in zip(self._steps, opened.trace, strict=True):
            if isinstance(step, _Turn):
                sizes += [before[..., 0]]
            else:
                sizes += [x[..., 0].view(step.size, -1, n).sum(dim=1) for x in (before, after)]
        flat = torch.cat([x.reshape(-1) for x in (*sizes, received.sum(dim=0))]).tolist()
        numbers = iter(flat)
        check_on_host([[next(numbers) for _ in range(NUM_WORDS)] for _ in range(self.size)])

        def take(length: int) -> list[list[int]]:
            table = [[next(numbers) for _ in range(n)] for _ in range(length)]
            return [list(column) for column in zip(*table, strict=True)]

        steps: list[list[Move | Swap]] = []
        for step in self._steps:
            if isinstance(step, _Turn):
                steps.append([Swap(step.columns, sizes) for sizes in take(self.size)])
            else:
                pairs = zip(take(step.size), take(step.size), strict=True)
                steps.append([Move(step.group, *pair) for pair in pairs])
        sums = [[next(numbers) for _ in range(m)] for _ in range(n)]
        return [tuple(path) for path in zip(*steps, strict=True)], received, sums

    def _open(self, call: Call, counts: Tensor) -> _Opened:
        """Send the call and, in blocks of one size for every layer, as many counts as they hold."""
        flat = counts.reshape(self.size, -1).to(torch.int64)
        levels = 1 if len(self._steps) == 1 else 2
        words = [flat.new_full((self.size, 1), word) for word in call.words(levels)]
        if levels == 2:
            self._knock(words)
        room = BLOCK - NUM_WORDS
        first, rest = flat[:, :room], flat[:, room:]
        unused = flat.new_zeros(self.size, room - first.shape[1])
        trace = self._trace(torch.cat([*words, first, unused], dim=1))
        sent, received = (x[:, :NUM_WORDS] for x in (trace[0][0], trace[-1][1]))
        trace = [tuple(x[:, NUM_WORDS : NUM_WORDS + first.shape[1]] for x in xs) for xs in trace]
        if rest.shape[1]:
            # Of a size that the call decides.
            check(sent, received)
            pairs = zip(trace, self._trace(rest), strict=True)
            trace = [tuple(torch.cat(xs, dim=1) for xs in zip(*xs, strict=True)) for xs in pairs]
        shaped = [tuple(x.reshape(counts.shape) for x in xs) for xs in trace]
        return _Opened(sent, received, shaped)

    def _knock(self, words: list[Tensor]) -> None:
        """Check in the group of the first move that its ranks exchange in two levels, by a message
        as large as the first of one level: another layer of the group may have that."""
        size = self.first_group.size()
        blocks = [word[:size] for word in words]
        sent = torch.cat([*blocks, words[0].new_zeros(size, BLOCK - NUM_WORDS)], dim=1)
        sizes = [1] * size
        moved = _all_to_all(sent, Move(self.first_group.group_name, sizes, sizes))
        received = collectives.wait_tensor(moved)
        check(sent[:, :NUM_WORDS], received[:, :NUM_WORDS], columns=1)

    def _trace(self, blocks: Tensor) -> list[tuple[Tensor, ...]]:
        """One block of numbers for every rank, before and after every step. blocks: [size, n]"""
        trace: list[tuple[Tensor, ...]] = []
        for step in self._steps:
            before = blocks
            if isinstance(step, _Turn):
                pairs = blocks.unflatten(0, (step.rows, step.columns))
                blocks = pairs.transpose(0, 1).flatten(0, 1)
            else:
                sizes = [self.size // step.size] * step.size
                blocks = collectives.wait_tensor(
                    _all_to_all(blocks, Move(step.group, sizes, sizes))
                )
            trace.append((before, blocks))
        return trace


class _Opened(NamedTuple):
    """sent, words: [size, NUM_WORDS], the calls to and from every rank
    trace: the counts, before and after every step
    """

    sent: Tensor
    words: Tensor
    trace: list[tuple[Tensor, ...]]


def opens_backward(
    rows: list[Tensor], exchange: Exchange, call: Call, nodes: list[Node | None]
) -> list[Tensor]:
    """The same rows, whose backward begins with the exchange of its call.

    nodes: of the backward, those that send gradients
    """
    return list(_OpensBackward.apply(*rows, exchange, call, nodes))


class _OpensBackward(Function):
    @staticmethod
    def forward(*args):
        return tuple(tensor.view_as(tensor) for tensor in args[:-3])

    @staticmethod
    def setup_context(ctx, inputs, output):
        *_, ctx.exchange, ctx.call, ctx.nodes = inputs

    @staticmethod
    def backward(ctx, *grads):
        exchange, call = ctx.exchange, ctx.call._replace(is_backward=True)
        if ctx.nodes and not torch.compiler.is_compiling():
            # None do where backward(inputs=) leaves the tokens out.
            sends = all(map(torch._C._will_engine_execute_node, ctx.nodes))
            call = call._replace(tokens_require_grad=sends)
        # A count that depends on the gradient: a compiled graph would send the message in its
        # forward too.
        count = grads[0][:1].isnan().sum()
        counts = count.expand(exchange.size, 1)
        if torch.compiler.is_compiling():  # which has no double backward
            exchange.counts(call, counts)
        else:
            with record_of(exchange.first_group).opens_backward(call.tensor_parallel_size == 1):
                exchange.counts(call, counts)
            grads = _OpensBackward.apply(*grads, exchange, ctx.call, ())
        return *grads, None, None, None
