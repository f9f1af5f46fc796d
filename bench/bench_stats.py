"""The cost of moe_ext.stats: its time in one call of a layer, beside the layer's step.

    python bench/bench_stats.py

The step is a forward and backward without stats. Stats are timed by themselves, because their share
is smaller than the noise between steps. Prints a table and writes
bench/results/<machine>/stats.json.
"""

import functools
import itertools

import memory
import torch
from common import keep, parser, positive, setting
from layer_peers import our_layer
from report import stats_table
from timing import clock, spreads
from tqdm import tqdm

import moe_ext

# T, H, F, E, K: a layer that is small for its tokens, and one with many small experts.
POINTS = [(512, 256, 256, 8, 2), (4096, 512, 256, 32, 4)]


def measure(point: tuple[int, int, int, int, int], threads: int, seconds: float) -> dict:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    T, H, F, E, K = point
    layer = our_layer(E, H, F, K, capacity_factor=1.25)
    hidden = torch.randn(T, H, requires_grad=True)

    def step() -> None:
        (layer(hidden).sum() + layer.l_aux).backward()
        layer.zero_grad(set_to_none=True)
        hidden.grad = None

    seen: list[tuple] = []
    layer.observer = lambda *call: seen.append(call)
    step()
    timers = {"step": clock(step, [()])}
    for tier in ("brief", "detailed"):
        layer.observer = None
        moe_ext.stats.track(layer, detailed=tier == "detailed")
        timers[tier] = clock(functools.partial(layer.observer, *seen[0]), [()])
    layer.observer = None
    taken = spreads(timers, seconds)
    share = {tier: taken[tier].median / taken["step"].median for tier in ("brief", "detailed")}
    shape = dict(zip("THFEK", point, strict=True))
    return {**shape, "threads": threads, "seconds": taken, "share": share}


def main(arguments: list[str] | None = None) -> None:
    parse = parser(__doc__, seconds=5.0)
    parse.add_argument("--threads", nargs="*", type=positive, default=[1, 2])
    options = parse.parse_args(arguments)
    report = setting(torch.device("cpu")) | {"points": []}
    chosen = list(itertools.product(POINTS, options.threads))
    for point in tqdm(chosen, unit="point", leave=False):
        found = memory.in_new_process(measure, *point, options.seconds, start=memory.keep_freed)
        report["points"].append(found)
    print(stats_table(report))
    keep(report, "stats", options.out)


if __name__ == "__main__":
    main()
