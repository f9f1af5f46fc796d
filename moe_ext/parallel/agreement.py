"""Whether processes were made for each other."""

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .exchange import Exchange

DTYPES = sorted({x for x in vars(torch).values() if isinstance(x, torch.dtype)}, key=str)
HINTS = {"capacity": "; with uneven_tokens=True it may differ"}


def agree(exchange: Exchange, device: torch.device, **fields: int | bool | torch.dtype) -> None:
    """Raises RuntimeError in every process of the exchange where a field is not the same in all."""
    numbers = [DTYPES.index(x) if x in DTYPES else int(x) for x in fields.values()]
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    # Selective checkpointing must not see what a recomputation does not repeat.
    with _disable_current_modes():
        of_all = exchange.counts(mine.expand(exchange.size, -1)).tolist()
    for i, (name, value) in enumerate(fields.items()):
        kind = DTYPES.__getitem__ if value in DTYPES else type(value)
        first, *others = (kind(numbers[i]) for numbers in of_all)
        for rank, other in enumerate(others, start=1):
            if other != first:
                raise RuntimeError(
                    f"ExpertParallel: all processes must have the same {name}, got {first} in the "
                    f"group's process 0 and {other} in its process {rank}{HINTS.get(name, '')}"
                )
