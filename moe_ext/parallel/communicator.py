"""The ranks of a group: their all-to-all steps, and the messages that open an exchange."""

import itertools
import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import _disable_current_modes

from ..process_group import GroupAttribute, resolve
from .all_to_all import AllToAll, Steps, Transpose, all_to_all
from .consistency import BLOCK, NUM_WORDS, CallRecord, GroupState, check, check_on_host, state_of


class Communicator:
    """The ranks of a group, and the steps of an all-to-all among them.

    group: a process group, a mesh of one dimension, or one of two: nodes and local ranks. A
        dimension of size 1 counts as absent.

    Its attribute `group` is None for two levels.
    """

    group = GroupAttribute()

    def __init__(self, group: dist.ProcessGroup | DeviceMesh) -> None:
        levels: list = [group]
        if isinstance(group, DeviceMesh):
            if group.ndim not in (1, 2):
                raise ValueError(
                    f"ExpertParallel: group must be a mesh of one or two dimensions, got {group}"
                )
            dimensions = group.get_all_groups()
            levels = [one for one in dimensions if one.size() > 1] or dimensions[:1]
        if not all(isinstance(level, dist.ProcessGroup) for level in levels):
            raise ValueError(
                "ExpertParallel: group must be a mesh, or a process group that this process is a "
                f"member of, got {group!r}"
            )
        self.group = levels[0] if len(levels) == 1 else None
        # By name, so that a module that holds this object can be copied.
        self._levels = [(level.group_name, level.size()) for level in levels]
        self.size = math.prod(size for _, size in self._levels)
        self.rank = self.current_rank()
        self._unit_steps = self.equal_steps(1)

    @property
    def state(self) -> GroupState:
        """The state of the first all-to-all's group."""
        return state_of(resolve(self._levels[-1][0]))

    def global_ranks(self) -> list[list[int]]:
        """The global ranks in each group: between nodes, inside the node; or in the only one."""
        return [dist.get_process_group_ranks(resolve(name)) for name, _ in self._levels]

    def current_rank(self) -> int:
        """This process's rank now. `rank` of an unpickled copy may be another process's."""
        rank = 0
        for ranks in self.global_ranks():
            rank = rank * len(ranks) + ranks.index(dist.get_rank())
        return rank

    def equal_steps(self, rows: int) -> Steps:
        """The steps for as many rows from every rank to every rank."""
        if len(self._levels) == 1:
            return (_equal(*self._levels[0], rows),)
        (between, nodes), (inside, local_ranks) = self._levels
        sizes = [rows] * self.size
        return (
            Transpose(local_ranks, sizes),
            _equal(inside, local_ranks, nodes * rows),
            Transpose(nodes, sizes),
            _equal(between, nodes, local_ranks * rows),
        )

    def begin_exchange(self) -> None:
        """Mark that other ranks wait for this one: from here on an exception breaks the group."""
        if not torch.compiler.is_compiling():
            self.state.is_exchanging = True

    def exchange_counts(self, call: CallRecord, counts: Tensor, on_host: bool = False) -> Tensor:
        """Check that all ranks make the same call, and exchange numbers of one size.

        counts: [size, n] integers, for each rank
        on_host: errors name the difference on a GPU too; the host waits for that

        Returns [size, n] int64. Raises ConsistencyError where a rank makes another call.
        """
        sent, received, trace = self._open(call, counts.unsqueeze(2))
        if on_host:
            # Selective checkpointing must not record what a recomputation does not repeat.
            with _disable_current_modes():
                check_on_host(received.tolist())
        check(sent, received)
        return trace[-1][1].squeeze(2)

    def check_call(self, call: CallRecord, device: torch.device, on_host: bool) -> None:
        """Check that all ranks make the same call."""
        self.begin_exchange()
        nothing = torch.empty(self.size, 0, dtype=torch.int64, device=device)
        self.exchange_counts(call, nothing, on_host)

    def exchange_steps(
        self, call: CallRecord, counts: Tensor
    ) -> tuple[list[Steps], Tensor, list[list[int]]]:
        """Check that all ranks make the same call, and exchange how many rows each will send.

        counts: [size, n, m] integers; [:, i, 0] are the rows of the i-th of n all-to-alls

        Returns the steps of each, the received counts, and their sums over ranks [n][m]. The host
        waits for the device once. Raises ConsistencyError where a rank makes another call.
        """
        _, opening, trace = self._open(call, counts)
        received = trace[-1][1]
        tables = [opening, received.sum(dim=0)]
        for step, (before, after) in zip(self._unit_steps, trace, strict=True):
            if isinstance(step, Transpose):
                tables += [before[..., 0].t()]
            else:
                shape = len(step.send_counts), -1, counts.shape[1]
                tables += [x[..., 0].view(shape).sum(dim=1).t() for x in (before, after)]
        words, sums, *sizes = _on_host(tables)
        check_on_host(words)
        steps: list[list[AllToAll | Transpose]] = []
        for step in self._unit_steps:
            if isinstance(step, Transpose):
                steps.append([Transpose(step.columns, blocks) for blocks in sizes.pop(0)])
            else:
                pairs = zip(sizes.pop(0), sizes.pop(0), strict=True)
                steps.append([AllToAll(step.group, *pair) for pair in pairs])
        return [tuple(one) for one in zip(*steps, strict=True)], received, sums

    def _open(
        self, call: CallRecord, counts: Tensor
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
        """Send the call's words and counts to every rank.

        The first message has one size for all layers; counts that do not fit follow in another.

        Returns the words [size, NUM_WORDS] sent to and received from each rank, and the counts
        before and after each step.
        """
        flat = counts.reshape(self.size, -1).to(torch.int64)
        levels = len(self._levels)
        words = [flat.new_full((self.size, 1), word) for word in call.words(levels)]
        if levels == 2:
            self._check_levels(words)
        limit = BLOCK - NUM_WORDS
        first, rest = flat[:, :limit], flat[:, limit:]
        unused = flat.new_zeros(self.size, limit - first.shape[1])
        trace = self._trace(torch.cat([*words, first, unused], dim=1))
        sent, received = (x[:, :NUM_WORDS] for x in (trace[0][0], trace[-1][1]))
        trace = [tuple(x[:, NUM_WORDS : NUM_WORDS + first.shape[1]] for x in xs) for xs in trace]
        if rest.shape[1]:
            check(sent, received)  # before a message whose size depends on the call
            pairs = zip(trace, self._trace(rest), strict=True)
            trace = [tuple(torch.cat(xs, dim=1) for xs in zip(*xs, strict=True)) for xs in pairs]
        return sent, received, [tuple(x.reshape(counts.shape) for x in xs) for xs in trace]

    def _check_levels(self, words: list[Tensor]) -> None:
        """Check in the first group that all its ranks exchange in two levels.

        Another layer of that group may exchange in one level, so this message has the size of the
        first one there.
        """
        first, size = self._levels[-1]
        blocks = [word[:size] for word in words]
        sent = torch.cat([*blocks, words[0].new_zeros(size, BLOCK - NUM_WORDS)], dim=1)
        received = all_to_all(sent, _equal(first, size, 1))
        check(sent[:, :NUM_WORDS], received[:, :NUM_WORDS], columns=1)

    def _trace(self, blocks: Tensor) -> list[tuple[Tensor, ...]]:
        """Send one block of numbers to each rank; return them before and after each step.

        blocks: [size, n]
        """
        trace: list[tuple[Tensor, ...]] = []
        for step in self._unit_steps:
            before = blocks
            if isinstance(step, Transpose):
                pairs = blocks.unflatten(0, (-1, step.columns))
                blocks = pairs.transpose(0, 1).flatten(0, 1)
            else:
                blocks = all_to_all(blocks, step)
            trace.append((before, blocks))
        return trace


def _equal(group: str, ranks: int, rows: int) -> AllToAll:
    counts = [rows] * ranks
    return AllToAll(group, counts, counts)


def _on_host(tables: list[Tensor]) -> list[list[list[int]]]:
    """Read matrices with one synchronisation."""
    numbers = iter(torch.cat([table.reshape(-1) for table in tables]).tolist())
    return [
        [list(itertools.islice(numbers, columns)) for _ in range(rows)]
        for rows, columns in (table.shape for table in tables)
    ]


class CheckBackward(Function):
    """`apply(*rows, communicator, call, nodes)` returns the rows; their backward begins with a
    check that all ranks run it.

    nodes: the autograd nodes whose backward sends gradients
    """

    @staticmethod
    def forward(*args):
        return tuple(tensor.view_as(tensor) for tensor in args[:-3])

    @staticmethod
    def setup_context(ctx, inputs, output):
        *_, ctx.communicator, ctx.call, ctx.nodes = inputs

    @staticmethod
    def backward(ctx, *grads):
        communicator, call = ctx.communicator, ctx.call._replace(is_backward=True)
        if ctx.nodes and not torch.compiler.is_compiling():
            # False where backward(inputs=) leaves the tokens out.
            sends = all(map(torch._C._will_engine_execute_node, ctx.nodes))
            call = call._replace(tokens_require_grad=sends)
        # The count depends on the gradient. Otherwise a compiled graph would move the message into
        # its forward.
        count = grads[0][:1].isnan().sum()
        counts = count.expand(communicator.size, 1)
        if torch.compiler.is_compiling():  # has no double backward
            communicator.exchange_counts(call, counts)
        else:
            with communicator.state.backward(call.tensor_parallel_size == 1):
                communicator.exchange_counts(call, counts)
            grads = CheckBackward.apply(*grads, communicator, ctx.call, ())
        return *grads, None, None, None
