"""A model of the time that an exchange of expert parallelism takes on up to 1024 GPUs.

    python bench/scaling.py bench/results/<machine>/parallel.json

docs/scaling.md has the formula and the assumptions. Checks the model's traffic against the traffic
that bench_parallel.py counted, prints the table and draws docs/scaling.png.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

from common import parser
from matplotlib.figure import Figure
from report import DOCS, markdown

from moe_ext.monitor.plot import COLOURS


class Layer(NamedTuple):
    """DeepSeek-V3's layer, with the tokens per GPU of the micro-batch in its report."""

    tokens: int = 4096
    hidden: int = 7168
    ffn: int = 2048
    num_experts: int = 256
    k: int = 8
    width: int = 2

    def flops(self) -> int:
        """Floating-point operations per GPU of SwiGLU experts, forward and backward."""
        return 3 * 2 * 3 * self.tokens * self.k * self.hidden * self.ffn


class Machine(NamedTuple):
    """Nodes of H100s. Rates in bytes per second and GPU, one direction.

    nvlink: DeepEP's measured dispatch, H800, 8 GPUs (153 GB/s of about 160)
    network: a 400 Gb/s adapter per GPU
    message: seconds per peer in an exchange, assumed
    flops: bf16 peak, of which `efficiency` is assumed to be reached
    """

    places: int = 8
    nvlink: float = 153e9
    network: float = 50e9
    message: float = 2e-6
    flops: float = 989e12
    efficiency: float = 0.5


def chance(layer: Layer, parts: int) -> float:
    """The probability that a token has an expert in a given one of `parts` equal parts, if all
    choices of K distinct experts are equally likely."""
    E, K = layer.num_experts, layer.k
    return 1 - math.comb(E - E // parts, K) / math.comb(E, K)


def rows_per_peer(layer: Layer, processes: int, dedup: bool) -> float:
    """Rows of a token that go to each rank."""
    return chance(layer, processes) if dedup else layer.k / processes


def exchange(
    layer: Layer, machine: Machine, processes: int, dedup: bool, two_levels: bool
) -> float:
    """Seconds of an exchange in one direction."""
    places = min(machine.places, processes)
    nodes = processes // places
    token = layer.tokens * layer.hidden * layer.width
    rows = rows_per_peer(layer, processes, dedup)
    if two_levels:
        # With dedup a token goes once to each node that has any of its experts.
        per_node = rows_per_peer(layer, nodes, True) / places if dedup else rows
        inside = token * rows * nodes * (places - 1) / machine.nvlink
        across = token * per_node * places * (nodes - 1) / machine.network
        return inside + across + (places + nodes - 2) * machine.message
    inside = token * rows * (places - 1) / machine.nvlink
    across = token * rows * (processes - places) / machine.network
    return max(inside, across) + (processes - 1) * machine.message


def least(layer: Layer, machine: Machine, processes: int) -> float:
    """The lower bound: a token goes once to each node that has one of its experts."""
    nodes = processes // min(machine.places, processes)
    across = chance(layer, nodes) * (nodes - 1) if nodes > 1 else 0.0
    inside = chance(layer, processes) * (min(machine.places, processes) - 1)
    row = layer.tokens * layer.hidden * layer.width
    return max(row * across / machine.network, row * inside / machine.nvlink)


WAYS = {
    "a row per route": (False, False),
    "a token per rank": (True, False),
    "a row per route, two levels": (False, True),
    "a token per node and rank": (True, True),
}


def check(report: dict) -> None:
    """Compare the model's number of other ranks per token with the counted one."""
    shape = report["shape"]
    worst = 0.0
    for point in report["points"]:
        if point["way"] != "a token per rank":
            continue
        layer = Layer(num_experts=shape["num_experts"], k=point["k"])
        model = chance(layer, point["processes"]) * (point["processes"] - 1)
        worst = max(worst, abs(model / point["others_per_token"] - 1))
    print(f"other ranks per token: the model is off by at most {worst:.1%}")
    for number, fitted in report["collective"].items():
        print(
            f"measured all_to_all of {number} ranks: {fitted['start'] * 1e6:.0f} us + bytes / "
            f"{fitted['bytes_per_second'] / 1e9:.2f} GB/s"
        )


def main() -> None:
    parse = parser(__doc__)
    parse.add_argument("report", type=Path, help="parallel.json of bench_parallel.py")
    parse.set_defaults(out=DOCS / "scaling.png")
    options = parse.parse_args()
    check(json.loads(options.report.read_text()))
    layer, machine = Layer(), Machine()
    gpus = [8 * 2**i for i in range(8)]
    compute = layer.flops() / (machine.flops * machine.efficiency) * 1e3
    print(f"experts' products: {compute:.1f} ms per layer, forward and backward")
    lines: dict[str, list[float]] = {name: [] for name in (*WAYS, "least")}
    rows = []
    for number in gpus:
        share = min(number, layer.num_experts)
        for name, way in WAYS.items():
            lines[name].append(4e3 * exchange(layer, machine, share, *way))
        lines["least"].append(4e3 * least(layer, machine, share))
        rows.append([str(number), *(f"{of[-1]:.2f} ms" for of in lines.values())])
    print(markdown(["GPUs", *lines], rows))
    draw(gpus, lines, compute, layer.num_experts, options.out)
    print(options.out)


def draw(
    gpus: list[int], lines: dict[str, list[float]], compute: float, num_experts: int, out: Path
) -> None:
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    axes = figure.subplots()
    styles = ("-", "-", "--", "--", ":")
    colours = (COLOURS[1], COLOURS[0], COLOURS[1], COLOURS[0], "#555555")
    names = (*list(lines)[:-1], "lower bound: a token once per node")
    for values, name, style, colour in zip(lines.values(), names, styles, colours, strict=True):
        axes.plot(gpus, values, style, color=colour, label=name, lw=1.8, marker="o", ms=3.5)
    label = "experts' matrix products, for comparison"
    axes.axhline(compute, color=COLOURS[4], lw=1.5, label=label)
    axes.axvline(num_experts, color="#999999", lw=1, zorder=0)
    title = "data sent (route: token-expert pair; dashed: two steps, inside nodes and across)"
    text = "one expert per GPU;\nmore GPUs hold copies"
    axes.text(num_experts * 1.06, compute * 1.15, text)
    axes.set_xscale("log", base=2)
    axes.set_xticks(gpus, [str(number) for number in gpus])
    axes.set_xlabel("number of GPUs (H100, 8 per node, 400 Gb/s per GPU)")
    axes.set_ylabel("time per layer, forward and backward, ms")
    axes.set_ylim(0, 1.35 * max(map(max, lines.values())))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="upper left", ncols=2, title=title)
    axes.set_title(
        "Modelled, not measured: time that an expert-parallel exchange takes\n"
        "one DeepSeek-V3 layer, 4096 tokens per GPU, bfloat16",
        fontsize=11,
    )
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main()
