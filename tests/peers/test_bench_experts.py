"""The bench of experts times every implementation, and names peers that are left out."""

import json
from functools import partial

import bench_layer
import common
import pytest
import torch

TINY = bench_layer.Point(9, 16, 8, 4, 2, "zipf")


def test_every_implementation_is_timed(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    points = {"tiny": TINY._replace(load="balanced"), "skewed": TINY}
    monkeypatch.setattr(bench_layer, "EXPERTS_POINTS", points)
    bench_layer.main(["--experts", "--seconds", "0"])
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


def test_memory_is_at_least_the_weights_gradients():
    point = bench_layer.Point(512, 256, 256, 8, 2)
    args = point, torch.float32, True, "moe_ext"
    weights = 3 * 8 * 256 * 256 * 4
    assert weights < bench_layer.memory.in_new_process(bench_layer.growth, *args) < 10 * weights


def test_peers_that_are_left_out_are_named(monkeypatch):
    monkeypatch.setattr(bench_layer, "MOST_BYTES", 1000)
    result = bench_layer.measure(TINY, torch.float32, 1, 0.0, of_experts=True)
    assert result["excluded"] == {"batched_mm": "needs 0 GiB"}
    assert "batched_mm" not in result["seconds"]
    result = bench_layer.measure(TINY, torch.float32, 1, 0.0, longest=0.0, of_experts=True)
    assert result["excluded"]["eager"].startswith("took")
    assert set(result["seconds"]) == {"moe_ext", "bound"}


def test_peers_without_a_column_are_printed(tmp_path, capfd):
    shape = ["--experts", "--shape", *map(str, TINY[:5]), "--seconds", "0", "--threads", "1"]
    bench_layer.main([*shape, "--longest", "1e-9", "--out", str(tmp_path / "own.json")])
    printed = capfd.readouterr().out
    for peer in ("eager", "batched_mm", "grouped_mm"):
        assert f"own, threads 1: without {peer}, which took " in printed


def test_a_layer_too_many_for_memory_is_named(monkeypatch, capfd):
    two = bench_layer.bytes_of_weights(TINY, torch.float32, 2)
    monkeypatch.setattr(bench_layer.memory, "limit", lambda: two)
    result = bench_layer.measure(TINY, torch.float32, 1, 0.0, of_experts=True)
    left_out = dict.fromkeys(("batched_mm", "grouped_mm"), "needs 0 GiB with those before it")
    assert result["excluded"] == left_out
    monkeypatch.setattr(bench_layer.memory, "limit", lambda: two // 2)
    with pytest.raises(SystemExit):
        bench_layer.main(["--experts", "--shape", "9", "16", "8", "4", "2"])
    assert "--shape needs 0 GiB of memory" in capfd.readouterr().err


def test_masks_of_what_a_gate_kept_are_counted(monkeypatch):
    monkeypatch.setattr(bench_layer, "MOST_BYTES", 4 * 4 * 9 * 4 * 5)  # C = 9 * 2 / 4, up
    measure = partial(bench_layer.measure, TINY, torch.float32, 1, 0.0)
    assert measure(capacity_factor=1.0)["excluded"] == {}
    assert measure(capacity_factor=1.2)["excluded"] == {"DeepSpeed": "needs 0 GiB"}
