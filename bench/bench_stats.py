"""The cost of moe_ext.stats: its time in one call of a layer, beside the layer's step.

    python bench/bench_stats.py [--device cuda]

The step is a forward and backward without stats. Stats are timed by themselves, because their share
is smaller than the noise between steps. Prints a table and writes
bench/results/<machine>/stats.json.
"""

import functools
import itertools
from collections.abc import Callable

import memory
import torch
from common import keep, parser, positive, setting
from layer_peers import our_layer
from report import stats_table
from timing import spreads, timer
from tqdm import tqdm

import moe_ext

# T, H, F, E, K: a layer that is small for its tokens, and one with many small experts.
POINTS = {"small": (512, 256, 256, 8, 2), "layer": (4096, 512, 256, 32, 4)}
TIERS = {"brief": False, "detailed": True}


def functions_of(point: str, device: torch.device) -> dict[str, Callable[[], None]]:
    """A step of the layer, and the observer that stats call in it, for each tier."""
    T, H, F, E, K = POINTS[point]
    torch.manual_seed(0)
    layer = our_layer(E, H, F, K, capacity_factor=1.25).to(device)
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
    taken = spreads(timers, seconds)
    return {
        "point": point,
        **dict(zip("THFEK", POINTS[point], strict=True)),
        "threads": threads,
        "seconds": taken,
        "share": {tier: taken[tier].median / taken["step"].median for tier in TIERS},
    }


def main(arguments: list[str] | None = None) -> None:
    parse = parser(__doc__, seconds=5.0)
    parse.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parse.add_argument("--threads", nargs="*", type=positive, default=[1, 2])
    options = parse.parse_args(arguments)
    device = torch.device(options.device)
    report = setting(device) | {"points": []}
    chosen = list(itertools.product(POINTS, options.threads))
    for point, threads in tqdm(chosen, unit="point", leave=False):
        found = memory.in_new_process(
            measure, point, threads, device, options.seconds, start=memory.keep_freed
        )
        report["points"].append(found)
    print(stats_table(report))
    keep(report, "stats", options.out)


if __name__ == "__main__":
    main()
