"""Sinks write readings; read_json_lines reads them, and refuses what no sink wrote."""

import json
import math
import re
from random import Random
from unittest.mock import Mock

import pytest
import torch

from moe_ext import stats
from moe_ext.monitor.sinks import JsonLines, TensorBoard, read_json_lines


def test_a_file_gives_back_its_readings(run):
    readings, path = run
    again = list(read_json_lines(path))
    assert [step for step, _ in again] == [0, 10, 20, 30, 40]
    assert len(path.read_text().splitlines()) == 5 * 2 * 2
    torch.testing.assert_close(again, readings, rtol=0, atol=0)
    assert all(list(mode) == ["0", "1"] for _, reading in again for mode in reading)


def test_a_step_must_be_an_integer(run, tmp_path):
    sink, reading = JsonLines(tmp_path / "run.jsonl"), run[0][0][1]
    with pytest.raises(TypeError, match="float"):
        sink(reading, 0.5)
    sink(reading, torch.tensor(7))
    assert [step for step, _ in read_json_lines(sink.path)] == [7]


def test_equal_steps_stay_separate_readings(run, tmp_path):
    """Also after a reading without training: a reading begins with its training lines."""
    reading = run[0][1][1]
    sink = JsonLines(tmp_path / "run.jsonl")
    without = reading._replace(train={})
    for written in (without, without, reading, reading):
        sink(written, 7)
    again = list(read_json_lines(sink.path))
    assert [step for step, _ in again] == [7, 7, 7, 7]
    both = ["0", "1"]
    names = [(list(read.train), list(read.eval)) for _, read in again]
    assert names == [([], both), ([], both), (both, both), (both, both)]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_nan_and_infinities_are_written_as_json(tmp_path, number):
    load = torch.tensor([3, 1])
    importance = torch.tensor([0.5, number], dtype=torch.float64)
    layer = stats.LayerStats(4, 1, load, load, number, importance, z_loss=-number)
    sink = JsonLines(tmp_path / "run.jsonl")
    sink(stats.Reading({"a": layer}, {}), 1)
    json.loads(sink.path.read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    ((_, read),) = read_json_lines(sink.path)
    assert str(read.train["a"].l_aux) == str(number)
    assert str(read.train["a"].z_loss) == str(-number)
    assert str(read.train["a"].importance) == str(layer.importance)


def test_a_cut_off_last_line_is_ignored(run, tmp_path):
    text = run[1].read_text()
    cut = tmp_path / "cut.jsonl"
    cut.write_text(text[:-20])
    *_, (step, last) = read_json_lines(cut)
    assert step == 40
    assert (list(last.train), list(last.eval)) == (["0", "1"], ["0"])


@pytest.mark.parametrize("left", ["", "{", '{"step": 50, "mode"'])
def test_a_new_reading_replaces_a_cut_off_last_line(run, tmp_path, left):
    readings, path = run
    sink = JsonLines(tmp_path / "run.jsonl")
    sink.path.write_text(path.read_text() + left)
    sink(readings[0][1], 60)
    assert [step for step, _ in read_json_lines(sink.path)] == [0, 10, 20, 30, 40, 60]
    sink.path.write_text(left)
    sink(readings[0][1], 60)
    assert [step for step, _ in read_json_lines(sink.path)] == [60]


@pytest.mark.parametrize("text", ["{}", "{}\n", '{"a": 1}\n{"b"', '{"step"}'])
def test_a_file_of_others_is_left_alone(run, tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"config.json must be a file of readings, or new, .*other path"
    ):
        JsonLines(path)(run[0][0][1], 0)
    assert path.read_text() == text


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
def test_errors_name_a_line_that_is_no_reading(run, tmp_path, line, message):
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
def test_errors_name_a_value_that_no_reading_has(tmp_path, key, values):
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
    *(None, True, -1, 0, 3, 2**63, 10**400, 0.5, math.nan, math.inf),
    *("", "a", "nan", "train", "eval", {}, {"a": []}),
    *([], [1], [0] * 8, [1] * 8, [-1] * 8, [2**62] * 8, [[1] * 8] * 8, [[1] * 8, [1]]),
]
MOST = {"max_over_mean": 8 + 1e-9, "load_entropy": 1 + 1e-9, "dropped": 1, "dead": 8}


def mutated(lines: list[bytes], random: Random) -> bytes:
    """Change a few bytes of the lines, or a value in one of them."""
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


def test_a_damaged_file_gives_valid_readings_or_names_the_line(run, tmp_path):
    lines = run[1].read_bytes().splitlines(keepends=True)[:4]
    random, path = Random(0), tmp_path / "run.jsonl"
    errors = []
    for _ in range(3000):
        path.unlink(missing_ok=True)  # truncating a file waits for the disk
        path.write_bytes(mutated(lines, random))
        try:
            assert all(prints_right(reading) for _, reading in read_json_lines(path))
        except ValueError as error:
            errors.append(str(error))
    named = re.compile(rf"{path}, line [1-5]: not a line of moe_ext's stats: ")
    assert all(map(named.match, errors))
    assert 1000 < len(errors) < 2900


def test_tensorboard_gets_every_number(run):
    step, reading = run[0][2]
    writer = Mock()
    TensorBoard(writer, per_layer=True)(reading, step)
    writer.add_scalar.assert_any_call("train/moe/1/cv", reading.train["1"].cv, 20)
    writer.reset_mock()
    TensorBoard(writer)(reading, step)
    worst = max(layer.max_over_mean for layer in reading.eval.values())
    writer.add_scalar.assert_any_call("eval/moe/max_over_mean_worst", worst, 20)


def test_sinks_check_their_target_when_they_are_made(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"JsonLines: the folder of path must exist"):
        JsonLines(tmp_path / "missing" / "run.jsonl")
    with pytest.raises(ValueError, match=r"TensorBoard: writer must have add_scalar.*'runs'"):
        TensorBoard("runs")
