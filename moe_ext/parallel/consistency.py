"""Check that all ranks make the same call of the same layer.

Every exchange, forward and backward, opens with one message of a fixed size: the words of a
`CallRecord`, then counts. So a rank that meets another layer's call, or a backward that meets a
forward, receives a message that it can read. Every rank then raises the same error before any rows
are sent.
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

MAX_OVERLAP = 255
BLOCK = 32  # int64 numbers in the opening message for each rank
DTYPES = sorted({x for x in vars(torch).values() if isinstance(x, torch.dtype)}, key=str)


class ConsistencyError(RuntimeError):
    """Ranks make different calls. All of them raise it, before any rows are sent."""


class GroupState:
    """This rank's bookkeeping for a group, which lives as long as the group.

    layer_numbers: numbers of layers, in the order in which this rank creates them; a copy has none
        before its first call
    has_failed: experts raised an exception in the last call here, and the other ranks do not know
        yet
    backwards: layers' backwards that belong to a torch backward in progress
    is_exchanging: a call has begun an exchange here, and not all its rows are sent
    is_broken: an exception other than a ConsistencyError ended such a call
    """

    def __init__(self) -> None:
        self.layer_numbers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._next = itertools.count()
        self.has_failed = False
        self.backwards = 0
        self.is_exchanging = False
        self.is_broken = False

    def number_of(self, layer: nn.Module) -> int:
        if layer not in self.layer_numbers:
            self.layer_numbers[layer] = next(self._next)
        return self.layer_numbers[layer]

    def take_failure(self) -> bool:
        """Return has_failed, which the call tells the other ranks, and reset it.

        Raises RuntimeError after an exchange that ended in an exception on this rank.
        """
        # Inside a backward, such as that of a checkpoint, others may be in progress.
        is_aborted = self.backwards > 0 and torch._C._current_graph_task_id() == -1
        if self.is_broken or is_aborted:
            raise RuntimeError(
                f"ExpertParallel: an exception ended a {'backward' if is_aborted else 'call'} on "
                "this rank, and other ranks may still wait for its rows. Restart all ranks, or "
                "create new groups and layers on all of them"
            )
        has_failed, self.has_failed = self.has_failed, False
        return has_failed

    @contextmanager
    def call(self) -> Iterator[None]:
        """Wrap a call. An exception during its exchange breaks the group, unless all know it."""
        was_exchanging = self.is_exchanging  # in a call around this one
        try:
            yield
        except ConsistencyError:
            raise
        except BaseException:
            self.is_broken |= self.is_exchanging
            raise
        finally:
            self.is_exchanging = was_exchanging

    @contextmanager
    def backward(self, all_know: bool) -> Iterator[None]:
        """Wrap the check of a backward. An exception there breaks the group.

        all_know: all ranks raise a ConsistencyError, which then breaks nothing
        """
        self.backwards += 1
        # Called when the whole backward has ended, and never after an exception.
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        try:
            yield
        except ConsistencyError:
            if all_know:
                self._end_backward()
            raise

    def _end_backward(self) -> None:
        self.backwards -= 1


_states: weakref.WeakKeyDictionary[dist.ProcessGroup, GroupState] = weakref.WeakKeyDictionary()


def state_of(group: dist.ProcessGroup) -> GroupState:
    return _states.setdefault(group, GroupState())


class CallRecord(NamedTuple):
    """The facts of a call in which all ranks of a group must agree.

    layer: its number in the GroupState
    has_failed: as in the GroupState
    is_backward: whether the exchange belongs to the backward
    dtype, autocast_dtype: indices into DTYPES; without autocast both are the tokens' dtype
    num_gaps: places without an expert, where experts do not divide evenly
    capacity: rows per expert, 0 unless has_equal_capacity
    tensor_group_differs: ranks of its tensor_group make another call

    Other fields have the names of ExpertParallel's arguments and of the tensors of the call.
    """

    layer: int
    has_failed: bool
    is_backward: bool
    tensor_group_differs: bool
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
    num_gaps: int
    hidden_size: int
    k: int
    capacity: int

    @property
    def has_equal_capacity(self) -> bool:
        """Whether all ranks have one capacity; otherwise rows are counted before they are sent."""
        return self.drops_tokens and not (self.uneven_tokens or self.dedup)

    @property
    def num_places(self) -> int:
        """The experts' places: as many on every rank."""
        return self.num_experts + self.num_gaps

    def words(self, levels: int) -> list[int]:
        """Pack the fields into int64 numbers, after a marker that rows never begin with.

        levels: all-to-all steps of the exchange, 1 or 2
        """
        words = [_MARKER + levels]
        for fields in _WORDS:
            word = 0
            for name, bits in fields:
                word = word * 2**bits + getattr(self, name)
            words.append(word)
        return words

    @classmethod
    def of_words(cls, words: list[int]) -> CallRecord:
        values: dict[str, Any] = {}
        for fields, word in zip(_WORDS, words[1:], strict=True):
            for name, bits in reversed(fields):
                word, values[name] = divmod(word, 2**bits)
        return cls(**values)


_FLAGS = {name for name, kind in get_type_hints(CallRecord).items() if kind is bool}


def _packed() -> list[list[tuple[str, int]]]:
    """The fields of each word and their widths, at most 62 bits in a word."""
    few = {
        "layer": 20,
        "dtype": 8,
        "autocast_dtype": 8,
        "overlap": MAX_OVERLAP.bit_length(),
        "tensor_parallel_size": 12,
        "num_gaps": 16,
    }
    words: list[list[tuple[str, int]]] = [[]]
    for name in CallRecord._fields:
        bits = 1 if name in _FLAGS else few.get(name, 31)
        if sum(bits for _, bits in words[-1]) + bits > 62:
            words.append([])
        words[-1].append((name, bits))
    return words


_WORDS = _packed()
NUM_WORDS = 1 + len(_WORDS)
_MARKER = 0x2D6F655F65787421  # read as float32 or float64, far from the numbers in rows


def check(sent: Tensor, received: Tensor, columns: int = NUM_WORDS) -> None:
    """Raise ConsistencyError where a rank makes another call.

    sent, received: [ranks, NUM_WORDS], to and from each rank
    columns: how many of the words must be equal; the first one holds the levels

    In eager code on the CPU the error names the difference. On a GPU and in compiled code an
    assertion on the device fails without names, so that the host never waits.
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
    """`check` on the host. received: the words of all ranks, including this one's"""
    for rank, words in enumerate(received):
        if words[0] - _MARKER not in (1, 2):
            # Not a ConsistencyError: that rank does not know, so this one must not go on.
            raise RuntimeError(
                f"ExpertParallel: rank {rank} of the group sends rows in the middle of another "
                "call. Restart all ranks"
            )
    calls = list(map(CallRecord.of_words, received))
    first = calls[0]
    failed = [rank for rank, call in enumerate(calls) if call.has_failed]
    if 0 < len(failed) < len(calls):  # if all failed, all have skipped the batch
        raise ConsistencyError(
            f"ExpertParallel: experts raised an exception in the last call on rank {failed[0]} of "
            "the group, and the other ranks got NaN from them. All ranks raise this error once and "
            "may continue: skip the batch on all of them"
        )
    for rank, call in enumerate(calls):
        if call.tensor_group_differs:
            raise ConsistencyError(
                "ExpertParallel: ranks of a tensor_group must make the same call with the same "
                f"tokens, got different calls in the tensor_group of rank {rank} of the group; "
                "the error on that rank names the difference"
            )
    for rank, call in enumerate(calls):
        if _name_of(call) != _name_of(first):
            raise ConsistencyError(
                "ExpertParallel: all ranks must make the same calls in the same order, got the "
                f"{_name_of(first)} on rank 0 of the group and the {_name_of(call)} on rank "
                f"{rank}. Layers are numbered in the order of their creation. Create and call them "
                "in the same order on all ranks; skip a layer or a batch on all ranks or on none"
            )
    for name in CallRecord._fields:
        for rank, call in enumerate(calls):
            if getattr(call, name) != getattr(first, name):
                _fail(name, _value(first, name), rank, _value(call, name))
    for rank, words in enumerate(received):
        if words[0] != received[0][0]:
            _fail("levels", received[0][0] - _MARKER, rank, words[0] - _MARKER)


def compare_tensor_group(
    group: dist.ProcessGroup | None, call: CallRecord, tokens: Tensor
) -> ConsistencyError | None:
    """Return the error that names how ranks of a tensor_group differ, or None.

    The caller raises it after it has told the other ranks.
    """
    words = torch.tensor([*call.words(1), tokens.shape[0]], device=tokens.device)
    gathered = [torch.empty_like(words) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, words, group=group)
    received = torch.stack(gathered).tolist()
    try:
        check_on_host([words[:-1] for words in received])
        for rank, (*_, count) in enumerate(received):
            if count != received[0][-1]:
                _fail("number of tokens in a tensor_group", received[0][-1], rank, count)
    except ConsistencyError as error:
        return error
    return None


def _name_of(call: CallRecord) -> str:
    return f"{'backward' if call.is_backward else 'forward'} of layer {call.layer}"


def _value(call: CallRecord, name: str) -> object:
    value = getattr(call, name)
    if name in ("dtype", "autocast_dtype"):
        return DTYPES[value]
    return bool(value) if name in _FLAGS else value


def _fail(name: str, first: object, rank: int, other: object) -> NoReturn:
    hint = "; with uneven_tokens=True it may differ" if name == "capacity" else ""
    raise ConsistencyError(
        f"ExpertParallel: all ranks must have the same {name}, got {first} on rank 0 of the group "
        f"and {other} on rank {rank}{hint}"
    )
