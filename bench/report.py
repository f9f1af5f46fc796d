"""The tables and pictures of what the benches found.

    python bench/report.py [bench/results/<machine>]

Reads the result files of a machine, this one by default, prints their tables and writes them into
README.md, docs/performance.md and docs/watching.md between <!-- bench: name --> and <!-- end -->,
with three pictures beside the second.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

import torch
from timing import RESULTS, machine, slug

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "watching.md"
OURS = "moe_ext"
# Okabe and Ito's, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#767676"


def results(folder: Path) -> dict[str, dict]:
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {name: report for name, report in found.items() if report.get("complete", True)}


def operator_runs(found: dict[str, dict]) -> list[dict]:
    """One of each shape and dtype: {title, runs}, and the runs by threads and memory."""
    grouped: dict[str, dict] = {}
    for name in ("peers-float32", "peers-bfloat16"):
        for run in found.get(name, {"shapes": []})["shapes"]:
            title = "T{tokens} H{hidden} E{num_experts} K{top_k} ".format(**run)
            title += found[name]["dtype"]
            grouped.setdefault(title, {"title": title, "runs": {}})
            grouped[title]["runs"][run["threads"], run["memory"]] = run
    return list(grouped.values())


def line_of(run: dict, op: str) -> dict:
    return next(line for line in run["ops"] if line["op"] == op)


def pairs(group: dict) -> list[tuple[str, str]]:
    """Every operator with every peer that was timed."""
    runs = group["runs"].values()
    found = [(line["op"], peer) for run in runs for line in run["ops"] for peer in line["ratio"]]
    return list(dict.fromkeys(found))


def cell(run: dict, op: str, peer: str) -> str:
    ratio = line_of(run, op)["ratio"].get(peer)
    return f"{ratio['median']:.2f}x" if ratio else "-"


def operators_table(found: dict[str, dict]) -> str:
    lines = []
    for group in operator_runs(found):
        keys = sorted(group["runs"], key=lambda key: (key[0], key[1] != "new"))
        heads = [f"{t} thread{'s' * (t > 1)}, {memory}" for t, memory in keys]
        lines += [f"| {group['title']} | beside | {' | '.join(heads)} |"]
        lines += ["|---|---|" + "---|" * len(keys)]
        for op, peer in pairs(group):
            cells = [cell(group["runs"][key], op, peer) for key in keys]
            lines.append(f"| {op} | {peer} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def layers_table(found: dict[str, dict]) -> str:
    lines = []
    for name, state in (
        ("layer-float32", "reused"),
        ("layer-float32-new-memory", "new"),
        ("layer-bfloat16", "reused"),
    ):
        if name not in found:
            continue
        points, dtype = found[name]["points"], found[name]["dtype"]
        names = list(dict.fromkeys(peer for point in points for peer in point["ratio"]))
        lines.append(f"| {dtype}, {state} memory | threads | ms | of bound | {' | '.join(names)} |")
        lines.append("|---|---|---|---|" + "---|" * len(names))
        for point in points:
            shape = "T{tokens} H{hidden} F{ffn} E{num_experts} K{top_k}".format(**point)
            cells = [
                f"{point['ratio'][peer]['median']:.2f}x"
                if peer in point["ratio"]
                else point["excluded"].get(peer, "-")
                for peer in names
            ]
            lines.append(
                f"| {point['point']}, {shape} | {point['threads']} "
                f"| {point['seconds'][OURS]['median'] * 1e3:.0f} | {point['of_bound']:.0%} "
                f"| {' | '.join(cells)} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def growth_table(found: dict[str, dict]) -> str:
    growth = found["growth"]
    lines = ["| | slope | largest T | time | memory, slope | memory |", "|---|---|---|---|---|---|"]
    for name, values in growth["seconds"].items():
        layer = name.removeprefix("layer, ")
        memory = growth["bytes"].get(layer) if name.startswith("layer") else None
        of_memory = (
            f"{growth['slope_bytes'][layer]:.2f} | {memory[-1] / 2**20:.0f} MiB"
            if memory
            else " | "
        )
        lines.append(
            f"| {name} | {growth['slope'][name]:.2f} | {growth['tokens'][len(values) - 1]:,} "
            f"| {values[-1] * 1e3:.1f} ms | {of_memory} |"
        )
    return "\n".join(lines)


def stats_table(found: dict[str, dict]) -> str:
    report = found["stats"]
    lines = ["| a step of | threads | ms | brief | detailed |", "|---|---|---|---|---|"]
    for point in report["points"]:
        costs = [
            f"{point['seconds'][tier]['median'] * 1e6:.0f} us, {point['share'][tier]:.2%}"
            for tier in ("brief", "detailed")
        ]
        lines.append(
            "| T{T} H{H} F{F} E{E} K{K} ".format(**point)
            + f"| {point['threads']} | {point['seconds']['step']['median'] * 1e3:.1f} "
            + f"| {' | '.join(costs)} |"
        )
    lines += ["", f"{report['date']}, {report['machine']}, torch {report['torch']}."]
    return "\n".join(lines)


def limits_table(found: dict[str, dict]) -> str:
    limits = found["limits"]
    lines = [f"| {limits['mebibytes']} MiB, one thread | ms |", "|---|---|"]
    lines += [f"| {name} | {value * 1e3:.1f} |" for name, value in limits["seconds"].items()]
    return "\n".join(lines)


def summary(found: dict[str, dict]) -> str:
    """What the README shows: the least and the most of every pair."""
    lines = ["| | beside | ratio |", "|---|---|---|"]
    span: dict[tuple[str, str], list[float]] = {}
    for group in operator_runs(found):
        for op, peer in pairs(group):
            for run in group["runs"].values():
                if ratio := line_of(run, op)["ratio"].get(peer):
                    span.setdefault((op, peer), []).append(ratio["median"])
    for (op, peer), ratios in span.items():
        lines.append(f"| `{op}` | {peer} | {min(ratios):.2f}x to {max(ratios):.2f}x |")
    layers: dict[str, list[float]] = {}
    for point in found["layer-float32"]["points"]:
        for peer, ratio in point["ratio"].items():
            layers.setdefault(peer, []).append(ratio["median"])
    for peer, ratios in layers.items():
        span_of_peer = f"{min(ratios):.2f}x to {max(ratios):.2f}x"
        lines.append(f"| a layer, forward and backward | {peer} | {span_of_peer} |")
    report = found["layer-float32"]
    lines += ["", f"{report['date']}, {report['machine']}, torch {report['torch']}."]
    return "\n".join(lines)


def tables(found: dict[str, dict]) -> dict[str, str]:
    return {
        "summary": summary(found),
        "operators": operators_table(found),
        "layers": layers_table(found),
        "growth": growth_table(found),
        "limits": limits_table(found),
        "stats": stats_table(found),
    }


def marks(page: str) -> list[str]:
    return re.findall(r"<!-- bench: (\w+) -->", page)


def filled(page: str, texts: dict[str, str]) -> str:
    for name, text in texts.items():
        marks = rf"(<!-- bench: {name} -->\n).*?(<!-- end -->)"
        page = re.sub(marks, lambda m, text=text: f"{m[1]}{text}\n{m[2]}", page, flags=re.DOTALL)
    return page


def spread_of(values: list[float]) -> tuple[float, float, float]:
    """Median, and how far the least is below it and the most above."""
    median = statistics.median(values)
    return median, median - min(values), max(values) - median


def where(report: dict) -> str:
    return f"{report['machine']}, torch {report['torch']}, {report['date']}"


def heading(group: dict) -> str:
    """A shape as the title of an axis."""
    run = next(iter(group["runs"].values()))
    shape = "T {tokens}, H {hidden}, E {num_experts}, K {top_k}".format(**run)
    return f"{group['title'].split()[-1]}\n{shape}"


LETTERS = "T tokens, H hidden size, E experts, K experts per token"
RUNS = "median over 1 and 2 threads, new and huge memory; line: lowest to highest"


def draw_ratios(found: dict[str, dict], path: Path) -> None:
    """A bar for every pair and shape: median and span over threads and states of memory."""
    from matplotlib import pyplot as plt

    groups = operator_runs(found)
    figure, axes = plt.subplots(
        1,
        len(groups),
        figsize=(12, 5),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axis, group in zip(axes[0], groups, strict=True):
        for row, (op, peer) in enumerate(pairs(group)):
            cells = [line_of(run, op)["ratio"].get(peer) for run in group["runs"].values()]
            median, below, above = spread_of([ratio["median"] for ratio in cells if ratio])
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
    axis.set_xlim(0.8, 100)
    axis.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axis.minorticks_off()
    axis.invert_yaxis()
    figure.suptitle(
        "How many times longer other implementations of moe_ext's operators take, on the CPU\n"
        + where(found["peers-float32"])
    )
    figure.supxlabel(
        f"time / time of moe_ext (log scale; red: equal, right of it moe_ext is faster)\n"
        f"bar: {RUNS}\n{LETTERS}",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_roofline(found: dict[str, dict], path: Path) -> None:
    """Each operator's share of a copy."""
    from matplotlib import pyplot as plt

    groups = operator_runs(found)
    figure, axis = plt.subplots(figsize=(9, 5.2), layout="constrained")
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
    plt.close(figure)


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
    from matplotlib import pyplot as plt

    growth = found["growth"]
    tokens = growth["tokens"]
    figure, (time, memory) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
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
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = RESULTS / slug(machine(torch.device("cpu")))
    parser.add_argument("folder", nargs="?", type=Path, default=here)
    options = parser.parse_args(arguments)
    found = results(options.folder)
    missing = {"peers-float32", "layer-float32", "growth", "limits", "stats"} - set(found)
    if missing:
        sys.exit(f"{options.folder} has no {', '.join(sorted(missing))}: run `make bench`")
    texts = tables(found)
    for page in PAGES:
        page.write_text(filled(page.read_text(), texts))
    print("\n\n".join(texts.values()))
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["mathtext.fontset"] = "dejavusans"
    draw_ratios(found, ROOT / "docs" / "performance-ratios.png")
    draw_roofline(found, ROOT / "docs" / "performance-roofline.png")
    draw_growth(found, ROOT / "docs" / "performance-growth.png")


if __name__ == "__main__":
    main()
