"""What counting costs: how long moe_ext.stats takes for a call, beside the layer's step.

    python bench/bench_stats.py [--device cuda]

The step is forward and backward without it. Counting is timed by itself, as its share is less than
steps differ among themselves. Prints a table and writes bench/results/<machine>/stats.json.
"""

import argparse
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import memory
import torch
from timing import compare, keep, positive, setting, spreads, timer
from tqdm import tqdm

import moe_ext

# T, H, F, E, K: a layer that is small for its tokens, and one of many small experts.
POINTS = {"small": (512, 256, 256, 8, 2), "layer": (4096, 512, 256, 32, 4)}
TIERS = {"brief": False, "detailed": True}


def functions_of(point: str, device: torch.device) -> dict[str, Callable[[], None]]:
    """A step of the layer, and what each tier does in it."""
    T, H, F, E, K = POINTS[point]
    torch.manual_seed(0)
    gate = moe_ext.TopKGate(H, E, K, capacity_factor=1.25, top2_2nd_expert_sampling=False)
    layer = moe_ext.MOELayer(gate, moe_ext.GroupedExperts(E, H, F)).to(device)
    hidden = torch.randn(T, H, device=device, requires_grad=True)

    def step() -> None:
        (layer(hidden).sum() + layer.l_aux).backward()
        layer.zero_grad(set_to_none=True)
        hidden.grad = None

    functions = {"step": step}
    seen: list[tuple] = []
    layer.observer = lambda *call: seen.append(call)
    step()
    layer.observer = None
    for tier, detailed in TIERS.items():
        moe_ext.stats.track(layer, detailed=detailed)
        functions[tier] = functools.partial(layer.observer, *seen[0])
        layer.observer = None
    return functions


def measure(point: str, threads: int, device: torch.device, seconds: float) -> dict:
    torch.set_num_threads(threads)
    functions = functions_of(point, device)
    timers = {name: timer(function, [()], device) for name, function in functions.items()}
    taken = spreads(compare(timers, seconds))
    return {
        "point": point,
        **dict(zip("THFEK", POINTS[point], strict=True)),
        "threads": threads,
        "seconds": {name: spread._asdict() for name, spread in taken.items()},
        "share": {tier: taken[tier].median / taken["step"].median for tier in TIERS},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", nargs="*", type=positive, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing for each number")
    parser.add_argument("--out", type=Path, help="the JSON file, wherever")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    report = setting(device) | {"moe_ext": moe_ext.__version__, "complete": False, "points": []}
    chosen = list(itertools.product(POINTS, options.threads))
    try:
        for point, threads in tqdm(chosen, unit="point", leave=False):
            found = memory.in_new_process(
                measure, point, threads, device, options.seconds, start=memory.keep_freed
            )
            report["points"].append(found)
            step = found["seconds"]["step"]["median"]
            costs = ", ".join(f"{tier} {found['share'][tier]:.2%}" for tier in TIERS)
            tqdm.write(f"{point}, {threads} threads: {step * 1e3:.2f} ms; {costs}")
        report["complete"] = True
    finally:
        keep(report, "stats", options.out)


if __name__ == "__main__":
    main()
