"""Readings written down and read again, and the pictures and the table made of them."""

import json
import math
import re
import subprocess
import sys
from random import Random

import pytest
import torch
from torch import nn

from moe_ext import GroupedExperts, MOELayer, TopKGate, plot, stats
from moe_ext.monitor.sinks import JsonLines, TensorBoard, read_json_lines

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Five readings of two layers, in training and in evaluation, and the file of them."""
    torch.manual_seed(0)
    layers = [
        MOELayer(TopKGate(16, 8, 2, capacity_factor=0.9), GroupedExperts(8, 16, 8)) for _ in "ab"
    ]
    model = nn.Sequential(*layers)
    counting = stats.track(model, detailed=True)
    sink = JsonLines(tmp_path_factory.mktemp("run") / "run.jsonl")
    readings = []
    for step in range(0, 50, 10):
        model.train()(torch.randn(40, 16))
        model.eval()(torch.randn(20, 16))
        readings.append((step, counting.read()))
        sink(readings[-1][1], step)
    return readings, sink.path


def same(one: stats.LayerStats, other: stats.LayerStats) -> bool:
    for a, b in zip(one, other, strict=True):
        if isinstance(a, torch.Tensor) and not torch.equal(a.double(), b.double()):
            return False
        if not isinstance(a, torch.Tensor) and a != b:
            return False
    return True


def test_what_is_read_is_what_was_written(run):
    readings, path = run
    again = list(read_json_lines(path))
    assert [step for step, _ in again] == [0, 10, 20, 30, 40]
    for (_, one), (_, other) in zip(readings, again, strict=True):
        for mode in stats.MODES:
            before, after = getattr(one, mode), getattr(other, mode)
            assert list(before) == list(after) == ["0", "1"]
            assert all(same(before[name], after[name]) for name in before)


def test_a_step_that_could_not_be_read_is_not_written(run, tmp_path):
    sink, reading = JsonLines(tmp_path / "run.jsonl"), run[0][0][1]
    with pytest.raises(TypeError, match="float"):
        sink(reading, 0.5)
    sink(reading, torch.tensor(7))
    assert [step for step, _ in read_json_lines(sink.path)] == [7]


def test_equal_steps_are_readings_in_a_row(run, tmp_path):
    readings, _ = run
    sink = JsonLines(tmp_path / "run.jsonl")
    for _, reading in readings[:3]:
        sink(reading, 7)
    assert [step for step, _ in read_json_lines(sink.path)] == [7, 7, 7]


def test_readings_of_one_step_are_not_mixed(run, tmp_path):
    """A reading without training, and behind it one with it."""
    reading = run[0][1][1]
    sink = JsonLines(tmp_path / "run.jsonl")
    sink(reading._replace(train={}), 7)
    sink(reading, 7)
    first, second = (read for _, read in read_json_lines(sink.path))
    assert (list(first.train), list(first.eval)) == ([], ["0", "1"])
    assert (list(second.train), list(second.eval)) == (["0", "1"], ["0", "1"])


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_json_has_no_number_for(tmp_path, number):
    load = torch.tensor([3, 1])
    importance = torch.tensor([0.5, number], dtype=torch.float64)
    layer = stats.LayerStats(4, 1, load, load, number, importance, z_loss=-number)
    sink = JsonLines(tmp_path / "run.jsonl")
    sink(stats.Reading({"a": layer}, {}), 1)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(sink.path.read_text(), parse_constant=refuse)
    ((_, read),) = read_json_lines(sink.path)
    assert str(read.train["a"].l_aux) == str(number)
    assert str(read.train["a"].z_loss) == str(-number)
    assert str(read.train["a"].importance) == str(layer.importance)


def test_a_line_that_was_cut_off_is_left_out(run, tmp_path):
    text = run[1].read_text()
    cut = tmp_path / "cut.jsonl"
    cut.write_text(text[:-20])
    *_, (step, last) = read_json_lines(cut)
    assert step == 40
    assert (list(last.train), list(last.eval)) == (["0", "1"], ["0"])


@pytest.mark.parametrize("left", ["", "{", '{"step": 50, "mode"'])
def test_a_run_goes_on_behind_a_line_that_was_cut_off(run, tmp_path, left):
    readings, path = run
    sink = JsonLines(tmp_path / "run.jsonl")
    sink.path.write_text(path.read_text() + left)
    sink(readings[0][1], 60)
    assert [step for step, _ in read_json_lines(sink.path)] == [0, 10, 20, 30, 40, 60]
    sink.path.write_text(left)
    sink(readings[0][1], 60)
    assert [step for step, _ in read_json_lines(sink.path)] == [60]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nonsense", "Expecting value"),
        (b"{}", "step must be an integer of 64 bits, but is missing"),
        (b"[1]", r"it must be a JSON object, got \[1\]"),
        (b"\xff\xfe[\0", "codec can't decode"),
        (b"[" * 100_000, "recursion"),
        (b'{"a": 1}', r"keys must be among step, .*, got \{'a'\}"),
    ],
)
def test_a_line_that_is_no_reading_is_named(run, tmp_path, line, message):
    path = tmp_path / "other.jsonl"
    first = run[1].read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(first + line + b"\n" + first)
    where = r"other.jsonl, line 2: not a line of moe_ext's stats: .*"
    with pytest.raises(ValueError, match=f"{where}{message}.*; delete the line to read the others"):
        list(read_json_lines(path))


COUNTS = [1, 0, 3]
GOOD = {
    **{"step": 5, "mode": "train", "layer": "a", "tokens": 4, "calls": 1, "l_aux": 1.0},
    **{"load": COUNTS, "kept": COUNTS, "importance": [0.5, 0.0, 0.5], "z_loss": "inf"},
    "pairs": [[0, 1, 0], [1, 0, 2], [0, 2, 0]],
}


@pytest.mark.parametrize(
    ("key", "values"),
    {
        "step": [None, "1", 1.0, True, 10**400, 2**63, [1]],
        "mode": [None, "test", 1, ["train"], {"train": 1}],
        "layer": [None, "", 1, ["a"], {}, "a\nb", "\ud800"],
        "tokens": [None, -1, 1.0, "4", True, 10**400],
        "calls": [None, -1, 0.5, []],
        "load": [
            *(None, 4, "103", [], {"a": 1}, [[1, 0, 3]], [1, [0], 3], ["1", "0", "3"]),
            *([-1, 0, 3], [1.0, 0, 3], [True, 0, 3], [1, None, 3], [math.nan, 0, 3]),
            *([2**62, 2**62, 3], [10**400, 0, 3]),
        ],
        "kept": [None, [1, 0, 4], [2, 0, 3], [1, 0], [1, 0, -3], [1, 0, 3, 0]],
        "l_aux": [None, "1", "infinity", [], True, 10**400],
        "importance": [None, 1.0, [0.5, 0.5], [0.5, None, 0.5], ["", 0, 1], [10**400, 0, 0]],
        "z_loss": ["nothing", {}],
        "pairs": [
            *(None, [], [1, 2, 3], [[0, 1], [1, 0]], [[0, 1, 0], [1, 0], [0, 2, 0]]),
            *([[0, 1, 0], [2, 0, 2], [0, 2, 0]], [[0, 1, 0], [1, -1, 2], [0, 2, 0]]),
            [[2**62, 1, 0], [1, 2**62, 2], [0, 2, 0]],
        ],
    }.items(),
)
def test_a_value_that_no_reading_has_is_named(tmp_path, key, values):
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    ((_, read),) = read_json_lines(path)
    assert str(read.train["a"].z_loss) == "inf"
    for value in values:
        path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {key: value}) + "\n")
        with pytest.raises(ValueError, match=rf"run.jsonl, line 2: .*{key} must be") as caught:
            list(read_json_lines(path))
        assert len(str(caught.value)) < 500


ODD = [
    None,
    True,
    -1,
    0,
    3,
    2**63,
    10**400,
    0.5,
    math.nan,
    math.inf,
    "",
    "a",
    "nan",
    "train",
    "eval",
]
ODD += [
    [],
    [1],
    [0] * 8,
    [1] * 8,
    [-1] * 8,
    [2**62] * 8,
    [[1] * 8] * 8,
    [[1] * 8, [1]],
    {},
    {"a": []},
]


MOST = {"max_over_mean": 8 + 1e-9, "load_entropy": 1 + 1e-9, "dropped": 1, "dead": 8}


def mutated(lines: list[bytes], random: Random) -> bytes:
    """The lines with a few of their bytes, or a value in one of them, changed."""
    if random.random() < 0.5:
        data = bytearray(b"".join(lines))
        for _ in range(random.randint(1, 4)):
            at = random.randrange(len(data))
            length, new = random.choice([(1, 1), (0, 1), (1, 0), (20, 0), (0, 3)])
            data[at : at + length] = random.choice([random.randbytes(new), b'[]{},:"-0'[:new]])
        return bytes(data)
    which = random.randrange(len(lines))
    line = json.loads(lines[which])
    key = random.choice([*line, "other"])
    within = line[key] if isinstance(line.get(key), list) and random.random() < 0.5 else line
    at = key if within is line else random.randrange(len(within))
    if random.random() < 0.2:
        line.pop(key, None)
    else:
        within[at] = random.choice(ODD)
    changed = json.dumps(line, ensure_ascii=random.random() < 0.5).encode(errors="surrogatepass")
    return b"".join([*lines[:which], changed + b"\n", *lines[which + 1 :]])


def prints_right(reading: stats.Reading) -> bool:
    str(reading).encode()
    numbers = [layer.scalars() for mode in reading for layer in mode.values()]
    reading.scalars()
    return all(0 <= of[name] <= most for of in numbers for name, most in MOST.items())


def test_a_damaged_file_is_read_right_or_its_line_is_named(run, tmp_path):
    lines = run[1].read_bytes().splitlines(keepends=True)[:4]
    random, path = Random(0), tmp_path / "run.jsonl"
    errors = []
    for _ in range(3000):
        path.unlink(missing_ok=True)  # a file that is cut to nothing waits for the disk
        path.write_bytes(mutated(lines, random))
        try:
            assert all(prints_right(reading) for _, reading in read_json_lines(path))
        except ValueError as error:
            errors.append(str(error))
    named = re.compile(rf"{path}, line [1-5]: not a line of moe_ext's stats: ")
    assert all(map(named.match, errors))
    assert 1000 < len(errors) < 2900


def test_tensorboard(run):
    class Writer:
        seen: dict = {}  # noqa: RUF012

        def add_scalar(self, name, value, step):
            self.seen[name, step] = value

    step, reading = run[0][2]
    writer = Writer()
    TensorBoard(writer, per_layer=True)(reading, step)
    assert writer.seen["train/moe/1/cv", 20] == reading.train["1"].cv
    TensorBoard(writer)(reading, step)
    worst = max(layer.max_over_mean for layer in reading.eval.values())
    assert writer.seen["eval/moe/max_over_mean_worst", 20] == worst


def test_a_sink_that_could_not_write_is_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"JsonLines: .*missing must be a folder; create"):
        JsonLines(tmp_path / "missing" / "run.jsonl")
    with pytest.raises(ValueError, match=r"TensorBoard: writer must have add_scalar.*'runs'"):
        TensorBoard("runs")


def command(*arguments) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "moe_ext", "plot", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True)


def test_the_command_draws_and_tells(run, tmp_path):
    readings, path = run
    done = command(path, "--out", tmp_path / "new" / "folder")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"step 40\n{readings[-1][1]}\n")
    names = ["load.png", "sorted.png", "over-time.png", "pairs.png"]
    files = [tmp_path / "new" / "folder" / name for name in names]
    assert done.stdout.splitlines()[-4:] == list(map(str, files))
    for file in files:
        assert file.read_bytes().startswith(PNG)


def test_a_terminal_without_the_bars_gets_other_characters(run, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = command(run[1], "--text")
    assert done.returncode == 0, done.stderr
    assert "max/mean" in done.stdout


def test_the_command_without_pictures(run, tmp_path):
    done = command(run[1], "--text", "--out", tmp_path)
    assert done.returncode == 0
    assert "a bar for an expert" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [None, "", "nonsense\n", '{"step": 50, "mode"'])
def test_the_command_and_a_wrong_file(tmp_path, text):
    path = tmp_path / "run.jsonl"
    if text is not None:
        path.write_text(text)
    done = command(path)
    assert done.returncode == 2
    assert done.stderr.startswith("moe_ext plot: ")
    assert len(done.stderr.splitlines()) == 1


def test_the_command_and_a_wrong_layer_or_picture(run, tmp_path):
    done = command(run[1], "--layer", "ffn", "--text")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "moe_ext plot: --layer must be 0 or 1, got ffn\n"
    path = tmp_path / "load.png"
    path.write_bytes(PNG + b"\r\n")
    error = f"moe_ext plot: {path}, line 1: not a line of moe_ext's stats: "
    assert command(path, "--text").stderr.startswith(error)


def test_the_command_and_a_file_in_the_place_of_its_folder(run, tmp_path):
    out = tmp_path / "out"
    out.write_text("")
    done = command(run[1], "--out", out)
    assert done.returncode == 2
    assert done.stderr.startswith("moe_ext plot: ")
    assert str(out) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_a_heat_map_shows(tmp_path, monkeypatch):
    """The numbers of the shares, and one scale for all pictures: from nothing to twice even."""
    drawn = []
    monkeypatch.setattr(plot, "_save", lambda figure, path: drawn.append(figure))
    plot.plot_load({"a": [0.5, 0.25, 0.25, 0], "b": [0.5, 0.5]}, tmp_path, "training")
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["50%", "25%", "25%", "idle", "50%", "50%"]
    assert axes.images[0].get_clim() == (plot.LEAST, 2)
    table = axes.images[0].get_array()
    assert table[0].tolist() == [2, 1, 1, 0]
    assert table[1].filled(-1).tolist() == [1, 1, -1, -1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_a_picture_says_what_it_shows(run, tmp_path, monkeypatch):
    """A title, and a name with a unit on every axis and scale."""
    drawn = []
    monkeypatch.setattr(plot, "_save", lambda figure, path: drawn.append(figure))
    plot.plot_run(run[0], tmp_path)
    curves = {"moe, held out": [(1, 2.0)], "moe, training": [(1, 3.0)]}
    plot.plot_curves(curves, tmp_path, "loss of a model", "bits per byte")
    titles = [figure.axes[0].get_title() for figure in drawn]
    for title, words in zip(titles, ("Load", "evenly", "over time", "Pairs", "loss"), strict=True):
        assert words in title
    assert all(mark in title for title in titles[:2] for mark in ("training", "step 40"))
    for axes in (axes for figure in drawn for axes in figure.axes):
        is_scale = axes.get_label() == "<colorbar>"
        assert axes.get_ylabel()
        assert is_scale or axes.get_xlabel()
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["layer", "load / even share"]
    one, other = drawn[-1].axes[0].lines
    assert one.get_color() == other.get_color()
    assert one.get_linestyle() != other.get_linestyle()


def test_a_layer_may_have_any_printable_name(tmp_path):
    """A dollar sign would begin a formula."""
    counts, pairs = torch.tensor([2, 3]), torch.tensor([[0, 90], [90, 0]])
    layer = stats.LayerStats(4, 1, counts, counts, pairs=pairs)
    readings = [(step, stats.Reading({r"a$\frac$": layer}, {})) for step in (1, 2)]
    assert len(plot.plot_run(readings, tmp_path)) == 4


def test_what_is_chosen_together():
    """Choices without a liking for each other are at 1, whatever the loads; a pair that always goes
    together is above."""
    for load in ([1.0, 1, 1, 1], [5.0, 2, 2, 1]):
        chances = torch.tensor(load, dtype=torch.float64)
        pairs = 1e6 * torch.outer(chances, chances)
        lift = plot.co_routing(pairs)
        off = ~torch.eye(4, dtype=torch.bool)
        torch.testing.assert_close(lift[off], torch.ones(12).double(), rtol=1e-4, atol=0)
        assert lift.diagonal().isnan().all()
    always = torch.block_diag(torch.full((2, 2), 90), torch.full((2, 2), 90))
    lift = plot.co_routing(always)
    assert lift[0, 1] == lift[1, 0] > 2
    assert lift[0, 2] == 0
    idle = plot.co_routing(torch.tensor([[40, 40, 0], [40, 40, 0], [0, 0, 0]]))
    assert idle[2].isnan().all()
    assert idle[0, 1] == pytest.approx(1)


def test_few_pairs_are_no_pattern():
    """Chance alone gives two experts of few tokens far more or far less than their part."""
    few = torch.full((8, 8), plot.FEW_PAIRS - 1)
    assert plot.co_routing(few).isnan().all()
    assert not plot.co_routing(2 * few).fill_diagonal_(1).isnan().any()


def test_the_layer_that_is_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "plot_over_time", lambda *args: drawn.append(args[-1]))
    even, uneven = (
        stats.LayerStats(4, 1, counts, counts, 1.0)
        for counts in (torch.tensor([2, 2]), torch.tensor([1, 3]))
    )
    readings = [(step, stats.Reading({"a": even, "b": uneven}, {})) for step in (1, 2)]
    plot.plot_run(readings, tmp_path)
    plot.plot_run(readings, tmp_path, "a")
    assert drawn == ["layer b (the least even), training", "layer a, training"]
    with pytest.raises(ValueError, match="layer must be a or b, got c"):
        plot.plot_run(readings, tmp_path, "c")


def test_layers_of_one_choice_have_no_pairs(run, tmp_path):
    load = torch.tensor([3, 1])
    layer = stats.LayerStats(4, 1, load, load, 1.0, pairs=torch.diag(load))
    paths = plot.plot_run([(1, stats.Reading({"a": layer}, {}))], tmp_path)
    assert [path.name for path in paths] == ["load.png", "sorted.png"]


def test_a_file_of_two_runs_with_other_experts(tmp_path):
    def reading(*load):
        counts = torch.tensor(load)
        return stats.Reading({"a": stats.LayerStats(4, 1, counts, counts, 1.0)}, {})

    runs = [(1, reading(2, 2)), (2, reading(3, 1)), (1, reading(1, 1, 2)), (2, reading(0, 1, 3))]
    paths = plot.plot_run(runs, tmp_path)
    assert [path.name for path in paths] == ["load.png", "sorted.png", "over-time.png"]


def test_lines_are_json_for_others(run):
    lines = [json.loads(line) for line in run[1].read_text().splitlines()]
    assert len(lines) == 5 * 2 * 2
    assert {"step", "mode", "layer", "load", "kept", "tokens", "l_aux"} <= set(lines[0])
