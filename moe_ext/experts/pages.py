"""Weights in huge pages: a processor reads them half again as fast as in pages of four kilobytes.

Linux puts memory into pages of two megabytes on request: before it is first used (`advise`), or
later, where it lies (`huge_pages`). Addresses and values stay as they are.
"""

import ctypes
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

_HUGE = 1 << 21
_AT_A_TIME = 32 * _HUGE  # between two parts a Ctrl-C is heard
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_PROBES = 3  # new memory each time; a busy system may refuse one


class HugePages(NamedTuple):
    """What `huge_pages` did.

    Attributes:
        total: bytes of the module's tensors on the CPU
        huge: bytes of them that lie in huge pages now; the ends of a tensor, less than two
            megabytes each, stay in small ones
        why_not: why more of them do not, "" where nothing was refused
    """

    total: int
    huge: int
    why_not: str

    def __str__(self) -> str:
        text = f"{self.huge / 2**20:.0f} of {self.total / 2**20:.0f} MiB in huge pages"
        return f"{text}: {self.why_not}" if self.why_not else text


def huge_pages(module: nn.Module) -> HugePages:
    """Put the parameters and buffers of a module into huge pages, where they lie.

    Weights are then read up to half again as fast, which is most of the time of a forward of few
    tokens on a CPU. Takes two to three seconds per gigabyte. `GroupedExperts` asks for huge pages
    when it is made; call this for other modules, and after weights were moved, cast or loaded.

    Args:
        module: any module, as a model of transformers; tensors on other devices are left alone

    Returns:
        what was done. Nothing, and why, elsewhere than on Linux 6.1 or later; weights that are
        mapped from a file stay in its pages.
    """
    storages = list(_storages((*module.parameters(), *module.buffers())))
    total, huge, why_not = sum(size for _, size in storages), 0, why_not_here()
    if why_not:
        return HugePages(total, 0, why_not)
    for address, size in _with_progress(list(_parts(storages))):
        done, error = _collapse(address, size)
        huge += done
        if error == errno.EINVAL:
            why_not = "the rest is mapped from a file or shared; load the weights without mmap"
        elif error:
            why_not = f"the system refused some: {os.strerror(error)}"
    return HugePages(total, huge, why_not)


def _collapse(address: int, size: int) -> tuple[int, int]:
    """Bytes that lie in huge pages now, and the last error or 0; page by page where all at once is
    refused, each twice: the system refuses one that it works on just then."""
    if _madvise(address, size, _MADV_COLLAPSE) == 0:
        return size, 0
    # A heap that shrank and grew again may be several mappings, and a huge page lies in one: the
    # same advice for all of them lets the system join them.
    _madvise(address, size, _MADV_HUGEPAGE)
    pages = range(address, address + size, _HUGE)
    errors = [
        _madvise(page, _HUGE, _MADV_COLLAPSE) and _madvise(page, _HUGE, _MADV_COLLAPSE)
        for page in pages
    ]
    return errors.count(0) * _HUGE, next((error for error in reversed(errors) if error), 0)


def advise(tensor: Tensor) -> Tensor:
    """Ask for huge pages for a tensor that was not written yet, and return it."""
    if sys.platform == "linux":
        for address, size in _parts(_storages([tensor])):
            _madvise(address, size, _MADV_HUGEPAGE)  # where it is refused nothing is lost
    return tensor


def why_not_here() -> str:
    """Why this system does not put memory into huge pages on request; "" where it does."""
    if sys.platform != "linux":
        return f"needs Linux 6.1 or later, this is {sys.platform}"
    for _ in range(_PROBES):
        probe = torch.zeros(2 * _HUGE, dtype=torch.uint8, device="cpu")
        ((address, size),) = _parts(_storages([probe]))
        done, error = _collapse(address, size)
        if done:
            return ""
    if error == errno.EINVAL:
        return f"needs Linux 6.1 or later with transparent huge pages, got {os.uname().release}"
    return f"the system refused: {os.strerror(error)}"


def _storages(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    """Address and size of the memory of tensors on the CPU, each once."""
    seen = set()
    for tensor in tensors:
        # A subclass, as a fake or a distributed tensor, may have no memory of its own.
        is_plain = type(tensor) in (Tensor, nn.Parameter)
        if not is_plain or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            continue
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in seen:
            seen.add(address)
            yield address, storage.nbytes()


def _parts(storages: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The whole huge pages within memory."""
    for address, size in storages:
        begin, end = -(-address // _HUGE) * _HUGE, (address + size) // _HUGE * _HUGE
        for part in range(begin, end, _AT_A_TIME):
            yield part, min(_AT_A_TIME, end - part)


def _madvise(address: int, size: int, advice: int) -> int:
    """0, or the system's error."""
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice)
    return ctypes.get_errno() if failed else 0


def _with_progress(parts: list[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    try:
        from tqdm import tqdm
    except ImportError:
        return parts
    return tqdm(parts, desc="huge pages", unit="part", leave=False, disable=None)
