"""The pictures of docs/performance.md, drawn by report.py from the results of `make bench`."""

import statistics
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from report import OURS, line_of, operator_runs, pairs, where

matplotlib.rcParams["mathtext.fontset"] = "dejavusans"
# Okabe and Ito's palette, for colour-blind readers.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"


def spread_of(values: list[float]) -> tuple[float, float, float]:
    """Median, and how far the least is below it and the most above."""
    median = statistics.median(values)
    return median, median - min(values), max(values) - median


def heading(group: dict) -> str:
    """A shape as the title of an axis."""
    run = next(iter(group["runs"].values()))
    shape = "T {tokens}, H {hidden}, E {num_experts}, K {top_k}".format(**run)
    return f"{group['title'].split()[-1]}\n{shape}"


LETTERS = "T tokens, H hidden size, E experts, K experts per token"
RUNS = "median over 1 and 2 threads, new and huge memory; line: lowest to highest"


def draw_ratios(found: dict[str, dict], path: Path) -> None:
    """A bar for every pair and shape: median and span over threads and states of memory."""
    groups = operator_runs(found)
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, len(groups), squeeze=False, sharex=True, sharey=True)
    least = 1.0
    for axis, group in zip(axes[0], groups, strict=True):
        for row, (op, peer) in enumerate(pairs(group)):
            cells = [line_of(run, op)["ratio"].get(peer) for run in group["runs"].values()]
            median, below, above = spread_of([ratio[0] for ratio in cells if ratio])
            least = min(least, median - below)
            # A bar's length is the logarithm of the ratio: it begins where both take as long.
            axis.barh(row, median - 1, left=1, color=BLUE)
            axis.errorbar(median, row, xerr=[[below], [above]], color="black", capsize=3, lw=1)
            axis.text(1.15 * (median + above), row, f"{median:.1f}", va="center", fontsize=9)
        names = [f"{op}: {peer}".replace(", ", ",\n") for op, peer in pairs(group)]
        axis.set_yticks(range(row + 1), names)
        axis.axvline(1, color=RED, linewidth=1.5)
        axis.set_title(heading(group), fontsize=10)
    axes[0, 0].set_ylabel("operator of moe_ext: other implementation")
    axis.set_xscale("log")
    axis.set_xlim(min(0.8, 0.9 * least), 100)
    axis.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axis.minorticks_off()
    axis.invert_yaxis()
    figure.suptitle(
        "How many times longer other implementations of moe_ext's operators take, on the CPU\n"
        + where(found["peers-float32"])
    )
    figure.supxlabel(
        f"time / time of moe_ext (log scale; right of 1 moe_ext is faster)\nbar: {RUNS}\n{LETTERS}",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def draw_roofline(found: dict[str, dict], path: Path) -> None:
    """Each operator's share of a copy."""
    groups = operator_runs(found)
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axis = figure.subplots()
    ops = list(dict.fromkeys(op for group in groups for op, _ in pairs(group)))
    width = 0.8 / len(groups)
    for i, (group, colour) in enumerate(zip(groups, (BLUE, ORANGE, GREEN), strict=False)):
        for j, op in enumerate(ops):
            shares = [line_of(run, op)["of_copy"] for run in group["runs"].values()]
            median, below, above = spread_of(shares)
            label = heading(group).replace("\n", ", ") if j == 0 else None
            axis.bar(j + i * width, median, width, label=label, color=colour)
            span = [[below], [above]]
            axis.errorbar(j + i * width, median, yerr=span, color="black", capsize=3, lw=1)
    axis.axhline(
        1, color=RED, linewidth=1.5, label="torch's copy_ of large tensors, in the same run"
    )
    axis.set_xticks([j + 0.4 - width / 2 for j in range(len(ops))], ops)
    axis.set_xlabel(f"bar: {RUNS}\n{LETTERS}", fontsize=10)
    axis.set_ylabel("GB/s / GB/s of copy_\n(each operand and result counted once)")
    axis.set_ylim(0, 2)
    axis.legend(fontsize=9, loc="upper left")
    _annotate_highest(axis, groups, ops, width)
    axis.set_title(
        "Memory throughput of each operator relative to a plain copy, on the CPU\n"
        + where(found["peers-float32"]),
        fontsize=11,
    )
    figure.savefig(path, dpi=110)


def _annotate_highest(axis, groups: list[dict], ops: list[str], width: float) -> None:
    """Say why a share is above 1, where one is."""
    shares = [
        (line_of(run, op)["of_copy"], j + i * width, run["copy"]["gigabytes_per_second"], op)
        for i, group in enumerate(groups)
        for j, op in enumerate(ops)
        for run in group["runs"].values()
    ]
    share, place, copy, op = max(shares)
    if share > 1:
        axis.annotate(
            f"{share:.2f}: {op} moves {share * copy:.0f} GB/s where a copy moves {copy:.0f} GB/s\n"
            "(combine reads K rows per row written, a copy one)",
            xy=(place, share),
            xytext=(place + width / 2, share + 0.15),
            ha="right",
            fontsize=9,
            arrowprops={"arrowstyle": "->"},
        )


def draw_growth(found: dict[str, dict], path: Path) -> None:
    growth = found["growth"]
    tokens = growth["tokens"]
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    time, memory = figure.subplots(1, 2)
    mebibytes = {name: [b / 2**20 for b in values] for name, values in growth["bytes"].items()}
    styles = {OURS: (BLUE, "o"), "DeepSpeed": (ORANGE, "s"), "DeepSpeed dense": (RED, "^")}
    for name, (colour, mark) in styles.items():
        for axis, values, slope in (
            (time, growth["seconds"].get(f"layer, {name}"), growth["slope"].get(f"layer, {name}")),
            (memory, mebibytes.get(name), growth["slope_bytes"].get(name)),
        ):
            if values:
                label = f"{name}: {slope:.2f}"
                axis.plot(tokens[: len(values)], values, color=colour, marker=mark, label=label)
                if len(values) < len(tokens):
                    text = "   masks [T, E, C]:\n   more does not fit"
                    axis.text(tokens[len(values) - 1], values[-1], text, va="center", fontsize=9)
    for axis, title, unit in ((time, "time", "seconds"), (memory, "peak memory", "MiB")):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("tokens T (log scale)")
        axis.set_ylabel(f"{title} of one step, {unit} (log scale)")
        axis.grid(alpha=0.3)
        title = "slope (1: linear in T, 2: quadratic)"
        axis.legend(fontsize=9, title=title, title_fontsize=9, loc="lower right")
    shape = "H {hidden}, F {ffn}, E {num_experts}, K {top_k}, float32".format(**growth)
    figure.suptitle(
        f"Forward and backward of one MoE layer ({shape}) as tokens grow, on the CPU\n"
        + where(growth),
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
