"""How time and memory grow with the number of tokens, and with experts times capacity.

    python bench/bench_growth.py [--most 1000000] [--seconds 0.5]

Each operator and a layer's forward and backward at T from a thousand on, K = 2, in processes that
keep the memory they freed; beside DeepSpeed's layer with index lists, and with its masks [T, E, C]
as far as they fit. Then one T with more and more experts. The slope is of log time over log T for
the upper half of the points: 1 is linear. "memory" is how far a process grows at the most in one
step. Where all was run, writes bench/results/<machine>/growth.json.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import memory
import peers
import torch
from timing import clock, compare, keep, positive, setting, spreads
from torch import nn
from tqdm import tqdm

import moe_ext

H, F, E, K = 64, 64, 16, 2
MOST_BYTES = 6 << 30
LAYERS = {peer.name: peer for peer in (peers.OURS, *peers.LAYERS)}
BESIDE = ("moe_ext", "DeepSpeed", "DeepSpeed dense")
OPERATORS = ("gate", "plan", "dispatch", "combine")
EXPERTS = (8, 32, 128, 512)


def token_counts(most: int) -> list[int]:
    """Two for every power of ten."""
    counts = [round(1000 * 10 ** (i / 2)) for i in range(9)]
    return [count for count in counts if count <= most]


def layer_of(name: str, num_experts: int) -> nn.Module:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) / math.sqrt(size[-1])

    weights = peers.Weights(
        normal(num_experts, H), normal(num_experts, 2 * F, H), normal(num_experts, H, F)
    )
    return LAYERS[name].make(weights, K)


def step_of(name: str, num_tokens: int, num_experts: int) -> Callable[[], None]:
    layer = layer_of(name, num_experts)
    tokens = torch.randn(num_tokens, H, requires_grad=True)

    def step() -> None:
        tokens.grad = None
        layer.zero_grad(set_to_none=True)
        layer(tokens).sum().backward()

    return step


def costs_of(name: str, sizes: list[tuple[int, int]], budget: float) -> list[tuple[float, int]]:
    """Seconds and bytes of one step for each (number of tokens, number of experts). The largest
    comes first: what it freed is room for the others."""
    costs = {size: cost_of(name, *size, budget) for size in tqdm(sorted(sizes)[::-1], leave=False)}
    return [costs[size] for size in sizes]


def cost_of(name: str, num_tokens: int, num_experts: int, budget: float) -> tuple[float, int]:
    step = step_of(name, num_tokens, num_experts)
    seconds = spreads(compare({name: clock(step, [()])}, budget, rounds=1))[name].median
    memory.trim()
    before = memory.start_peak()
    step()
    return seconds, memory.peak() - before


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
    """Of masks [T, E, C] with C the largest load, a little above T * K / E; several at a time."""
    return "dense" not in name or 4 * 4 * num_tokens * num_tokens * K * 1.2 < MOST_BYTES


def slope(counts: list[int], values: list[float]) -> float:
    """Of the logarithms, least squares."""
    half = len(counts) // 2
    x = torch.tensor(counts[half:], dtype=torch.float64).log()
    y = torch.tensor(values[half:], dtype=torch.float64).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--most", type=positive, default=1_000_000, help="tokens")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing for each number")
    parser.add_argument("--out", type=Path, help="the JSON file, also of a part")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    counts = token_counts(options.most)
    report = setting(torch.device("cpu")) | {
        "moe_ext": moe_ext.__version__,
        **{"hidden": H, "ffn": F, "num_experts": E, "top_k": K, "tokens": counts},
        **{"seconds": {}, "bytes": {}, "slope": {}, "slope_bytes": {}, "of_experts": {}},
    }
    seconds, grown = report["seconds"], report["bytes"]
    names = [name for name in BESIDE if LAYERS[name].missing(torch.device("cpu")) is None]
    report["absent"] = [name for name in BESIDE if name not in names]

    def apart(function: Callable, *args):
        return memory.in_new_process(function, *args, options.seconds, start=memory.keep_freed)

    seconds |= apart(operator_seconds, counts)
    of_experts: dict[str, list[tuple[float, int]]] = {}
    for name in tqdm(names, leave=False):
        here = [(count, E) for count in counts if fits(name, count)]
        beside = [(4096, num_experts) for num_experts in EXPERTS]
        costs = apart(costs_of, name, here + beside)
        seconds[f"layer, {name}"] = [of_step for of_step, _ in costs[: len(here)]]
        grown[name] = [bytes_of_step for _, bytes_of_step in costs[: len(here)]]
        of_experts[name] = costs[len(here) :]
    for name, values in seconds.items():
        report["slope"][name] = slope(counts[: len(values)], values)
        last, tokens = values[-1], counts[len(values) - 1]
        print(f"{name:24} slope {report['slope'][name]:.2f}, {last * 1e3:.1f} ms at T = {tokens}")
    for name, values in grown.items():
        report["slope_bytes"][name] = slope(counts[: len(values)], values)
        tokens = counts[len(values) - 1]
        print(
            f"memory of {name:14} slope {report['slope_bytes'][name]:.2f}, "
            f"{values[-1] / 2**20:.0f} MiB at T = {tokens}"
        )
    for i, num_experts in enumerate(EXPERTS):
        of_names = {name: costs[i][0] for name, costs in of_experts.items()}
        report["of_experts"][num_experts] = of_names
        cells = ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in of_names.items())
        print(f"T = 4096, E = {num_experts}: {cells}")
    is_part = options.most < 1_000_000
    keep(report, None if is_part else "growth", options.out)


if __name__ == "__main__":
    main()
