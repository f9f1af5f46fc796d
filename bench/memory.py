"""What a bench does with a process's memory, and sees of it. Linux with glibc; elsewhere an error.

glibc gives every large block back to the system when it is freed, so that the next one comes as
new pages, which the system zeroes at first use. A program that trains may keep its memory instead:

    GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184

or load jemalloc or tcmalloc, as PyTorch's tuning guide says.
"""

import ctypes
import mmap
import multiprocessing
import os
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

# Numbers of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_SMALL, _LARGE = 128 << 10, 8 << 20


def keep_freed() -> None:
    """From here on this process reuses what it freed."""
    _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1})
    _make_room()


def give_back() -> None:
    """From here on every block that is freed goes back to the system."""
    _set({_M_MMAP_THRESHOLD: _SMALL, _M_TRIM_THRESHOLD: _SMALL})


def give_back_large() -> None:
    """From here on every block of 8 MiB that is freed goes back, and smaller ones are reused. glibc
    does so untold, but for the size, which it learns, and for what it can serve from the holes that
    earlier blocks have left: where `give_back` came first there are none."""
    _set({_M_MMAP_THRESHOLD: _LARGE, _M_TRIM_THRESHOLD: -1})
    _make_room()


_between: list[bytes] = []


def _make_room(pieces: int = 32) -> None:
    """Free memory whose pages have been used, in pieces that are too small for large blocks, made
    once. glibc seldom gives an aligned block the place of one that was freed: without room it may
    take new pages for every one from where its memory ends."""
    if _between:
        return
    used = [b"\1" * (_LARGE // 2) for _ in range(2 * pieces)]
    _between.extend(used[1::2])  # by which they are not joined


def _set(options: dict[int, int]) -> None:
    libc = ctypes.CDLL(None)
    if not all(libc.mallopt(*option) for option in options.items()):
        raise OSError("mallopt refused")


def fetch(num_bytes: int = 1 << 30) -> None:
    """Free memory of the system becomes such as is there. A virtual machine may hand what is free
    to its host, which takes ten times as long to give a page as the system to zero it: whoever
    asked first would pay for that."""
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
    """function(*args) where no earlier call has left its memory. start: called there first, as
    keep_freed; None leaves glibc as it is."""
    context = multiprocessing.get_context("spawn")
    before = os.environ.copy()
    os.environ.update(environment or {})
    try:
        with ProcessPoolExecutor(1, mp_context=context, initializer=start) as pool:
            return pool.submit(function, *args).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def trim() -> None:
    """What is freed and still with the process goes back to the system."""
    ctypes.CDLL(None).malloc_trim(0)


def start_peak() -> int:
    """Bytes of this process in memory now, from where `peak` counts anew."""
    now = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    return now


def peak() -> int:
    return _resident("VmHWM")


def _resident(line: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{line}:\s*(\d+) kB", status)[1]) * 1024
