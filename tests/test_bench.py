"""The bench runs, checks what it times, and keeps what it has when it is stopped."""

import importlib.util
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from moe_ext import reference

BENCH = Path(__file__).resolve().parent.parent / "bench"
SMALL = ["--device", "cpu", "--tokens", "40", "--seconds", "0.001"]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench_ops(monkeypatch):
    module = load("bench_ops")
    monkeypatch.setattr(module, "cache_bytes", lambda device: 1 << 16)
    return module


def test_every_operator_is_timed(bench_ops, tmp_path):
    out = tmp_path / "folder" / "ops.json"
    bench_ops.main([*SMALL, "--shape", "gshard", "mixtral", "--out", str(out)])
    report = json.loads(out.read_text())
    assert not report["complete"]  # of two shapes, and with fewer tokens
    assert [shape["shape"] for shape in report["shapes"]] == ["gshard", "mixtral"]
    for shape in report["shapes"]:
        assert [line["op"] for line in shape["ops"]] == bench_ops.TITLES
        for line in shape["ops"]:
            fast, slow = line["fast_slow_microseconds"]
            assert 0 < fast <= line["microseconds"] <= slow
            speed = line["bytes"] / line["microseconds"] / 1e3
            assert math.isclose(line["gigabytes_per_second"], speed)
            assert math.isclose(line["of_copy"], speed / shape["copy"]["gigabytes_per_second"])
    # A row of bfloat16 read and K written for each token; a slot and a source for each route.
    (dispatch,) = (line for line in report["shapes"][1]["ops"] if line["op"] == "dispatch")
    assert dispatch["bytes"] == 40 * 4096 * 2 * 3 + 40 * 2 * (4 + 4)


def test_a_part_is_not_kept_as_the_whole(bench_ops, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_ops, "RESULTS", tmp_path)
    bench_ops.main([*SMALL, "--shape", "gshard", "--op", "plan"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["scaled", "a token lost"])
def test_a_wrong_operator_is_not_timed(bench_ops, tmp_path, monkeypatch, fault):
    right = reference.combine

    def wrong(*args):
        out = right(*args) * (1.04 if fault == "scaled" else 1)
        if fault == "a token lost":
            out[17] = 0
        return out

    monkeypatch.setattr(reference, "combine", wrong)
    out = tmp_path / "ops.json"
    with pytest.raises(AssertionError, match="combine: relative error"):
        bench_ops.main([*SMALL, "--shape", "gshard", "--out", str(out)])
    report = json.loads(out.read_text())
    assert not report["complete"]
    done = [line["op"] for line in report["shapes"][0]["ops"]]
    assert done == ["gate", "gate_backward", "plan", "dispatch"]


def test_bytes_of_an_exchange(tmp_path):
    out = tmp_path / "parallel.json"
    options = ["--processes", "2", "--top-k", "3", "--tokens", "64", "--seconds", "0"]
    subprocess.run(
        [sys.executable, BENCH / "bench_parallel.py", *options, "--out", out],
        check=True,
        capture_output=True,
    )
    points = {point["way"]: point for point in json.loads(out.read_text())["points"]}
    per_route, per_process = points["a row per route"], points["a token per process"]
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


def test_model_of_many_gpus(tmp_path):
    scaling = load("scaling")
    layer = scaling.Layer(num_experts=12, k=3)
    choices = list(itertools.combinations(range(12), 3))
    for parts in (1, 2, 3, 4, 12):
        share = [any(e < 12 // parts for e in choice) for choice in choices]
        assert math.isclose(scaling.chance(layer, parts), sum(share) / len(share))
    lines = {"a": [1.0] * 8, "b": [2.0] * 8, "c": [3.0] * 8, "d": [4.0] * 8, "least": [0.5] * 8}
    scaling.draw([2**i for i in range(8)], lines, 1.0, 16, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    machine = scaling.Machine()
    for processes in (8, 64, 256):
        least = scaling.least(scaling.Layer(), machine, processes)
        for way in scaling.WAYS.values():
            assert scaling.trip(scaling.Layer(), machine, processes, *way) > least
