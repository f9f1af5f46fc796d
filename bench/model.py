"""Model how long the CUDA kernels take, from what is counted without a GPU; never a measurement.

    python bench/model.py

Reads results/counters.json and ptxas.json, writes the table of docs/cuda.md between
<!-- model --> and <!-- end -->. A launch takes the longest of

    memory     whole sectors, at nine tenths of the card's bandwidth
    issue      instructions of the main loop, as ptxas.py counts them: four of a multiprocessor's
               warps in a clock
    latency    what resident threads have on their way, against the time a read takes

and at least its start, and three reads one after the other. Where a card was measured
(results/<machine>/ops-bfloat16.json), that stands beside.
"""

import json
import math
from typing import NamedTuple

from common import RESULTS
from ptxas import blocks_per_sm
from report import DOCS, markdown, replaced

PAGE = DOCS / "cuda.md"
READ = 0.8e-6  # seconds until a read of global memory is there
START = 2e-6  # seconds from one launch to the next
READS = 3  # of slots, of sources, of a row


class Card(NamedTuple):
    arch: str  # of its multiprocessors; sm_89 runs the code of sm_80
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes a second


CARDS = {
    "A100": Card("sm_80", 108, 1.41e9, 2.04e12),
    "H100": Card("sm_90", 132, 1.76e9, 3.35e12),
    "B200": Card("sm_100", 148, 1.85e9, 8.0e12),
    "RTX 4090": Card("sm_89", 128, 2.52e9, 1.01e12),
}


class Shape(NamedTuple):
    """A shape of bench_ops.py, and those of counters.json that stand for it, with fewer tokens."""

    name: str
    tokens: int
    rows: str
    routing: str
    lanes: int  # that hold a token's row of the gate


SHAPES = [
    Shape("qwen3", 8192, "T128 K8 E64 H2048 F1024 bfloat16", "T1024 K8 E128", 16),
    Shape("mixtral", 8192, "T64 K2 E8 H4096 F2048 bfloat16", "T2048 K2 E8", 2),
]
# The kernel of a launch, with 16-bit rows in vectors; {lanes} lanes hold a token's row of the gate.
KERNELS = {
    "gate": "gate_kernel<float, {lanes}, 8, Scoring 0>",
    "gate_backward": "gate_backward_kernel<float, {lanes}, 8>",
    "dispatch": "dispatch_kernel<__nv_bfloat16, 8, false>",
    "activate": "activate_kernel<__nv_bfloat16, 8, Activation 0>",
    "combine": "combine_kernel<__nv_bfloat16, 8>",
    "combine_backward": "route_dot_kernel<__nv_bfloat16, 8, true>",
    "activate_backward": "activate_backward_kernel<__nv_bfloat16, 8, Activation 0>",
}


def seconds(
    card: Card, kernel: dict, sector_bytes: float, warp_instructions: float
) -> tuple[float, str]:
    """(time, what binds it) of a launch."""
    blocks = blocks_per_sm(card.arch, kernel["registers"], kernel["threads"])
    in_flight = card.multiprocessors * blocks * kernel["threads"] * 16
    in_flight *= kernel["loop_loads"] or math.inf  # nothing waits for what is only written
    times = {
        "memory": sector_bytes / (0.9 * card.bandwidth),
        "issue": warp_instructions / (4 * card.multiprocessors * card.clock),
        "latency": sector_bytes / (in_flight / READ),
        "start": READS * READ,
    }
    limit = max(times, key=times.__getitem__)
    return START + times[limit], limit


def modelled(counters: list[dict], kernels: dict, shape: Shape, name: str) -> dict:
    """{card: (seconds, limit)}"""
    is_routing = name.startswith("gate")
    counted_shape = shape.routing if is_routing else shape.rows
    (counted,) = (c for c in counters if (c["kernel"], c["shape"]) == (name, counted_shape))
    scale = shape.tokens / int(counted_shape.split()[0].removeprefix("T"))
    found = {}
    for title, card in CARDS.items():
        code = {"sm_89": "sm_80"}.get(card.arch, card.arch)
        kernel = kernels[code][KERNELS[name].format(lanes=shape.lanes)]
        if is_routing:  # a warp takes 32 / lanes rows at a time
            loops = shape.tokens * shape.lanes / 32
        else:  # a warp moves 32 vectors at a time
            loops = counted["bytes_asked"] * scale / 512 / kernel["loop_vectors"]
        sectors = counted["sector_bytes"] * scale
        found[title] = seconds(card, kernel, sectors, loops * kernel["loop_instructions"])
    return found


def measured() -> dict[tuple[str, str, str], float]:
    """{(card, shape, operator): seconds} of the results of bench_ops.py on cards."""
    found = {}
    for path in RESULTS.glob("*/ops-bfloat16.json"):
        report = json.loads(path.read_text())
        cards = [title for title in CARDS if title in report["machine"]]
        for run in report["shapes"] if cards and report["cuda"] else []:
            for line in run["ops"]:
                operator = line["op"].split(",")[0]
                found.setdefault((cards[0], run["shape"], operator), line["alone"][0])
    return found


def table() -> str:
    counters = json.loads((RESULTS / "counters.json").read_text())
    kernels = json.loads((RESULTS / "ptxas.json").read_text())["kernels"]
    real, rows = measured(), []
    for shape in SHAPES:
        for name in KERNELS:
            row = [f"model, {shape.name}", name]
            for title, (time, limit) in modelled(counters, kernels, shape, name).items():
                took = real.get((title, shape.name, name))
                cell = f"{time * 1e6:.1f} {limit}"
                row.append(cell if took is None else f"{cell}; measured {took * 1e6:.1f}")
            rows.append(row)
    return markdown(["µs of a launch, not measured", "kernel", *CARDS], rows)


def filled(page: str) -> str:
    """The page with today's table."""
    return replaced(page, "model", f"\n{table()}\n")


if __name__ == "__main__":
    print(table())
    PAGE.write_text(filled(PAGE.read_text()))
