"""Time and memory as the number of tokens grows.

    python bench/bench_growth.py [--most 1000000] [--seconds 0.3]

Times each operator, and forward and backward of a layer beside DeepSpeed's layer with index lists
and, as far as its masks [T, E, C] fit, with masks, in processes that keep freed memory. Memory is
the most by which a process grows in a step. A complete run writes
bench/results/<machine>/growth.json; docs/performance.md explains its slopes.
"""

import math
from collections.abc import Callable
from functools import partial

import bench_ops
import layer_peers
import memory
import numpy as np
import torch
from bench_layer import Case, Point, why_not
from common import keep, parser, positive, setting
from report import growth_table
from timing import clock, spreads
from tqdm import tqdm

H, F, E, K = 64, 64, 16, 2
LAYERS = {peer.name: peer for peer in layer_peers.LAYERS}
BESIDE = ("moe_ext", "DeepSpeed", "DeepSpeed dense")
OPERATORS = ("gate", "plan", "dispatch", "combine")


def token_counts(most: int) -> list[int]:
    """Two for every power of ten."""
    counts = [round(1000 * 10 ** (i / 2)) for i in range(9)]
    return [count for count in counts if count <= most]


def costs_of(name: str, counts: list[int], budget: float) -> list[tuple[float, int]]:
    """Seconds and bytes of one step for each number of tokens. The largest comes first: its freed
    memory is room for the others."""
    Case(Point(1000, H, F, E, K), torch.float32).checked(LAYERS[name])
    return [cost_of(name, count, budget) for count in tqdm(counts[::-1], leave=False)][::-1]


def cost_of(name: str, num_tokens: int, budget: float) -> tuple[float, int]:
    case = Case(Point(num_tokens, H, F, E, K), torch.float32)
    step = partial(case.step, case.make(LAYERS[name]))
    seconds = spreads({name: clock(step, [()])}, budget, rounds=1)[name].median
    return seconds, memory.growth(step)


def operator_seconds(counts: list[int], budget: float) -> dict[str, list[float]]:
    """By operator, for each number of tokens."""
    seconds: dict[str, list[float]] = {name: [] for name in OPERATORS}
    for num_tokens in tqdm(counts, desc="operators", leave=False):
        shape = bench_ops.Shape(num_tokens, H, E, K)
        operands = bench_ops.operands(shape, torch.float32, torch.device("cpu"))
        cases = dict(bench_ops.cases(operands, torch.float32))
        if num_tokens == counts[0]:
            for name in OPERATORS:
                bench_ops.check(cases[name])
        timers = {name: clock(bench_ops.call, [(cases[name],)]) for name in OPERATORS}
        for name, spread in spreads(timers, budget).items():
            seconds[name].append(spread.median)
    return seconds


def fits(name: str, num_tokens: int) -> bool:
    """Whether masks [T, E, C] fit, with C, the largest load, 1.2 times T * K / E."""
    point, load = Point(num_tokens, H, F, E, K), int(1.2 * num_tokens * K / E)
    return why_not(LAYERS[name], point, torch.float32, load, math.inf) is None


def slope(counts: list[int], values: list[float]) -> float:
    """The slope of log values over log counts, least squares over the upper half."""
    half = len(counts) // 2
    return float(np.polyfit(np.log(counts[half:]), np.log(values[half:]), 1)[0])


def main(arguments: list[str] | None = None) -> None:
    parse = parser(__doc__, seconds=0.3)
    parse.add_argument("--most", type=positive, default=1_000_000, help="largest T (1000000)")
    options = parse.parse_args(arguments)
    counts = token_counts(options.most)
    if len(counts) < 3:
        parse.error(f"--most must be at least 10000, for a slope, got {options.most}")

    def apart(function: Callable, *args):
        return memory.in_new_process(function, *args, options.seconds, start=memory.keep_freed)

    seconds: dict[str, list[float]] = apart(operator_seconds, counts)
    grown: dict[str, list[int]] = {}
    for name in tqdm(BESIDE, leave=False):
        if fitting := [count for count in counts if fits(name, count)]:
            costs = apart(costs_of, name, fitting)
            seconds[f"layer, {name}"], grown[name] = map(list, zip(*costs, strict=True))

    def slopes(of: dict[str, list]) -> dict[str, float]:
        return {name: slope(counts[: len(values)], values) for name, values in of.items()}

    report = setting(torch.device("cpu")) | {
        **{"hidden": H, "ffn": F, "num_experts": E, "top_k": K, "tokens": counts},
        **{"seconds": seconds, "bytes": grown},
        **{"slope": slopes(seconds), "slope_bytes": slopes(grown)},
    }
    print(growth_table(report))
    is_part = options.most < 1_000_000
    keep(report, None if is_part else "growth", options.out)


if __name__ == "__main__":
    main()
