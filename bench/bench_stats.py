"""What counting costs: a layer's step, forward and backward, with moe_ext.stats and without.

    python bench/bench_stats.py [--device cuda]

Prints a table and writes bench/results/<machine>/stats.json.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import memory
import torch
from timing import compare, keep, positive, ratio, setting, spreads, timer
from tqdm import tqdm

import moe_ext

# T, H, F, E, K: a layer that is small for its tokens, and one of many small experts.
POINTS = {"small": (512, 256, 256, 8, 2), "layer": (4096, 512, 256, 32, 4)}
TIERS = {"brief": False, "detailed": True}


def step_of(point: str, tier: str | None, device: torch.device) -> Callable[[], None]:
    T, H, F, E, K = POINTS[point]
    torch.manual_seed(0)
    gate = moe_ext.TopKGate(H, E, K, capacity_factor=1.25, top2_2nd_expert_sampling=False)
    layer = moe_ext.MOELayer(gate, moe_ext.GroupedExperts(E, H, F)).to(device)
    if tier is not None:
        moe_ext.stats.track(layer, detailed=TIERS[tier])
    hidden = torch.randn(T, H, device=device, requires_grad=True)

    def step() -> None:
        (layer(hidden).sum() + layer.l_aux).backward()
        layer.zero_grad(set_to_none=True)
        hidden.grad = None

    return step


def measure(point: str, threads: int, device: torch.device, seconds: float) -> dict:
    torch.set_num_threads(threads)
    names: list[str | None] = [None, *TIERS]
    steps = {str(tier): step_of(point, tier, device) for tier in names}
    taken = compare({n: timer(step, [()], device) for n, step in steps.items()}, seconds)
    ratios = {tier: ratio(taken["None"], taken[tier])._asdict() for tier in TIERS}
    return {
        "point": point,
        **dict(zip("THFEK", POINTS[point], strict=True)),
        "threads": threads,
        "seconds": {name: s._asdict() for name, s in spreads(taken).items()},
        "ratio": ratios,
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
            step = found["seconds"]["None"]["median"]
            costs = ", ".join(
                f"{tier} {100 * (found['ratio'][tier]['median'] - 1):+.2f} %" for tier in TIERS
            )
            tqdm.write(f"{point}, {threads} threads: {step * 1e3:.2f} ms; {costs}")
        report["complete"] = True
    finally:
        keep(report, "stats", options.out)


if __name__ == "__main__":
    main()
