"""Set how this process reuses freed memory, and measure how far it grows. Linux with glibc only.

docs/performance.md explains the states of memory, and how a program keeps its memory.
"""

import ctypes
import mmap
import multiprocessing
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import moe_ext

# Numbers of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_SMALL, _LARGE = 128 << 10, 8 << 20


def keep_freed() -> None:
    """From now on this process reuses freed memory."""
    _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1})
    moe_ext.keep_memory(1 << 40)
    make_room()


def give_back() -> None:
    """From now on every freed block goes back to the system."""
    _set({_M_MMAP_THRESHOLD: _SMALL, _M_TRIM_THRESHOLD: _SMALL})


def give_back_large() -> None:
    """From now on freed blocks of 8 MiB or more go back, and smaller ones are reused.

    This is glibc's default, except that glibc learns the size. Call `give_back` first, or large
    blocks are served from the holes of earlier ones."""
    _set({_M_MMAP_THRESHOLD: _LARGE, _M_TRIM_THRESHOLD: -1})
    make_room()


_between: list[bytes] = []


def make_room(pieces: int = 32) -> None:
    """Make free pieces of used pages, each too small for a large block. Later allocations fill
    them, so call this after the operands of a timing are made.

    glibc seldom puts an aligned block where a freed one was. Without these pieces it may take new
    pages at the end of its memory for every block."""
    _between.clear()  # or the old pieces would join those that are free
    used = [b"\1" * (_LARGE // 2) for _ in range(2 * pieces)]
    _between.extend(used[1::2])  # in use, so that the free ones are not joined


def _set(options: dict[int, int]) -> None:
    libc = ctypes.CDLL(None)
    if not all(libc.mallopt(*option) for option in options.items()):
        raise OSError("mallopt refused")


def fetch(num_bytes: int = 1 << 30) -> None:
    """Touch this much memory and free it.

    A virtual machine may hand free memory to its host. To get such a page back takes ten times as
    long as to zero one, and the first implementation would pay for that."""
    with mmap.mmap(-1, num_bytes) as block:
        block.madvise(mmap.MADV_HUGEPAGE)
        for page in range(0, num_bytes, mmap.PAGESIZE):
            block[page] = 1


def in_new_process(
    function: Callable,
    *args,
    start: Callable[[], None] | None = None,
    environment: dict | None = None,
):
    """function(*args) in a process without memory of earlier calls. start: called there first, such
    as keep_freed; None leaves glibc's defaults."""
    context = multiprocessing.get_context("spawn")
    with (
        mock.patch.dict(os.environ, environment or {}),
        ProcessPoolExecutor(1, mp_context=context, initializer=start) as pool,
    ):
        return pool.submit(function, *args).result()


def trim() -> None:
    """Give all freed memory back to the system, moe_ext's too."""
    ctypes.CDLL(None).malloc_trim(0)
    _, limit = moe_ext.keep_memory()
    moe_ext.keep_memory(0)
    moe_ext.keep_memory(limit)


def growth(function: Callable[[], object]) -> int:
    """The most bytes by which this process grows during a call. Make a first call before it."""
    trim()  # or memory that earlier calls freed would serve this one uncounted
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts anew
    function()
    return _resident("VmHWM") - before


def limit() -> int:
    """Bytes that a bench may use: four fifths of the memory of the machine or of its cgroup."""
    all_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup/memory.max")
    if group.exists() and (text := group.read_text().strip()).isdecimal():
        all_bytes = min(all_bytes, int(text))
    return all_bytes * 4 // 5


def _resident(line: str) -> int:
    """Bytes of this process that are resident now (VmRSS), or the most so far (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{line}:\s*(\d+) kB", status)[1]) * 1024
