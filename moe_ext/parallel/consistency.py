"""Check that ranks make the same call of the same layer.

An exchange opens with one message of a fixed size, forward and backward: the words of a `Call`,
then counts. A collective that meets another layer's, or a backward that meets a forward, thus
receives what it can read, and every rank raises the same error before any rows are sent.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOST_PARTS = 255  # of an exchange with overlap
BLOCK = 32  # int64 numbers in the opening message for each rank
DTYPES = sorted({x for x in vars(torch).values() if isinstance(x, torch.dtype)}, key=str)


class Disagreement(RuntimeError):
    """Ranks make different calls. All of them raise it, before any rows are sent."""


class Record:
    """What a rank remembers of a group as long as that lives.

    numbers: of layers, in the order in which the rank makes them; a copy has none before its first
        call
    has_failed: whether experts raised an exception in the last call here, and the other ranks do
        not know yet
    backwards: how many backwards of layers belong to a torch backward that has not ended
    is_open: whether a call has begun an exchange here, and its rows are not all sent
    is_broken: whether an exception other than a Disagreement ended such a call
    """

    def __init__(self) -> None:
        self.numbers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._next = itertools.count()
        self.has_failed = False
        self.backwards = 0
        self.is_open = False
        self.is_broken = False

    def number_of(self, layer: nn.Module) -> int:
        if layer not in self.numbers:
            self.numbers[layer] = next(self._next)
        return self.numbers[layer]

    def begin_forward(self) -> bool:
        """Returns has_failed, which the call tells the other ranks.

        Raises RuntimeError after an exchange that ended in an exception on this rank.
        """
        # Inside a backward, as that of a checkpoint, others may be under way.
        is_left = self.backwards > 0 and torch._C._current_graph_task_id() == -1
        if self.is_broken or is_left:
            raise RuntimeError(
                f"ExpertParallel: an exception ended a {'backward' if is_left else 'call'} on this "
                "rank, and other ranks may still wait for its rows. Restart all ranks, or create "
                "new groups and layers on all of them"
            )
        has_failed, self.has_failed = self.has_failed, False
        return has_failed

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a call: an exception while it is open, but a Disagreement, breaks the group."""
        was_open = self.is_open  # by a call around this one
        try:
            yield
        except Disagreement:
            raise
        except BaseException:
            self.is_broken |= self.is_open
            raise
        finally:
            self.is_open = was_open

    @contextmanager
    def opens_backward(self, all_know: bool) -> Iterator[None]:
        """Around the exchange that opens a backward. An exception breaks the group, but for a
        Disagreement that all ranks know."""
        self.backwards += 1
        # Called when the whole backward has ended, and never after an exception.
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        try:
            yield
        except Disagreement:
            if all_know:
                self._end_backward()
            raise

    def _end_backward(self) -> None:
        self.backwards -= 1


_records: weakref.WeakKeyDictionary[dist.ProcessGroup, Record] = weakref.WeakKeyDictionary()


def record_of(group: dist.ProcessGroup) -> Record:
    return _records.setdefault(group, Record())


class Call(NamedTuple):
    """What all ranks of a group must have in common in one exchange.

    layer: its number on the group, as of its Record
    has_failed: as of the group's Record
    is_backward: whether the exchange is the backward's
    dtype, autocast_dtype: as an index of DTYPES; without autocast both are the tokens' dtype
    capacity: rows per expert, 0 where ranks may differ in it
    sharers_differ: whether ranks of its tensor_group make another call

    The rest has the names of ExpertParallel's arguments and of the tensors it was called with.
    """

    layer: int
    has_failed: bool
    is_backward: bool
    sharers_differ: bool
    dedup: bool
    uneven_tokens: bool
    average: bool
    deepep: bool
    drops_tokens: bool
    grad_enabled: bool
    tokens_require_grad: bool
    weights_require_grad: bool
    dtype: int
    autocast_dtype: int
    overlap: int
    tensor_parallel_size: int
    num_experts: int
    hidden_size: int
    k: int
    capacity: int

    def words(self, levels: int) -> list[int]:
        """The fields, packed into int64 numbers after one that no row begins with.

        levels: of the exchange, 1 or 2
        """
        words = [_MARK + levels]
        for fields in _WORDS:
            word = 0
            for name, bits in fields:
                word = word * 2**bits + getattr(self, name)
            words.append(word)
        return words

    @classmethod
    def of_words(cls, words: list[int]) -> Call:
        values: dict[str, Any] = {}
        for fields, word in zip(_WORDS, words[1:], strict=True):
            for name, bits in reversed(fields):
                word, values[name] = divmod(word, 2**bits)
        return cls(**values)


_FLAGS = {name for name, kind in get_type_hints(Call).items() if kind is bool}


def _packed() -> list[list[tuple[str, int]]]:
    """The fields of every word and their bits, at most 62 in a word."""
    few = {
        "layer": 20,
        "dtype": 8,
        "autocast_dtype": 8,
        "overlap": MOST_PARTS.bit_length(),
        "tensor_parallel_size": 12,
    }
    words: list[list[tuple[str, int]]] = [[]]
    for name in Call._fields:
        bits = 1 if name in _FLAGS else few.get(name, 31)
        if sum(bits for _, bits in words[-1]) + bits > 62:
            words.append([])
        words[-1].append((name, bits))
    return words


_WORDS = _packed()
NUM_WORDS = 1 + len(_WORDS)
_MARK = 0x2D6F655F65787421  # as float32 or float64 numbers far from those of rows


def check(sent: Tensor, received: Tensor, columns: int = NUM_WORDS) -> None:
    """Raises Disagreement where a rank makes another call.

    sent, received: [ranks, NUM_WORDS], to and from every rank
    columns: how many of the words must be the same; the first one tells the levels

    The error names what differs where the host can see it: in eager code on the CPU. On a GPU and
    in compiled code the device's own assertion fails, for which nothing waits.
    """
    is_same = (sent[:, :columns] == received[:, :columns]).all()
    message = "ExpertParallel: all ranks must make the same calls with the same options"
    if torch.compiler.is_compiling():
        torch._assert_async(is_same, message)
        return
    try:
        torch._assert_async(is_same, message)
    except RuntimeError:
        check_on_host(received.tolist())


def check_on_host(received: list[list[int]]) -> None:
    """`check`, with the words of all ranks, this one among them, on the host."""
    for rank, words in enumerate(received):
        if words[0] - _MARK not in (1, 2):
            raise RuntimeError(  # that other rank does not know, and this one must not go on
                f"ExpertParallel: rank {rank} of the group is in the middle of another call, and "
                "sends rows. Restart all ranks"
            )
    calls = list(map(Call.of_words, received))
    first = calls[0]
    failed = [rank for rank, call in enumerate(calls) if call.has_failed]
    for rank in failed:
        if len(failed) < len(calls):  # where all failed, all have given up the batch
            raise Disagreement(
                f"ExpertParallel: experts raised an exception in the last call on rank {rank} of "
                "the group, and the other ranks got NaN from them. All ranks raise this error once "
                "and may go on: give up the batch on all of them"
            )
    for rank, call in enumerate(calls):
        if call.sharers_differ:
            raise Disagreement(
                "ExpertParallel: ranks of a tensor_group must make the same call with the same "
                f"tokens, got another call in that of rank {rank} of the group; the error there "
                "says what differs"
            )
    for rank, call in enumerate(calls):
        if _place(call) != _place(first):
            raise Disagreement(
                "ExpertParallel: all ranks must make the same calls in the same order, got the "
                f"{_place(first)} on rank 0 of the group and the {_place(call)} on rank {rank}. "
                "Layers are numbered in the order in which a rank makes them, which must be the "
                "same on all ranks; a rank that skips a layer or gives up a batch must not do so "
                "alone"
            )
    for name in Call._fields:
        for rank, call in enumerate(calls):
            if getattr(call, name) != getattr(first, name):
                _fail(name, _value(first, name), rank, _value(call, name))
    for rank, words in enumerate(received):
        if words[0] != received[0][0]:
            _fail("levels", received[0][0] - _MARK, rank, words[0] - _MARK)


def disagreement(
    group: dist.ProcessGroup | None, call: Call, tokens: Tensor
) -> Disagreement | None:
    """What differs between the ranks of a tensor_group, which must not raise it alone."""
    words = torch.tensor([*call.words(1), tokens.shape[0]], device=tokens.device)
    of_ranks = [torch.empty_like(words) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_ranks, words, group=group)
    received = torch.stack(of_ranks).tolist()
    try:
        check_on_host([words[:-1] for words in received])
        for rank, (*_, count) in enumerate(received):
            if count != received[0][-1]:
                _fail("number of tokens in a tensor_group", received[0][-1], rank, count)
    except Disagreement as error:
        return error
    return None


def _place(call: Call) -> str:
    return f"{'backward' if call.is_backward else 'forward'} of layer {call.layer}"


def _value(call: Call, name: str) -> object:
    value = getattr(call, name)
    if name in ("dtype", "autocast_dtype"):
        return DTYPES[value]
    return bool(value) if name in _FLAGS else value


def _fail(name: str, first: object, rank: int, other: object) -> NoReturn:
    hint = "; with uneven_tokens=True it may differ" if name == "capacity" else ""
    raise Disagreement(
        f"ExpertParallel: all ranks must have the same {name}, got {first} on rank 0 of the group "
        f"and {other} on rank {rank}{hint}"
    )
