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
def bench_ops():
    spec = importlib.util.spec_from_file_location("bench_ops", BENCH / "bench_ops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_operator_is_timed(bench_ops, tmp_path):
    out = tmp_path / "folder" / "ops.json"
    bench_ops.main([*SMALL, "--shape", "gshard", "mixtral", "--out", str(out)])
    report = json.loads(out.read_text())
    titles = ["gate", "gate_backward", "plan", "dispatch", "combine", "route_dot", "dispatch_dot"]
    for shape in ("gshard", "mixtral"):
        lines = [line for line in report["ops"] if line["shape"] == shape]
        assert [line["op"] for line in lines] == [*titles, "plan, priority"]
    for line in report["ops"]:
        fast, slow = line["fast_slow_microseconds"]
        assert 0 < fast <= line["microseconds"] <= slow
        speed = line["bytes"] / line["microseconds"] / 1e3
        assert math.isclose(line["gigabytes_per_second"], speed)
        copy = report["copy"]["gigabytes_per_second"]
        assert math.isclose(line["of_copy"], speed / copy)
    # T * H * 2 bytes read, K times as many written.
    (dispatch,) = (x for x in report["ops"] if (x["op"], x["shape"]) == ("dispatch", "mixtral"))
    assert dispatch["bytes"] == 40 * 4096 * 2 * 3


def test_a_wrong_operator_is_not_timed(bench_ops, tmp_path, monkeypatch):
    right = reference.combine
    monkeypatch.setattr(reference, "combine", lambda *args: right(*args) * 1.02)
    out = tmp_path / "ops.json"
    with pytest.raises(AssertionError, match="combine: relative error"):
        bench_ops.main([*SMALL, "--shape", "gshard", "--out", str(out)])
    done = [line["op"] for line in json.loads(out.read_text())["ops"]]
    assert done == ["gate", "gate_backward", "plan", "dispatch"]
