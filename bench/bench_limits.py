"""The limits of the machine, beside a large dispatch and combine: page zeroing and reading.

    python bench/bench_limits.py [--mebibytes 256] [--seconds 1]

One thread, float32 rows of 8 KiB, K = 8. Prints the milliseconds of
  first touch                 the system zeroes this many new bytes, in huge pages
  dispatch, index_select      write as many bytes, in each state of memory (bench_ops.py)
  read                        sums as many bytes, row after row
  combine, embedding_bag      read the same rows, each once
and, for 256 MiB, writes bench/results/<machine>/limits.json.
"""

import mmap
import statistics

import bench_ops
import memory
import torch
from common import keep, parser, positive, setting
from report import limits_table
from timing import clock, spreads

SHAPE = "qwen3, half"
NAMES = {"dispatch": "index_select", "combine": "embedding_bag"}


def first_touch(size: int) -> float:
    def touch() -> None:
        for page in range(0, size, 2 << 20):
            pages[page] = 1

    taken = []
    for _ in range(9):
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
            pages.madvise(mmap.MADV_HUGEPAGE)
            taken.append(next(clock(touch, [()])))
    return statistics.median(taken)


def read(size: int, seconds: float) -> float:
    torch.set_num_threads(1)
    rows = torch.randn(size // 4)
    return spreads({"read": clock(rows.sum, [()])}, seconds)["read"].median


def operator(op: str, state: str, num_tokens: int, seconds: float) -> dict[str, float]:
    """Seconds of an operator, checked, and of torch's counterpart."""
    options = ["--device", "cpu", "--dtype", "float32", "--threads", "1", "--op", op]
    options += ["--tokens", str(num_tokens), "--seconds", str(seconds)]
    (result,) = bench_ops.measure_in(bench_ops.parse(options), SHAPE, state)
    times = result["ops"][0]["seconds"]
    return {op: times["moe_ext"], NAMES[op]: times[NAMES[op]]}


def main(arguments: list[str] | None = None) -> None:
    parse = parser(__doc__, seconds=1.0)
    parse.add_argument("--mebibytes", type=positive, default=256, help="bytes of rows (256)")
    options = parse.parse_args(arguments)
    size = options.mebibytes << 20
    shape = bench_ops.SHAPES[SHAPE]
    num_tokens = size // (4 * shape.hidden * shape.top_k)
    seconds = {"first touch": first_touch(size)}
    for state in ("new", "huge", "kept"):
        times = operator("dispatch", state, num_tokens, options.seconds)
        seconds |= {f"{name}, {state} memory": value for name, value in times.items()}
    seconds["read"] = memory.in_new_process(read, size, options.seconds, start=memory.keep_freed)
    seconds |= operator("combine", "kept", num_tokens, options.seconds)
    report = setting(torch.device("cpu")) | {"mebibytes": options.mebibytes, "seconds": seconds}
    print(limits_table(report))
    keep(report, "limits" if options.mebibytes == 256 else None, options.out)


if __name__ == "__main__":
    main()
