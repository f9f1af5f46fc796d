"""The demo on a small setting: its claim, its files, its arguments."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from scripts import output_of

pytest.importorskip("matplotlib", reason="the extra `demo` is not installed")
pytest.importorskip("tqdm", reason="the extra `demo` is not installed")

from moe_ext.__main__ import main
from moe_ext.cli import demo

SMALL = replace(demo.Config(), width=32, ffn=16, batch=8, steps=6, eval_every=3, eval_windows=16)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def corpus():
    return demo.load_corpus()


def test_no_file_is_in_both_parts(corpus):
    halves = demo.load_corpus(holdout=2)
    assert abs(halves.train_files - halves.heldout_files) <= 1
    files = corpus.train_files + corpus.heldout_files
    assert corpus.heldout_files == pytest.approx(files / SMALL.holdout, abs=1)
    assert corpus.train_files > 100


def test_models_have_the_same_active_parameters():
    config = demo.Config()
    moe, dense = (demo.make_model(config, is_moe) for is_moe in (True, False))
    assert demo.active_parameters(moe) == demo.active_parameters(dense)
    assert len(demo.moe_layers(moe)) == config.layers
    assert config.experts >= 8
    assert config.k == 2


def test_experts_lower_the_loss_at_equal_active_parameters(corpus):
    """The demo's claim, on models that are trained in seconds."""
    config = replace(
        demo.Config(),
        **{"layers": 1, "width": 64, "ffn": 64, "context": 16, "learning_rate": 8e-3},
        **{"steps": 400, "eval_every": 400, "eval_windows": 1024},
    )
    trainers = [
        demo.Trainer(name, corpus, config, torch.device("cpu")) for name in ("moe", "dense")
    ]
    moe, dense = (
        demo.train(name, trainer) for name, trainer in zip(("moe", "dense"), trainers, strict=True)
    )
    assert moe["active_parameters"] == dense["active_parameters"]
    assert moe["bits_per_byte_after"] < dense["bits_per_byte_after"]
    # Experts in 8 and 4 bits hardly change the loss of the trained model.
    most = {"int8": 0.005, "int4": 0.05, "mxfp4": 0.05, "nf4": 0.05}
    frozen = trainers[0].score_frozen()
    assert frozen.keys() == most.keys()
    added = {format: bits - moe["bits_per_byte_after"] for format, bits in frozen.items()}
    assert all(0 < abs(added[format]) < bound for format, bound in most.items())


def test_the_report_says_which_model_is_better():
    figures = {"bits_per_byte_before": 8.0, "tokens_per_second": 1.0}
    figures |= {"active_parameters": 1, "parameters": 2}
    models = {
        name: {**figures, "bits_per_byte_after": bits}
        for name, bits in (("moe", 2.5), ("dense", 2.65))
    }
    steps = demo.Config.steps
    results = {"models": models, "config": {"steps": steps}, "seconds": 41.7}
    said = demo.report(results)
    assert "the MoE model needs 0.150 bits per byte fewer than the dense model" in said
    assert "too few" not in said
    assert said.endswith("elapsed: 42 s")
    models["moe"]["bits_per_byte_frozen"] = {"int8": 2.501, "int4": 2.48}
    assert "8 and 4 bits add: int8 +0.0010, int4 -0.0200\n" in demo.report(results)
    models["moe"]["bits_per_byte_after"] = 2.7
    said = demo.report(results | {"config": {"steps": steps // 5}})
    assert "0.050 bits per byte more than" in said
    assert f"{steps // 5} steps are too few to compare the two; the default is {steps}" in said


def test_equal_seeds_give_equal_results_and_files(tmp_path, capsys):
    notes = tmp_path / "a" / "notes.txt"
    notes.parent.mkdir()
    notes.touch()
    os.utime(notes, (0, 0))
    first = demo.run(SMALL, out=tmp_path / "a")
    second = demo.run(SMALL, out=tmp_path / "b")
    printed = capsys.readouterr().out
    assert "held-out bits per byte" in printed
    assert printed.count("result.json, sorted.png, stats.jsonl to") == 2
    assert "notes.txt" not in printed  # only files of this run are listed
    assert "bits per byte fewer than" in printed or "bits per byte more than" in printed
    assert len(re.findall(r"^elapsed: \d+ s$", printed, re.MULTILINE)) == 2
    assert printed.count("idle or scarce experts") == 4  # of training and held out, twice
    assert f"moe: step {SMALL.steps} of {SMALL.steps}, held-out" in printed
    for name in ("loss.png", "load.png"):
        assert (tmp_path / "a" / name).read_bytes().startswith(PNG)
    stored = json.loads((tmp_path / "a" / "result.json").read_text())
    for model in ("moe", "dense"):
        a, b = first["models"][model], second["models"][model]
        assert a["curve"] == b["curve"]
        assert a["bits_per_byte_before"] > 7
        assert a["bits_per_byte_after"] < a["bits_per_byte_before"]
        assert stored["models"][model]["bits_per_byte_after"] == a["bits_per_byte_after"]
    load = torch.tensor(first["models"]["moe"]["load"])
    assert load.shape == (SMALL.layers, SMALL.experts)
    torch.testing.assert_close(load.sum(-1), torch.ones(SMALL.layers))
    assert stored["seconds"] > sum(model["seconds"] for model in stored["models"].values())


def test_two_processes_reach_the_loss_of_one(tmp_path, capsys):
    one = demo.run(replace(demo.Config(), steps=10), out=tmp_path)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    printed = output_of(*torchrun, "-m", "moe_ext", "demo", "--steps", "10", "--out", tmp_path)
    for said in (capsys.readouterr().out, printed):
        assert said.count("held-out bits per byte") == 1
    two = json.loads((tmp_path / "result.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    for model in ("moe", "dense"):
        a, b = one["models"][model], two["models"][model]
        assert a["parameters"] == b["parameters"]
        assert a["active_parameters"] == b["active_parameters"]
        assert b["bits_per_byte_before"] == pytest.approx(a["bits_per_byte_before"], abs=0.01)
        # The balance loss differs: each process has that of its own tokens.
        assert b["bits_per_byte_after"] == pytest.approx(a["bits_per_byte_after"], rel=0.02)
        assert b["bits_per_byte_after"] < 0.7 * b["bits_per_byte_before"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--device", "nonsense"), "must be cpu, cuda or cuda:N, got nonsense"),
        (("--device", "meta"), "must be cpu, cuda or cuda:N, got meta"),
        (("--seed", str(2**63)), "must be in 0..2**63 - 1"),
        (("--steps", "0"), "must be at least 1, got 0"),
        (("--out", __file__), "moe_ext demo: [Errno 17] File exists"),
    ],
)
def test_wrong_arguments_end_in_one_line(option, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moe_ext", "demo", "--out", str(tmp_path), *option])
    with pytest.raises(SystemExit, match=r"^2$"):
        sys.exit(main())
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_what_was_written(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_ext", "demo", "--steps", "100000", "--out", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        # A shell tells its background jobs to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 300
    result = tmp_path / "result.json"
    while not (result.exists() and "bits_per_byte_after" in result.read_text()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted; the results so far are in" in errors
    assert len(json.loads(result.read_text())["models"]["moe"]["curve"]) >= 2
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
    assert not list(tmp_path.glob("*.part"))
