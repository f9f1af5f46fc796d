"""The bench runs, checks what it times, and keeps what it has when it is stopped."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from moe_ext import reference

BENCH = Path(__file__).resolve().parent.parent / "bench"
SMALL = ["--device", "cpu", "--tokens", "40", "--seconds", "0.001"]


@pytest.fixture
def bench_ops(monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_ops", BENCH / "bench_ops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
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
