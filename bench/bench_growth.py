"""Time and memory as the number of tokens grows, then as the number of experts grows.

    python bench/bench_growth.py [--most 1000000] [--seconds 0.3]

Times each operator, and forward and backward of a layer beside DeepSpeed's layer with index lists
and, as far as its masks [T, E, C] fit, with masks. K = 2, in processes that keep freed memory. A
slope is of log time over log T for the upper half of the points: 1 is linear. Memory is the most
by which a process grows in a step. A complete run writes bench/results/<machine>/growth.json.
"""

import argparse
import math
from collections.abc import Callable

import layer_peers
import memory
import torch
from bench_layer import Case, Point
from common import keep, parser, positive, setting
from timing import clock, compare, spreads
from tqdm import tqdm

import moe_ext

H, F, E, K = 64, 64, 16, 2
MOST_BYTES = 6 << 30
LAYERS = {peer.name: peer for peer in (layer_peers.OURS, *layer_peers.LAYERS)}
BESIDE = ("moe_ext", "DeepSpeed", "DeepSpeed dense")
OPERATORS = ("gate", "plan", "dispatch", "combine")
EXPERTS = (8, 32, 128, 512)


def token_counts(most: int) -> list[int]:
    """Two for every power of ten."""
    counts = [round(1000 * 10 ** (i / 2)) for i in range(9)]
    return [count for count in counts if count <= most]


def step_of(name: str, num_tokens: int, num_experts: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) / math.sqrt(size[-1])

    weights = layer_peers.Weights(
        normal(num_experts, H), normal(num_experts, 2 * F, H), normal(num_experts, H, F)
    )
    layer = LAYERS[name].make(weights, K)
    tokens = torch.randn(num_tokens, H, requires_grad=True)

    def step() -> None:
        tokens.grad = None
        layer.zero_grad(set_to_none=True)
        layer(tokens).sum().backward()

    return step


def check(name: str) -> None:
    """Raise where a layer's output or gradients are wrong, before it is timed."""
    case = Case(Point(1000, H, F, E, K), torch.float32)
    if not (error := case.error(case.make(LAYERS[name]))) <= 1e-5:
        raise AssertionError(f"{name}: relative error {error:.2g}")


def costs_of(name: str, sizes: list[tuple[int, int]], budget: float) -> list[tuple[float, int]]:
    """Seconds and bytes of one step for each (number of tokens, number of experts). The largest
    comes first: its freed memory is room for the others."""
    check(name)
    costs = {size: cost_of(name, *size, budget) for size in tqdm(sorted(sizes)[::-1], leave=False)}
    return [costs[size] for size in sizes]


def cost_of(name: str, num_tokens: int, num_experts: int, budget: float) -> tuple[float, int]:
    step = step_of(name, num_tokens, num_experts)
    seconds = spreads(compare({name: clock(step, [()])}, budget, rounds=1))[name].median
    return seconds, memory.growth(step)


def operator_seconds(counts: list[int], budget: float) -> dict[str, list[float]]:
    """By operator, for each number of tokens."""
    seconds: dict[str, list[float]] = {name: [] for name in OPERATORS}
    for num_tokens in tqdm(counts, desc="operators", leave=False):
        logits, tokens = torch.randn(num_tokens, E), torch.randn(num_tokens, H)
        choice = moe_ext.gate(logits, K)
        plan = moe_ext.make_plan(choice.expert_ids, E)
        rows = moe_ext.dispatch(tokens, plan)
        calls = {
            "gate": (moe_ext.gate, (logits, K)),
            "plan": (moe_ext.make_plan, (choice.expert_ids, E)),
            "dispatch": (moe_ext.dispatch, (tokens, plan)),
            "combine": (moe_ext.combine, (rows, plan, choice.weights)),
        }
        timers = {name: clock(function, [args]) for name, (function, args) in calls.items()}
        for name, spread in spreads(compare(timers, budget)).items():
            seconds[name].append(spread.median)
    return seconds


def fits(name: str, num_tokens: int) -> bool:
    """Whether four masks [T, E, C] fit, with C, the largest load, 1.2 times T * K / E."""
    return "dense" not in name or 4 * 4 * num_tokens * num_tokens * K * 1.2 < MOST_BYTES


def slope(counts: list[int], values: list[float]) -> float:
    """The slope of log values over log counts, least squares over the upper half."""
    half = len(counts) // 2
    x = torch.tensor(counts[half:], dtype=torch.float64).log()
    y = torch.tensor(values[half:], dtype=torch.float64).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parse = parser(__doc__, seconds=0.3)
    parse.add_argument("--most", type=positive, default=1_000_000, help="largest T (1000000)")
    options = parse.parse_args(arguments)
    if len(token_counts(options.most)) < 3:
        parse.error(f"--most must be at least 10000, for a slope, got {options.most}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    counts = token_counts(options.most)
    seconds: dict[str, list[float]] = {}
    grown: dict[str, list[int]] = {}
    of_experts: dict[int, dict[str, float]] = {num_experts: {} for num_experts in EXPERTS}
    names = [name for name in BESIDE if LAYERS[name].missing(torch.device("cpu")) is None]

    def apart(function: Callable, *args):
        return memory.in_new_process(function, *args, options.seconds, start=memory.keep_freed)

    seconds |= apart(operator_seconds, counts)
    for name in tqdm(names, leave=False):
        here = [(count, E) for count in counts if fits(name, count)]
        costs = apart(costs_of, name, here + [(4096, num_experts) for num_experts in EXPERTS])
        seconds[f"layer, {name}"] = [of_step for of_step, _ in costs[: len(here)]]
        grown[name] = [bytes_of_step for _, bytes_of_step in costs[: len(here)]]
        for num_experts, (of_step, _) in zip(EXPERTS, costs[len(here) :], strict=True):
            of_experts[num_experts][name] = of_step

    def slopes(of: dict[str, list]) -> dict[str, float]:
        return {name: slope(counts[: len(values)], values) for name, values in of.items()}

    report = setting(torch.device("cpu")) | {
        **{"hidden": H, "ffn": F, "num_experts": E, "top_k": K, "tokens": counts},
        **{"seconds": seconds, "bytes": grown, "of_experts": of_experts},
        **{"slope": slopes(seconds), "slope_bytes": slopes(grown)},
    }
    for name, values in seconds.items():
        print(
            f"{name:24} slope {report['slope'][name]:.2f}, "
            f"{values[-1] * 1e3:.1f} ms at T = {counts[len(values) - 1]}"
        )
    for name, values in grown.items():
        print(
            f"memory of {name:14} slope {report['slope_bytes'][name]:.2f}, "
            f"{values[-1] / 2**20:.0f} MiB at T = {counts[len(values) - 1]}"
        )
    for num_experts, of_names in of_experts.items():
        cells = ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in of_names.items())
        print(f"T = 4096, E = {num_experts}: {cells}")
    is_part = options.most < 1_000_000
    keep(report, None if is_part else "growth", options.out)


if __name__ == "__main__":
    main()
