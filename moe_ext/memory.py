"""Memory that is kept for large results on a CPU: csrc/cpu/memory_pool.h."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import options


class KeptMemory(NamedTuple):
    """The result of `keep_memory`.

    Attributes:
        kept: bytes that are kept now for the next results
        limit: the most bytes that may be kept; 0 where none are
    """

    kept: int
    limit: int

    def __str__(self) -> str:
        return f"{self.kept >> 20} MiB are kept, at most {self.limit >> 20}"


def keep_memory(limit: int | None = None) -> KeptMemory:
    """Show how much memory of freed results this process keeps for new ones, and set the limit.

    New memory is slow: the system zeroes it, and a virtual machine may have to get it back from
    its host. So operators keep the memory of their results of 2 MiB and more on a CPU, in whole
    pages of 2 MiB, up to a quarter of the machine's memory, or of its control group's, and at most
    16 GiB. When more than an eighth of the limit has been freed, that memory is offered to the
    system, which takes it when it runs out of memory.

    Args:
        limit: the most bytes to keep from now on; the rest is given back. 0 keeps none. None
            changes nothing.

    Returns:
        bytes that are kept, and the limit. The limit is always 0 without the compiled library,
        elsewhere than on Linux, and with a torch before 2.11: large results then lie in the memory
        of torch's allocator.

    Raises:
        ValueError: the limit is negative, or no integer
        RuntimeError: in compiled code, which would not run it
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("call keep_memory outside of compiled code")
    if limit is not None:
        limit = options.integer("keep_memory", "limit", limit, 0)
    return KeptMemory(*torch.ops.moe_ext.keep_memory.default(torch.empty(0, device="cpu"), limit))


def keep_none(like: Tensor, limit: int | None) -> tuple[int, int]:
    """keep_memory for devices whose results are in torch's memory."""
    return 0, 0
