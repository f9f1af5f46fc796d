"""Whether processes were made for each other."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .exchange import Exchange

HINT = "; with uneven_tokens=True it may differ"
DTYPES = sorted({x for x in vars(torch).values() if isinstance(x, torch.dtype)}, key=str)


def agree(exchange: Exchange, device: torch.device, **fields: int | bool | torch.dtype) -> None:
    """Raises RuntimeError in every process of the exchange where a field is not the same in all."""
    numbers = [DTYPES.index(x) if isinstance(x, torch.dtype) else int(x) for x in fields.values()]
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    # Selective checkpointing must not see what a recomputation does not repeat.
    with _disable_current_modes():
        of_all = exchange.counts(mine.expand(exchange.size, -1)).tolist()
    for i, (name, value) in enumerate(fields.items()):
        kind: Callable[[int], object] = (
            DTYPES.__getitem__ if isinstance(value, torch.dtype) else type(value)
        )
        first, *others = (kind(numbers[i]) for numbers in of_all)
        for rank, other in enumerate(others, start=1):
            if other != first:
                _fail(name, (0, first), (rank, other))


def same_capacity(of_all: torch.Tensor, capacity: int, rank: int) -> None:
    """Raises RuntimeError where a process has another one; on a GPU, and in compiled code, the
    device's own assertion fails, for which nothing waits.

    of_all: [processes] integers
    """
    is_same = (of_all == capacity).all()
    message = f"ExpertParallel: all processes must have the same capacity{HINT}"
    if torch.compiler.is_compiling():
        torch._assert_async(is_same, message)
        return
    try:
        torch._assert_async(is_same, message)
    except RuntimeError:  # on the CPU, where it is known at once
        for other, theirs in enumerate(of_all.tolist()):
            if theirs != capacity:
                _fail("capacity", *sorted([(rank, capacity), (other, theirs)]))


def _fail(name: str, first: tuple, other: tuple) -> None:
    hint = HINT if name == "capacity" else ""
    raise RuntimeError(
        f"ExpertParallel: all processes must have the same {name}, got {first[1]} in the group's "
        f"process {first[0]} and {other[1]} in its process {other[0]}{hint}"
    )
