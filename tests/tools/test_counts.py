"""Counts and a model without a GPU, and how the results of one are shown."""

import importlib
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import bench_gpu
import bench_ops
import bench_products
import bench_quantised
import pytest
import report
import sass
import torch


@pytest.fixture
def ptxas(monkeypatch):
    """The module, which puts moe_ext/ on the path: other tests must not find its deepspeed/."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    return importlib.import_module("ptxas")


@pytest.fixture
def model(ptxas):
    return importlib.import_module("model")


@pytest.mark.parametrize(
    ("kernel", "moves"),
    [
        ("dispatch_kernel<float, 4, true>", True),
        ("dispatch_kernel<float, 1, true>", False),
        ("combine_kernel<__half, 1>", False),
        ("gate_kernel<float, 8>", True),
        ("mask_weights_kernel<float>", False),
        ("keep_kernel(float const*)", False),
    ],
)
def test_kernels_of_rows_must_move_vectors(ptxas, kernel, moves):
    assert ptxas.moves_vectors(kernel) is moves


def test_the_model_says_what_binds(model):
    card = model.CARDS["H100"]
    kernel = {"registers": 64, "threads": 256, "loop_loads": 4}
    half_a_second = card.bandwidth * 0.45
    time, limit = model.seconds(card, kernel, half_a_second, 0)
    assert limit == "memory"
    assert time == pytest.approx(0.5 + model.START)
    time, limit = model.seconds(card, kernel, 0, 4 * card.multiprocessors * card.clock)
    assert (limit, time) == ("issue", pytest.approx(1 + model.START))
    time, limit = model.seconds(card, kernel | {"loop_loads": 1, "registers": 255}, 1e9, 0)
    assert limit == "latency"
    assert model.seconds(card, kernel, 0, 0) == (model.START + 3 * model.READ, "start")


def test_the_page_shows_the_model_and_calls_it_one(model):
    page = model.PAGE.read_text()
    assert model.filled(page) == page
    head, _, *rows = model.table().splitlines()
    assert "not measured" in head
    assert len(rows) == len(model.SHAPES) * len(model.KERNELS)
    assert all(row.startswith("| model, ") for row in rows)


SASS = """
	.section	.text.f,"ax",@progbits
.text.f:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   FADD R4, R4, R5 ;
.L_x_2:
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3);
        /*0080*/                   NOP;
"""


def test_instructions_of_the_main_loop():
    counts = sass.counts(SASS.splitlines()[3:])
    assert counts == {
        "instructions": 7,
        "loop_instructions": 5,
        "loop_vectors": 2,
        "loop_loads": 1,
        "hmma_share": 0.0,
    }


def test_a_loop_with_two_entries_has_no_count():
    lines = SASS.replace("LDC R1, c[0x0][0x28] ;", "@P2 BRA `(.L_x_2) ;").splitlines()[3:]
    assert sass.counts(lines)["loop_instructions"] is None


def test_the_model_is_of_the_shapes_that_are_timed(model):
    for shape in model.SHAPES:
        real = bench_ops.SHAPES[shape.name]
        assert shape.tokens == real.tokens
        assert f"K{real.top_k} " in shape.rows
        # swiglu of rows as wide as the model.
        assert f"H{real.hidden} F{real.hidden // 2} " in shape.rows
        assert shape.routing.endswith(f"K{real.top_k} E{real.num_experts}")


def test_blocks_on_a_multiprocessor(ptxas):
    assert ptxas.blocks_per_sm("sm_90", 32, 256) == 8
    assert ptxas.blocks_per_sm("sm_90", 64, 256) == 4
    assert ptxas.blocks_per_sm("sm_90", 65, 256) == 3  # 72 a thread, 7 warps in each of four parts
    assert ptxas.blocks_per_sm("sm_75", 32, 256) == 4
    assert ptxas.blocks_per_sm("sm_120", 32, 32) == 24


def test_a_changed_count_is_named(ptxas):
    old = {"sm_90": {"f": {"registers": 32, "instructions": 7}, "g": {}}}
    assert ptxas.differences(old, old) == []
    new = {"sm_90": {"f": {"registers": 32, "instructions": 8}}, "sm_100": {"f": {}}}
    assert ptxas.differences(old, new) == [
        *("sm_100 f: new", "sm_90 f: instructions 7 -> 8", "sm_90 g: gone"),
    ]


def test_the_digest_is_of_the_code(ptxas):
    parts = {"nvcc": "13.0", "a.cu": "int a;  // one\n"}
    assert ptxas.digest(parts | {"a.cu": "// another\nint\n  a;"}) == ptxas.digest(parts)
    for other in ({"nvcc": "13.1"}, {"a.cu": "int b;"}, {"b.cu": ""}):
        assert ptxas.digest(parts | other) != ptxas.digest(parts)


EMULATOR = ("cusim.h", "tensor.h")


def test_all_that_a_kernel_includes_decides(ptxas, monkeypatch):
    monkeypatch.setattr(ptxas.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=""))
    found = SimpleNamespace(root=Path("cuda"), version=(13, 0))
    parts = ptxas.what_decides(found)
    assert {name for name in ptxas.toolkit.cuda_sources() if name.endswith(".cu")} < parts.keys()
    for name in [name for name in parts if name.startswith("csrc/cuda/")]:
        for header in re.findall(r'#include "(.*)"', parts[name]):
            path = os.path.normpath(f"{name}/../{header}")
            assert path in parts or header in EMULATOR, name


@pytest.mark.parametrize(
    ("sources", "flags", "architectures"),
    [("same", [], "9.0"), ("other", [], "8.0;9.0"), ("same", ["--all"], "8.0;9.0")],
)
def test_unchanged_kernels_are_built_for_one_architecture(
    ptxas, monkeypatch, tmp_path, sources, flags, architectures
):
    record = {arch: {"f": {"registers": 8}} for arch in ("sm_80", "sm_90")}
    built = []

    def resources(wanted: str) -> dict:
        built.append(wanted)
        return {"sm_90": record["sm_90"]} if wanted == ptxas.ALWAYS else record

    found = SimpleNamespace(root=tmp_path, version=(13, 0))
    for name, value in {
        "RESULT": tmp_path / "ptxas.json",
        "committed": lambda: {"cuda": "13.0", "sources": "same", "kernels": record},
        "what_decides": lambda _: {},
        "digest": lambda _: sources,
        "compile_kernels": lambda _, wanted: wanted,
        "resources": resources,
        "add_instructions": lambda *_: None,
        "faults": lambda kernels, _: [] if kernels == record else ["lost"],
    }.items():
        monkeypatch.setattr(ptxas, name, value)
    monkeypatch.setattr(ptxas.toolkit, "find_toolkit", lambda: found)
    monkeypatch.setattr(ptxas.toolkit, "architectures", lambda _: "8.0;9.0")
    monkeypatch.setattr(sys, "argv", ["ptxas.py", *flags])
    if sources == "same":
        ptxas.main()
    else:
        with pytest.raises(SystemExit, match="another now"):
            ptxas.main()
    assert built == [architectures]
    text = (tmp_path / "ptxas.json").read_text()
    assert json.loads(text) == {"cuda": "13.0", "sources": sources, "kernels": record}


def test_pages_say_which_cards_have_results(monkeypatch, tmp_path):
    for name in ("README.md", "docs/cuda.md"):
        page = (report.ROOT / name).read_text()
        assert page.count("<!-- cards -->") == 1
        assert report.with_cards(page) == page
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for card, date in (("NVIDIA B", "2026-01-02"), ("NVIDIA A", "2026-03-04"), ("CPU", None)):
        (tmp_path / card).mkdir()
        result = {"machine": card, "cuda": date and "13.0", "date": date}
        (tmp_path / card / "ops-bfloat16.json").write_text(json.dumps(result))
    text = "they have run on NVIDIA A (2026-03-04), NVIDIA B (2026-01-02)"
    assert report.with_cards("a <!-- cards -->b<!-- end --> c") == (
        f"a <!-- cards -->{text}<!-- end --> c"
    )


def test_what_misses_its_limit_is_named():
    runs = {"a": {"of_products": 0.9}, "b": {"of_products": 0.5}}
    lines = [{"op": "dispatch", "of_copy": 0.7}, {"op": "plan", "of_copy": 0.1}]
    assert bench_gpu.missed(runs, {"shapes": [{"shape": "x", "ops": lines}]}) == [
        "b: the layer reaches 50% of its products, not 80%",
        "x: dispatch reaches 70% of a copy, not 80%",
    ]


def test_a_layer_is_timed_beside_its_products():
    shape = bench_gpu.Point(64, 128, 64, 4, 2)
    run = bench_gpu.measure(shape, torch.device("cpu"), 0.01)
    assert run["calls"].keys() == {"forward", "products", "with gradient"}
    assert all(call["teraflops"] > 0 for call in run["calls"].values())
    assert "TFLOP/s" in bench_gpu.table("x", run)


def test_products_are_timed_beside_torchs_and_a_dense_one():
    shape = bench_products.SHAPES["decode"]._replace(
        tokens=16, hidden=64, ffn=32, num_experts=4, top_k=2
    )
    run = bench_products.measure(shape, torch.float32, torch.device("cpu"), 0.01)
    assert len(run["teraflops"]) == 8
    assert all(rate > 0 for rates in run["teraflops"].values() for rate in rates.values())
    assert run["missing"].keys() == {"Liger", "ScatterMoE", "SonicMoE"}
    assert "TFLOP/s" in bench_products.table("x", run)


def test_products_below_their_cards_goal_are_named():
    run = {"teraflops": {"up": {"ours": 1.4, "torch": 0.6, "dense": 2.1}}}
    assert bench_products.missed("NVIDIA A100", {"x": run}, True) == [
        "x, up: 67% of the dense rate, not 70%",
        "x, up: 2.33x torch's loop, not 2.5",
    ]
    assert bench_products.missed("NVIDIA H100", {"x": run}, False) == []


def test_quantised_experts_are_timed_beside_torchs():
    shape = bench_quantised.Shape(128, 64, 4, 2)
    results = bench_quantised.measure(shape, [1, 5], 0.02)
    assert [result["tokens"] for result in results] == [1, 5]
    of_torch = {bench_quantised.TORCH_INT8, bench_quantised.TORCH_INT4}
    assert results[0]["ratio"].keys() == {*bench_quantised.FORMATS} | of_torch
    where = {"date": "today", "machine": "CPU", "torch": "2", "threads": 1}
    table = report.quantised_table(where | {"shapes": {"x": results}})
    assert table.count("\n| x | 5 |") == len(results[0]["seconds"])
    columns = report.packed_peers_table(where | {"shapes": {"x": results}})
    assert columns.startswith("| weights, ms | x, 1 | x, 5 |")
    assert columns.count("\n| ") == len(results[0]["seconds"])
