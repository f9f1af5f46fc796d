"""The benches check results before they time them, and keep a partial run apart from a whole."""

import ctypes
import itertools
import json
import math
import os
import sys

import bench_growth
import bench_layer
import bench_ops
import bench_parallel
import common
import layer_peers
import memory
import peers
import pictures
import pytest
import report
import scaling
import timing
import torch
import torch.distributed as dist
from matplotlib.text import Text

import moe_ext
from moe_ext.ops import reference

SMALL = ["--device", "cpu", "--tokens", "40", "--seconds", "0.001"]


@pytest.fixture(autouse=True)
def _no_group_is_left():
    """fairscale's layer initialises one."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch):
    monkeypatch.setattr(bench_ops, "cache_bytes", lambda device: 1 << 16)


@pytest.fixture
def ops_report(tmp_path):
    """Runs bench_ops with options, and gives the report that it writes."""

    def report(*options: str) -> dict:
        out = tmp_path / "folder" / "ops.json"
        bench_ops.main([*SMALL, *options, "--out", str(out)])
        return json.loads(out.read_text())

    return report


def test_every_operator_is_timed(ops_report):
    report = ops_report("--shape", "gshard", "mixtral")
    assert report["complete"]
    assert [shape["shape"] for shape in report["shapes"]] == ["gshard", "mixtral"]
    for shape in report["shapes"]:
        assert [line["op"] for line in shape["ops"]] == bench_ops.TITLES
        for line in shape["ops"]:
            median, fast, slow = line["alone"]
            assert 0 < fast <= median <= slow
            speed = line["bytes"] / median / 1e9
            assert line["gigabytes_per_second"] == pytest.approx(speed, rel=1e-4)
            copy = shape["copy"]["gigabytes_per_second"]
            assert line["of_copy"] == pytest.approx(speed / copy, rel=1e-4)
            assert set(line["ratio"]) == set(line["seconds"]) - {"moe_ext"}
    by_op = {line["op"]: line for line in report["shapes"][1]["ops"]}
    # A row of bfloat16 read and K written for each token; a slot and a source for each route.
    assert by_op["dispatch"]["bytes"] == 40 * 4096 * 2 * 3 + 40 * 2 * (4 + 4)
    assert {"embedding_bag", "index_add_"} <= set(by_op["combine"]["ratio"])
    assert {"torch", "torch.argsort"} <= {*by_op["gate"]["ratio"], *by_op["plan"]["ratio"]}
    assert all(set(by_op[f"activate, {name}"]["ratio"]) == {"torch"} for name in ("gelu", "swiglu"))


def test_result_files_have_a_line_for_each_record(tmp_path):
    out = tmp_path / "folder" / "report.json"
    records = [{"seconds": timing.Spread(1 / 3, 0.25, 1 / 2), "n": i} for i in range(3)]
    report = {"number": 12345678, "text": "\n", "none": None, "records": records * 20}
    common.keep(report, None, out)
    assert len(out.read_text().splitlines()) == 1 + 3 + 1 + 60 + 1 + 1
    stored = json.loads(out.read_text())
    assert stored["records"][:3] == [{"seconds": [0.3333333, 0.25, 0.5], "n": i} for i in range(3)]
    assert (stored["number"], stored["text"], stored["none"]) == (12345678, "\n", None)


def test_peers_that_are_missing_are_named(ops_report, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    (gate,) = ops_report("--shape", "gshard", "--op", "gate")["shapes"][0]["ops"]
    assert gate["excluded"]["DeepSpeed, with positions and loss"] == "needs deepspeed"
    assert "moe-ops" in gate["excluded"]


def test_the_state_of_memory_is_recorded(ops_report, monkeypatch):
    """Every state has a process of its own; here one process stands for all."""
    monkeypatch.setattr(bench_ops, "measure_in", bench_ops.measure)
    monkeypatch.setattr(memory, "give_back", lambda: None)
    monkeypatch.setattr(moe_ext, "keep_memory", lambda limit=None: (0, 0))
    states = ["new", "huge", "kept"]
    options = ["--shape", "gshard", "--op", "plan", "--memory", *states, "--threads", "1"]
    shapes = ops_report(*options)["shapes"]
    assert [(shape["memory"], shape["threads"]) for shape in shapes] == [(s, 1) for s in states]


def memory_settings(*_) -> tuple[str | None, bool]:
    """Whether torch asks for huge pages, and whether a block that is freed is there at once."""
    block = ctypes.create_string_buffer(64 << 20)
    ctypes.memset(block, 1, len(block))
    before = memory._resident("VmRSS")
    del block
    is_kept = before - memory._resident("VmRSS") < 32 << 20
    return os.environ.get("THP_MEM_ALLOC_ENABLE"), is_kept


@pytest.mark.parametrize(
    ("state", "expected"), [("new", (None, False)), ("huge", ("1", False)), ("kept", (None, True))]
)
def test_a_state_of_memory_is_in_force(monkeypatch, state, expected):
    monkeypatch.setattr(bench_ops, "measure", memory_settings)
    assert bench_ops.measure_in(None, "", state) == expected


def test_a_part_is_not_kept_as_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    bench_ops.main([*SMALL, "--shape", "gshard", "--op", "plan"])
    assert list(tmp_path.iterdir()) == []
    bench_ops.main([*SMALL, "--shape", "gshard", "--op", "plan", "--name", "part"])
    assert [path.name for path in tmp_path.glob("*/*")] == ["part.json"]


@pytest.mark.parametrize("fault", ["scaled", "a token lost"])
def test_a_wrong_operator_is_not_timed(tmp_path, monkeypatch, fault):
    right = reference.combine

    def wrong(*args):
        out = right(*args) * (1.04 if fault == "scaled" else 1)
        if fault == "a token lost":
            out[17] = 0
        return out

    monkeypatch.setattr(reference, "combine", wrong)
    with pytest.raises(AssertionError, match="combine: relative error"):
        bench_ops.main([*SMALL, "--shape", "gshard", "--out", str(tmp_path / "ops.json")])
    assert not json.loads((tmp_path / "ops.json").read_text())["complete"]


@pytest.mark.parametrize("title", ["gate", "plan", "dispatch", "combine"])
def test_a_wrong_peer_is_not_timed(monkeypatch, title):
    peer = peers.OPERATORS[title][0]

    def wrong(operands):
        function = peer.make(operands)

        def call():
            first, *rest = function()
            first = first.clone()
            first[1] = first[0]
            return first, *rest

        return call

    monkeypatch.setitem(peers.OPERATORS, title, [peer._replace(make=wrong)])
    with pytest.raises(AssertionError, match=peer.name.replace(".", r"\.")):
        bench_ops.main([*SMALL, "--shape", "gshard", "--op", title])


def test_layers_are_checked_before_they_are_timed(monkeypatch):
    point = bench_layer.Point(64, 16, 8, 4, 2, "zipf")
    result = bench_layer.measure(point, torch.float32, 1, 0.0)
    names = {"moe_ext", *result["ratio"], *result["excluded"]}
    assert names == {peer.name for peer in layer_peers.LAYERS}
    assert "plain PyTorch" in result["ratio"]
    assert all(error < 1e-5 for error in result["relative_error"].values())
    assert {"moe_ext", "bound"} <= set(result["seconds"])

    class Wrong(layer_peers.PlainLayer):
        def forward(self, tokens):
            return super().forward(tokens).index_fill(0, torch.tensor([3]), 0.0)

    wrong = peers.Peer("wrong", None, Wrong)
    monkeypatch.setattr(layer_peers, "LAYERS", [layer_peers.LAYERS[0], wrong])
    monkeypatch.setitem(bench_growth.LAYERS, "wrong", wrong)
    with pytest.raises(AssertionError, match="wrong: relative error"):
        bench_layer.measure(point, torch.float32, 1, 0.0)
    with pytest.raises(AssertionError, match="wrong: relative error"):
        bench_growth.costs_of("wrong", [1000], 0.0)


def test_a_shape_of_ones_own_is_timed(tmp_path, capsys):
    out = tmp_path / "layer.json"
    shape = ["--shape", "40", "16", "24", "4", "2", "--load", "zipf"]
    bench_layer.main([*shape, "--seconds", "0", "--out", str(out)])
    point = json.loads(out.read_text())["points"][0]
    assert bench_layer.Point(*(point[name] for name in bench_layer.Point._fields)) == (
        bench_layer.Point(40, 16, 24, 4, 2, "zipf")
    )
    assert "T40 H16 F24 E4 K2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ("40 16 24 4 5", "needs K <= E <= H, as H holds a token's logits, got"),
        ("40 16 24 17 2", "needs K <= E <= H"),
        ("40 16 24 4 1", "with K = 1 needs --experts"),
    ],
)
def test_shapes_that_cannot_be_timed_are_refused(capsys, shape, problem):
    with pytest.raises(SystemExit):
        bench_layer.main(["--shape", *shape.split()])
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("load_of", "is_as_named"),
    [
        ("balanced", lambda share: share.max() < 2 * share.min()),
        ("zipf", lambda share: share[0] > 3 * share[-1] > 0),
        ("one hot expert", lambda share: share[0] == 1 and share[1:].max() < 0.4),
        ("half of the experts empty", lambda share: not share[4:].any() and share[:4].all()),
    ],
)
def test_layers_get_the_load_they_are_named_for(load_of, is_as_named):
    point = bench_layer.Point(512, 32, 8, 8, 2, load_of)
    case = bench_layer.Case(point, torch.float32)
    share = torch.tensor(case.solution.load) / 512
    assert share.sum() == 2
    assert is_as_named(share)


def test_growth_has_slopes_and_counts_memory():
    counts = bench_growth.token_counts(1_000_000)
    assert (counts[0], counts[-1]) == (1000, 1_000_000)
    assert math.isclose(bench_growth.slope(counts, [3e-6 * t for t in counts]), 1.0)
    assert math.isclose(bench_growth.slope(counts, [1e-9 * t**2 for t in counts]), 2.0)
    ((seconds, grown),) = bench_growth.costs_of("moe_ext", [20_000], 0.0)
    assert seconds > 0
    rows = 2 * 20_000 * 64 * 4
    assert rows < grown < 100 * rows


def test_an_exchange_sends_at_least_the_least_bytes(tmp_path, monkeypatch):
    out = tmp_path / "parallel.json"
    options = ["--processes", "2", "--top-k", "3", "--tokens", "64", "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", ["bench_parallel", *options, "--out", str(out)])
    bench_parallel.main()
    points = {point["way"]: point for point in json.loads(out.read_text())["points"]}
    per_route, per_process = points["a row per route"], points["a token per rank"]
    assert points.keys() >= {"capacity 1.25", "a row per route, in 2 parts"}
    row = 512 * 2
    assert math.isclose(
        per_process["least_bytes_per_token"], 4 * row * per_process["others_per_token"]
    )
    # Ids, weights and counts beside the rows.
    assert 1 < per_process["of_least"] < 1.1
    # A route in two leaves its process.
    assert per_route["bytes_per_token"] / (4 * row) == pytest.approx(1.5, rel=0.2)
    assert all(point["seconds"] > 0 for point in points.values())


def test_the_model_of_many_gpus_has_exact_chances_and_a_bound(drawn):
    layer = scaling.Layer(num_experts=12, k=3)
    choices = list(itertools.combinations(range(12), 3))
    for parts in (1, 2, 3, 4, 12):
        share = [any(e < 12 // parts for e in choice) for choice in choices]
        assert math.isclose(scaling.chance(layer, parts), sum(share) / len(share))
    lines = {"a": [1.0] * 8, "b": [2.0] * 8, "c": [3.0] * 8, "d": [4.0] * 8, "least": [0.5] * 8}
    gpus = [2**i for i in range(8)]
    scaling.draw(gpus, lines, 1.0, 16, None)
    (axis,) = drawn[0].axes
    assert axis.get_title().startswith("Modelled, not measured: ")
    assert axis.get_ylabel().endswith(", ms")
    assert [text.get_text() for text in axis.get_legend().get_texts()[:2]] == ["a", "b"]
    machine = scaling.Machine()
    for processes in (8, 64, 256):
        least = scaling.least(scaling.Layer(), machine, processes)
        for way in scaling.WAYS.values():
            assert scaling.exchange(scaling.Layer(), machine, processes, *way) > least


@pytest.fixture
def measured():
    """The results that the pages show."""
    readme = report.PAGES[0].read_text()
    found = [report.results(path.parent) for path in report.RESULTS.glob("*/growth.json")]
    found = [results for results in found if report.where(results["layer-float32"]) in readme]
    if not found:
        pytest.skip("the results are not here")
    return found[0]


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        ("draw_ratios", "median over|lowest to highest|moe_ext is faster|torch 2|threads"),
        ("draw_roofline", "relative to a plain copy|copy_ of large tensors|GB/s|lowest to highest"),
        ("draw_growth", "seconds|MiB|tokens T|slope|does not fit|one MoE layer|torch 2"),
    ],
)
def test_pictures_name_their_units_and_setting(measured, drawn, draw, words):
    getattr(pictures, draw)(measured, None)
    said = "\n".join(text.get_text() for text in drawn[0].findobj(Text))
    assert [word for word in words.split("|") if word not in said] == []


def test_bars_of_ratios_begin_where_both_take_as_long(measured, drawn):
    pictures.draw_ratios(measured, None)
    axes = drawn[0].axes
    assert len(axes) == 3
    for axis in axes:
        assert {bar.get_x() for bar in axis.patches} == {1}
        least, most = axis.get_xlim()
        assert least < 1 < most
        whiskers = [line.get_xdata() for line in axis.lines]
        assert all(least < x < most for line in whiskers for x in line)
    # Names of operators stand once, at the left.
    shown = [bool(axis.yaxis.get_tick_params()["labelleft"]) for axis in axes]
    assert shown == [True, False, False]


def test_a_throughput_above_a_copy_is_explained(measured, drawn):
    pictures.draw_roofline(measured, None)
    shares = [
        line["of_copy"]
        for group in report.operator_runs(measured)
        for run in group["runs"].values()
        for line in run["ops"]
    ]
    (axis,) = drawn[0].axes
    assert axis.get_ylim()[0] == 0
    assert axis.get_ylim()[1] > max(shares)
    if max(shares) <= 1:
        assert not axis.texts
        return
    (note,) = axis.texts
    assert note.get_text().startswith(f"{max(shares):.2f}: ")
    assert note.xy[1] == max(shares)


def test_pages_show_what_was_measured(measured):
    texts = report.tables(measured)
    if "experts" not in texts:  # of bench-full, perhaps on another machine
        folders = [path.parent for path in report.RESULTS.glob(f"*/{report.EXPERTS[0]}.json")]
        texts["experts"] = report.experts_table(report.results(folders[0]))
    for page in report.PAGES:
        shown = page.read_text()
        assert report.filled(shown, texts) == shown
        assert "<!-- bench: " in shown
    assert set(texts) == {name for page in report.PAGES for name in report.marks(page.read_text())}
