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


def draw_ratios(found: dict[str, dict], path: Path) -> None:
    """A bar for every pair and shape: median and span over threads and states of memory."""
    from matplotlib import pyplot as plt

    groups = operator_runs(found)
    figure, axes = plt.subplots(1, len(groups), figsize=(5.2 * len(groups), 4.2), squeeze=False)
    for axis, group in zip(axes[0], groups, strict=True):
        labels, medians, spans = [], [], []
        for op, peer in pairs(group):
            cells = [line_of(run, op)["ratio"].get(peer) for run in group["runs"].values()]
            ratios = [ratio["median"] for ratio in cells if ratio]
            labels.append(f"{op} / {peer}")
            medians.append(statistics.median(ratios))
            spans.append((medians[-1] - min(ratios), max(ratios) - medians[-1]))
        axis.barh(labels, medians, xerr=list(zip(*spans, strict=True)), color=BLUE, ecolor=GREY)
        axis.axvline(1, color=RED, linewidth=1)
        axis.set_xscale("log")
        axis.set_xlim(0.8)
        axis.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        axis.minorticks_off()
        axis.invert_yaxis()
        axis.set_title(group["title"], fontsize=10)
        axis.set_xlabel("times slower than moe_ext")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_roofline(found: dict[str, dict], path: Path) -> None:
    """Each operator's share of a copy."""
    from matplotlib import pyplot as plt

    groups = operator_runs(found)
    figure, axis = plt.subplots(figsize=(7.5, 3.6))
    ops = list(dict.fromkeys(op for group in groups for op, _ in pairs(group)))
    width = 0.8 / len(groups)
    for i, (group, colour) in enumerate(zip(groups, (BLUE, ORANGE, GREEN), strict=False)):
        threads, memory = max(group["runs"])
        run = group["runs"][threads, memory]
        shares = [line_of(run, op)["of_copy"] for op in ops]
        places = [j + i * width for j in range(len(ops))]
        label = f"{group['title']}, {threads} threads, {memory} memory"
        axis.bar(places, shares, width, label=label, color=colour)
    axis.axhline(1, color=RED, linewidth=1)
    axis.set_xticks([j + 0.4 - width / 2 for j in range(len(ops))], ops)
    axis.set_ylabel("bytes per second, of a copy's")
    axis.set_ylim(0, 1.55)
    axis.legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_growth(found: dict[str, dict], path: Path) -> None:
    from matplotlib import pyplot as plt

    growth = found["growth"]
    figure, (time, memory) = plt.subplots(1, 2, figsize=(10, 4))
    styles = {OURS: (BLUE, "o"), "DeepSpeed": (ORANGE, "s"), "DeepSpeed dense": (RED, "^")}
    for name, (colour, mark) in styles.items():
        for axis, values in (
            (time, growth["seconds"].get(f"layer, {name}")),
            (memory, growth["bytes"].get(name)),
        ):
            if values:
                axis.plot(
                    growth["tokens"][: len(values)], values, color=colour, marker=mark, label=name
                )
    for axis, title in ((time, "seconds of a step"), (memory, "bytes a step takes")):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("tokens")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    time.legend()
    figure.tight_layout()
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
