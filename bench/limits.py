"""What the machine itself takes where a large dispatch or combine is at its limit.

    python bench/limits.py [--mebibytes 256]

One thread. first touch: the system's zeroing of so many new bytes in huge pages. dispatch and
index_select: rows of 8 KiB to as many bytes, K = 8, into new memory, new memory for which torch too
asks for huge pages, and memory that is kept. read: so many bytes summed, row after row. combine and
embedding_bag: the same rows, each read once. Writes bench/results/<machine>/limits.json.
"""

import argparse
import mmap
import statistics
from collections.abc import Callable
from pathlib import Path

import memory
import torch
from timing import clock, compare, keep, positive, setting, spreads, timed
from torch.nn import functional as F

import moe_ext

HIDDEN, TOP_K, NUM_EXPERTS = 2048, 8, 128


def first_touch(size: int) -> float:
    def touch() -> None:
        for page in range(0, size, 2 << 20):
            pages[page] = 1

    taken = []
    for _ in range(9):
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
            pages.madvise(mmap.MADV_HUGEPAGE)
            taken.append(timed(touch))
    return statistics.median(taken)


def operators(size: int, names: tuple[str, ...]) -> dict[str, float]:
    """Medians in seconds."""
    torch.set_num_threads(1)
    num_tokens = size // (4 * HIDDEN * TOP_K)
    choice = moe_ext.gate(torch.randn(num_tokens, NUM_EXPERTS), TOP_K, normalize=True)
    plan = moe_ext.make_plan(choice.expert_ids, NUM_EXPERTS, order="token")
    tokens = torch.randn(num_tokens, HIDDEN)
    index, slots, weights = (plan.sources // TOP_K).long(), plan.slots.long(), choice.weights
    rows = moe_ext.dispatch(tokens, plan)
    functions: dict[str, Callable] = {
        "dispatch": lambda: moe_ext.dispatch(tokens, plan),
        "index_select": lambda: tokens.index_select(0, index),
        "read": rows.sum,
        "combine": lambda: moe_ext.combine(rows, plan, weights),
        "embedding_bag": lambda: F.embedding_bag(
            slots, rows, mode="sum", per_sample_weights=weights
        ),
    }
    timers = {name: clock(functions[name], [()]) for name in names}
    return {name: s.median for name, s in spreads(compare(timers, 1.0)).items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mebibytes", type=positive, default=256)
    parser.add_argument("--out", type=Path, help="the JSON file, wherever")
    options = parser.parse_args(arguments)
    size = options.mebibytes << 20
    placing, reading = ("dispatch", "index_select"), ("read", "combine", "embedding_bag")
    new = memory.in_new_process(operators, size, placing, start=memory.give_back)
    huge = memory.in_new_process(
        operators, size, placing, start=memory.give_back, environment={"THP_MEM_ALLOC_ENABLE": "1"}
    )
    kept = memory.in_new_process(operators, size, placing, start=memory.keep_freed)
    seconds = {"first touch": first_touch(size)}
    for state, taken in (("new", new), ("huge", huge), ("kept", kept)):
        seconds |= {f"{name}, {state} memory": value for name, value in taken.items()}
    seconds |= memory.in_new_process(operators, size, reading, start=memory.keep_freed)
    report = setting(torch.device("cpu")) | {"mebibytes": options.mebibytes, "seconds": seconds}
    for name, value in seconds.items():
        print(f"{name:28}{value * 1e3:8.1f} ms")
    keep(report, "limits" if options.mebibytes == 256 else None, options.out)


if __name__ == "__main__":
    main()
