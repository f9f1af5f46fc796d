"""The bench of experts checks what it times, and names what it does not run."""

import importlib
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra peers")

from transformers.integrations import moe


@pytest.fixture
def bench(monkeypatch):
    folder = Path(__file__).parents[2] / "bench"
    monkeypatch.syspath_prepend(str(folder))
    module = importlib.import_module("bench_experts")
    points = {"tiny": (9, 16, 8, 4, 2, "balanced"), "skewed": (9, 16, 8, 4, 2, "zipf")}
    monkeypatch.setattr(module, "POINTS", {n: module.Point(*p) for n, p in points.items()})
    return module


def test_the_bench_checks_and_times_every_peer(bench, tmp_path, capsys, monkeypatch):
    timing = importlib.import_module("timing")
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    bench.main(["--rounds", "1", "--no-growth"])
    folder = timing.slug(timing.machine(torch.device("cpu")))
    report = json.loads((tmp_path / folder / "experts-float32.json").read_text())
    assert list(report["points"]) == ["tiny", "skewed"]
    for point in report["points"].values():
        assert set(point["seconds"]) == {"moe_ext", "eager", "batched_mm", "grouped_mm"}
        assert all(error < 1e-5 for error in point["relative_error"].values())
        best = min(s for name, s in point["seconds"].items() if name != "moe_ext")
        assert point["ratio"] == best / point["seconds"]["moe_ext"]
        assert point["of_bound"] == point["bound_seconds"] / point["seconds"]["moe_ext"]
        assert point["flops"] == 18 * 18 * 16 * 8
    assert report["lowest_ratio"] == min(p["ratio"] for p in report["points"].values())
    assert "in the geometric mean" in capsys.readouterr().out


def test_the_bench_sees_memory(bench):
    """Gradients of weights at the least."""
    point = bench.Point(512, 256, 256, 8, 2, "balanced")
    grown = bench.memory.in_new_process(bench.growth, point, torch.float32, "moe_ext")
    weights = 3 * 8 * 256 * 256 * 4
    assert weights < grown < 10 * weights


def test_the_bench_names_what_it_does_not_run(bench, monkeypatch):
    monkeypatch.setattr(bench, "MOST_BYTES", 1000)
    result = bench.measure(bench.POINTS["tiny"], torch.float32, 1)
    assert result["excluded"] == {"batched_mm": "needs 0 GiB"}
    assert "batched_mm" not in result["seconds"]
    monkeypatch.setattr(bench, "MOST_SECONDS", 0.0)
    result = bench.measure(bench.POINTS["tiny"], torch.float32, 1)
    assert result["excluded"]["eager"].startswith("took")
    assert set(result["seconds"]) == {"moe_ext"}


def test_a_wrong_peer_is_not_timed_by_the_bench(bench, monkeypatch):
    right = moe.ExpertsInterface._global_mapping["grouped_mm"]

    def wrong(*args):
        return 1.001 * right(*args)

    monkeypatch.setitem(moe.ExpertsInterface._global_mapping, "grouped_mm", wrong)
    with pytest.raises(AssertionError, match=r"grouped_mm: relative error 0\.001"):
        bench.measure(bench.POINTS["tiny"], torch.float32, 1)
