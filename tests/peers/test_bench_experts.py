"""The bench of experts times every implementation, and names peers that are left out."""

import importlib
import json
from pathlib import Path

import pytest
import torch


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    return importlib.import_module("bench_layer")


@pytest.fixture
def tiny(bench):
    return bench.Point(9, 16, 8, 4, 2, "zipf")


def test_every_implementation_is_timed(bench, tiny, tmp_path, capfd, monkeypatch):
    common = importlib.import_module("common")
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    points = {"tiny": tiny._replace(load="balanced"), "skewed": tiny}
    monkeypatch.setattr(bench, "EXPERTS_POINTS", points)
    bench.main(["--experts", "--seconds", "0"])
    folder = common.slug(common.machine(torch.device("cpu")))
    report = json.loads((tmp_path / folder / "experts-float32.json").read_text())
    assert [point["point"] for point in report["points"]] == ["tiny", "skewed"]
    for point in report["points"]:
        ours, bound = point["seconds"]["moe_ext"], point["seconds"]["bound"]
        assert set(point["ratio"]) == {"eager", "batched_mm", "grouped_mm"}
        assert set(point["seconds"]) == {"moe_ext", "bound", *point["ratio"]}
        assert all(error < 1e-5 for error in point["relative_error"].values())
        assert point["of_bound"] == pytest.approx(bound / ours, rel=1e-3)
    assert "| ms | of bound | eager | batched_mm | grouped_mm |" in capfd.readouterr().out


def test_memory_is_at_least_the_weights_gradients(bench):
    point = bench.Point(512, 256, 256, 8, 2)
    args = point, torch.float32, True, "moe_ext"
    weights = 3 * 8 * 256 * 256 * 4
    assert weights < bench.memory.in_new_process(bench.growth, *args) < 10 * weights


def test_peers_that_are_left_out_are_named(bench, tiny, monkeypatch):
    monkeypatch.setattr(bench, "MOST_BYTES", 1000)
    result = bench.measure(tiny, torch.float32, 1, 0.0, of_experts=True)
    assert result["excluded"] == {"batched_mm": "needs 0 GiB"}
    assert "batched_mm" not in result["seconds"]
    result = bench.measure(tiny, torch.float32, 1, 0.0, longest=0.0, of_experts=True)
    assert result["excluded"]["eager"].startswith("took")
    assert set(result["seconds"]) == {"moe_ext", "bound"}
