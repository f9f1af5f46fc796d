"""Memory that is kept for large results on a CPU: csrc/cpu/kept_memory.h."""

from typing import NamedTuple

import torch
from torch import Tensor


class KeptMemory(NamedTuple):
    """What `keep_memory` found.

    Attributes:
        kept: bytes that are kept now for the next results
        limit: the most that may be kept; 0 where none are
    """

    kept: int
    limit: int

    def __str__(self) -> str:
        return f"{self.kept >> 20} MiB are kept, at most {self.limit >> 20}"


def keep_memory(limit: int | None = None) -> KeptMemory:
    """Tell how much memory of freed results is kept for the next ones, and set the most.

    New memory is slow: the system zeroes it, and a virtual machine may have to get it back from
    its host. So the results of 4 MiB and more that operators make on a CPU are not given back when
    they are freed, up to an eighth of the machine's memory. What is kept may be taken by the system
    when it runs out of memory.

    Args:
        limit: the most bytes to keep in this process from now on; what is beyond it is given back.
            0 keeps none. None changes nothing.

    Returns:
        bytes that are kept, and the limit. The limit is always 0 elsewhere than on Linux, and with
        a torch before 2.11: large results then lie in the memory of torch's allocator.

    Raises:
        ValueError: the limit is negative
    """
    if limit is not None and limit < 0:
        raise ValueError(f"limit must be at least 0 bytes, got {limit}")
    return KeptMemory(*torch.ops.moe_ext.keep_memory.default(torch.empty(0), limit))


def keep_none(like: Tensor, limit: int | None) -> tuple[int, int]:
    """keep_memory of devices whose results lie in torch's memory."""
    return 0, 0
