"""Write the tables and pictures of the benches' results into the pages.

    python bench/report.py [bench/results/<machine>]
    python bench/report.py --cards                     # only which GPUs have results

Reads the result files of a machine, by default this one, prints their tables and writes them into
README.md and docs between <!-- bench: name --> and <!-- end -->. Draws the pictures of
docs/performance.md (pictures.py).
"""

import itertools
import json
import re
import statistics
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from common import RESULTS, machine, slug

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SMALL = {"small-forward-float32": "forward", "small-float32": "with gradient"}
NAMES = "performance", "experts", "quantised", "watching"
PAGES = [ROOT / "README.md", *(DOCS / f"{name}.md" for name in NAMES)]
NEEDED = {"peers-float32", "layer-float32", "growth", "stats", *SMALL}
NEEDED |= {"decode-float32", "decode-bfloat16"}
EXPERTS = "experts-float32", "experts-float32-new-memory"  # of `make bench-full`
OURS = "moe_ext"
SHAPE = "T{tokens} H{hidden} F{ffn} E{num_experts} K{top_k}"


def results(folder: Path) -> dict[str, dict]:
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {name: report for name, report in found.items() if report.get("complete", True)}


def where(report: dict) -> str:
    return f"{report['date']}, {report['machine']}, torch {report['torch']}"


def operator_runs(found: dict[str, dict]) -> list[dict]:
    """{title, runs} for each shape and dtype; runs by (threads, memory)."""
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
    """(operator, peer) for each peer that was timed."""
    runs = group["runs"].values()
    found = [(line["op"], peer) for run in runs for line in run["ops"] for peer in line["ratio"]]
    return list(dict.fromkeys(found))


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (heads, *rows)]
    lines.insert(1, "|---" * len(heads) + "|")
    return "\n".join(lines)


def factor(ratio: list[float] | None) -> str | None:
    return f"{ratio[0]:.2f}x" if ratio else None


def operators_table(found: dict[str, dict]) -> str:
    tables = []
    for group in operator_runs(found):
        runs = group["runs"]
        keys = sorted(runs, key=lambda key: (key[0], key[1] != "new"))
        heads = [f"{t} thread{'s' * (t > 1)}, {memory}" for t, memory in keys]
        rows = [
            [op, peer, *(factor(line_of(runs[key], op)["ratio"].get(peer)) or "-" for key in keys)]
            for op, peer in pairs(group)
        ]
        tables.append(markdown([group["title"], "compared with", *heads], rows))
    return "\n\n".join(tables)


def points_table(report: dict) -> str:
    """Layers or experts: a line for each point."""
    points = report["points"]
    memory = "reused" if report["reuses_freed_memory"] else "new"
    names = list(dict.fromkeys(peer for point in points for peer in point["ratio"]))
    factor_of_capacity = report.get("capacity_factor")
    dropping = f", capacity factor {factor_of_capacity}" if factor_of_capacity else ""
    has_bound = any("of_bound" in point for point in points)
    heads = [f"{report['dtype']}, {memory} memory{dropping}", "threads", "ms"]
    heads += ["of bound"] * has_bound + names
    if "growth_bytes" in points[0]:
        heads.append(f"memory, MiB: {' / '.join([OURS, *names])}")
    rows = []
    for point in points:
        cells = [f"{point['point']}, {SHAPE.format(**point)}", f"{point['threads']}"]
        milliseconds = point["seconds"][OURS] * 1e3
        cells.append(f"{milliseconds:.0f}" if milliseconds >= 10 else f"{milliseconds:.3g}")
        if has_bound:
            cells.append(f"{point['of_bound']:.0%}" if "of_bound" in point else "-")
        for peer in names:
            cells.append(factor(point["ratio"].get(peer)) or point["excluded"].get(peer, "-"))
        if grown := point.get("growth_bytes"):
            mebibytes = [f"{grown[n] / 2**20:.0f}" if n in grown else "-" for n in (OURS, *names)]
            cells.append(" / ".join(mebibytes))
        rows.append(cells)
    return markdown(heads, rows)


def layers_table(found: dict[str, dict]) -> str:
    names = ["layer-float32", "layer-float32-new-memory", "layer-bfloat16"]
    names += ["layer-capacity-float32", "layer-capacity-bfloat16"]
    return "\n\n".join(points_table(found[name]) for name in names if name in found)


def small_table(found: dict[str, dict]) -> str:
    """Microseconds of small layers, and the speedup over each of the others."""
    names, rows = ("Hugging Face grouped_mm", "Hugging Face batched_mm", "DeepSpeed"), []
    for points in zip(*(found[name]["points"] for name in SMALL), strict=True):
        for point, what in zip(points, SMALL.values(), strict=True):
            cells = SHAPE.format(**point), what, f"{point['seconds'][OURS] * 1e6:.0f}"
            rows.append([*cells, *(factor(point["ratio"].get(name)) or "-" for name in names)])
    table = markdown(["layer, float32, one thread", "", "us", *names], rows)
    return f"{table}\n\n{where(found['small-float32'])}."


def experts_table(found: dict[str, dict]) -> str:
    parts = []
    for name in EXPERTS:
        points = found[name]["points"]
        best = [min(ratio[0] for ratio in point["ratio"].values()) for point in points]
        shares = [point["of_bound"] for point in points]
        parts += [
            points_table(found[name]),
            f"Speedup over the fastest peer: {statistics.geometric_mean(best):.2f}x in the "
            f"geometric mean, {min(best):.2f}x at least. Share of the bound: "
            f"{statistics.geometric_mean(shares):.0%} in the geometric mean, {min(shares):.0%} at "
            "least.",
        ]
    return "\n\n".join([*parts, where(found["experts-float32"]) + "."])


def growth_table(growth: dict) -> str:
    rows = []
    for name, values in growth["seconds"].items():
        cells = [f"{growth['slope'][name]:.2f}", f"{growth['tokens'][len(values) - 1]:,}"]
        cells += [f"{values[-1] * 1e3:.1f} ms", "", ""]
        if memory := growth["bytes"].get(layer := name.removeprefix("layer, ")):
            cells[-2:] = f"{growth['slope_bytes'][layer]:.2f}", f"{memory[-1] / 2**20:.0f} MiB"
        rows.append([name, *cells])
    return markdown(["", "slope", "largest T", "time", "memory, slope", "memory"], rows)


def stats_table(report: dict) -> str:
    rows = []
    for point in report["points"]:
        seconds, share = point["seconds"], point["share"]
        tiers = [f"{seconds[t][0] * 1e6:.0f} us, {share[t]:.2%}" for t in ("brief", "detailed")]
        shape = "T{T} H{H} F{F} E{E} K{K}".format(**point)
        rows.append([shape, f"{point['threads']}", f"{seconds['step'][0] * 1e3:.1f}", *tiers])
    table = markdown(["step of a layer", "threads", "ms", "brief", "detailed"], rows)
    return f"{table}\n\n{where(report)}."


def decode_table(report: dict) -> str:
    """Milliseconds of the experts of one layer, and the share of the limit."""
    rows = []
    for shape in report["shapes"]:
        name = "{shape}, H{hidden} F{ffn} E{num_experts} K{top_k}".format(**shape)
        for point in shape["points"]:
            seconds = dict(point["seconds"])
            ours, limit = seconds.pop(OURS), seconds.pop("limit")
            peer = min(seconds, key=seconds.__getitem__)
            times = [f"{t * 1e3:.2f}" for t in (ours, limit)]
            best = f"{seconds[peer] * 1e3:.2f}" + (f" ({peer})" if "vllm" not in report else "")
            cells = [name, f"{point['tokens']}", times[0], best, f"{seconds[peer] / ours:.2f}x"]
            rows.append([*cells, times[1], f"{limit / ours:.0%}"])
    peers = f"vLLM {report['vllm']}" if "vllm" in report else "best of transformers"
    heads = [f"experts, {report['dtype']}", "tokens", "ms", peers, "speedup"]
    return markdown([*heads, "reading the weights once", "share of that rate"], rows)


def decode_tables(found: dict[str, dict]) -> str:
    names = [name for name in ("decode-float32", "decode-bfloat16") if name in found]
    return "\n\n".join([*(decode_table(found[n]) for n in names), f"{where(found[names[0]])}."])


def of_all_machines(name: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"*/{name}.json"))]


def tables_with_places(reports: list[dict]) -> str:
    return "\n\n".join(f"{decode_table(report)}\n\n{where(report)}." for report in reports)


def tiles_table() -> str:
    """bfloat16 on a CPU with tiles, on whatever machine it was measured."""
    reports = of_all_machines("decode-bfloat16")
    return tables_with_places([r for r in reports if "tiles" in r.get("products", "")])


def quantised_table(report: dict) -> str:
    """Milliseconds, the speedup over our bfloat16, and the share of the rate of reading."""
    rows = []
    for name, results in report["shapes"].items():
        for result in results:
            reading = result["gigabytes"]["reading"]
            for weights, seconds in result["seconds"].items():
                ratio, rate = result["ratio"].get(weights), result["gigabytes"][weights]
                speedup = f"{1 / ratio[0]:.2f}x" if ratio else "1"
                times = f"{seconds * 1e3:.3g}", speedup, f"{rate:.1f}", f"{rate / reading:.0%}"
                rows.append([name, f"{result['tokens']}", weights, *times])
    heads = ["experts", "tokens", "weights", "ms", "speedup over bfloat16", "GB/s", "of reading"]
    return f"{markdown(heads, rows)}\n\n{where(report)}, {report['threads']} thread."


def packed_peers_table(report: dict) -> str:
    """Milliseconds of every weight, a column for experts and tokens."""
    columns = [(n, result) for n, results in report["shapes"].items() for result in results]
    heads = ["weights, ms", *(f"{name}, {result['tokens']}" for name, result in columns)]
    names = columns[0][1]["seconds"]
    rows = [[n, *(f"{r['seconds'][n] * 1e3:.3g}" for _, r in columns)] for n in names]
    return f"{markdown(heads, rows)}\n\n{where(report)}, {report['threads']} thread."


def loading_table(report: dict) -> str:
    """Gigabytes of a model, packed and while it is loaded."""
    names = "whole", "shard", "packed", "before", "peak", "limit"
    rows = [
        [run["format"], *(f"{run[name] / 1e9:.2f}" for name in names)] for run in report["loads"]
    ]
    heads = ["experts", "bfloat16, GB", "largest file", "packed", "resident before"]
    return f"{markdown([*heads, 'peak', 'limit'], rows)}\n\n{where(report)}."


def summary(found: dict[str, dict]) -> str:
    """README's table: the lowest and highest speedup over the fastest peer of each setting."""
    layers = found["layer-float32"]
    ratios = [
        (f"`{line['op']}`", line["ratio"])
        for group in operator_runs(found)
        for run in group["runs"].values()
        for line in run["ops"]
    ]
    ratios += [("a layer, forward and backward", point["ratio"]) for point in layers["points"]]
    ratios += [
        ("a layer of 1 to 256 tokens", p["ratio"]) for n in SMALL for p in found[n]["points"]
    ]
    for name in ("decode-float32", "decode-bfloat16"):
        for point in itertools.chain(*(shape["points"] for shape in found[name]["shapes"])):
            times = {n: t for n, t in point["seconds"].items() if n != "limit"}
            ours = times.pop(OURS)
            title = "experts of transformers, 1 to 64 tokens, moe_ext's in huge pages"
            ratios.append((title, {f"transformers' {n}": [t / ours] for n, t in times.items()}))
    for report in of_all_machines("vllm-bfloat16"):
        place = f"{report['threads']} thread of {report['machine']}"
        title = f"experts in bfloat16, 1 to 1,024 tokens, moe_ext's in huge pages, {place}"
        for point in itertools.chain(*(shape["points"] for shape in report["shapes"])):
            seconds = point["seconds"]
            ratios.append((title, {"vLLM's fused experts": [seconds["vLLM"] / seconds[OURS]]}))
    fastest: dict[str, list[tuple[float, str]]] = {}
    for name, of_peers in ratios:
        fastest.setdefault(name, []).append(min((r[0], peer) for peer, r in of_peers.items()))
    rows = [
        [
            name,
            ", ".join(dict.fromkeys(peer for _, peer in settings)),
            f"{min(settings)[0]:.2f}x to {max(settings)[0]:.2f}x",
        ]
        for name, settings in fastest.items()
    ]
    return f"{markdown(['', 'fastest other implementation', 'speedup'], rows)}\n\n{where(layers)}."


def tables(found: dict[str, dict]) -> dict[str, str]:
    texts = {
        "summary": summary(found),
        "operators": operators_table(found),
        "layers": layers_table(found),
        "small": small_table(found),
        "decode": decode_tables(found),
        "tiles": tiles_table(),
        "vllm": tables_with_places(of_all_machines("vllm-bfloat16")),
    }
    if found.keys() >= set(EXPERTS):
        texts["experts"] = experts_table(found)
    for name, file, table in (
        ("growth", "growth", growth_table),
        ("stats", "stats", stats_table),
        ("quantised", "quantised-bfloat16", quantised_table),
        ("packed_peers", "quantised-peers", packed_peers_table),
        ("loading", "loading", loading_table),
    ):
        if file in found:
            texts[name] = table(found[file])
    return texts


def marks(page: str) -> list[str]:
    return re.findall(r"<!-- bench: (\w+) -->", page)


def replaced(page: str, mark: str, text: str) -> str:
    """The page with this text between <!-- mark --> and <!-- end -->."""
    marks = rf"(<!-- {mark} -->).*?(<!-- end -->)"
    return re.sub(marks, lambda found: f"{found[1]}{text}{found[2]}", page, flags=re.DOTALL)


def filled(page: str, texts: dict[str, str]) -> str:
    for name, text in texts.items():
        page = replaced(page, f"bench: {name}", f"\n{text}\n")
    return page


def cards() -> str:
    """Say on which GPUs the kernels have run: those that have results of bench_ops.py."""
    dates: dict[str, str] = {}
    for path in RESULTS.glob("*/ops-*.json"):
        report = json.loads(path.read_text())
        if report["cuda"]:
            dates[report["machine"]] = max(report["date"], dates.get(report["machine"], ""))
    if not dates:
        return "**they have not run on a GPU yet**"
    return "they have run on " + ", ".join(f"{card} ({dates[card]})" for card in sorted(dates))


def with_cards(page: str) -> str:
    return replaced(page, "cards", cards())


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    here = RESULTS / slug(machine(torch.device("cpu")))
    parser.add_argument("folder", nargs="?", type=Path, default=here, help="of result files")
    parser.add_argument("--cards", action="store_true", help="only say which GPUs have results")
    options = parser.parse_args(arguments)
    for page in (ROOT / "README.md", DOCS / "cuda.md"):
        page.write_text(with_cards(page.read_text()))
    if options.cards:
        return
    found = results(options.folder)
    if missing := NEEDED - set(found):
        sys.exit(f"{options.folder} has no {', '.join(sorted(missing))}: run `make bench`")
    texts = tables(found)
    for page in PAGES:
        page.write_text(filled(page.read_text(), texts))
    print("\n\n".join(texts.values()))
    import pictures

    pictures.draw_ratios(found, DOCS / "performance-ratios.png")
    pictures.draw_roofline(found, DOCS / "performance-roofline.png")
    pictures.draw_growth(found, DOCS / "performance-growth.png")


if __name__ == "__main__":
    main()
