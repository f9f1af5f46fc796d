"""Each example runs on small settings, prints the results that it promises, and learns."""

import re
import runpy
import sys

import pytest
from scripts import ROOT, output_of

from moe_ext.monitor.sinks import read_json_lines

EXAMPLES = ROOT / "examples"
# One process on a GPU and two on the CPU, which torchrun gives one thread, would not be alike.
# Port 0 is any that is free.
ALONE = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(name: str, *arguments, launcher: tuple[str, ...] = ()) -> str:
    return output_of(*launcher, EXAMPLES / name, *arguments, **ALONE)


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_own_gate():
    said = run("own_gate.py", "--steps", 150)
    first, last = numbers(r"step \d+: loss ([\d.]+)", said)
    assert last < 0.5 * first
    (routes,) = numbers(r"([\d.]+) experts per token", said)
    assert 1 <= routes < 2


def test_watch_experts(tmp_path):
    said = run("watch_experts.py", "--steps", 150, "--out", tmp_path)
    idle = {}
    for balance in ("none", "loss", "bias"):
        readings = list(read_json_lines(tmp_path / f"{balance}.jsonl"))
        assert [step for step, _ in readings] == [50, 100, 150]
        (layer,) = readings[-1][1].train.values()
        idle[balance] = len(layer.scarce)
    assert idle["none"] >= 4
    assert max(idle["loss"], idle["bias"]) <= 1
    assert said.count("a bar for an expert") == 9
    # The example's message is the cost of idle experts.
    none, loss, bias = numbers(r"(?m)^(?:none|loss|bias) +([\d.]+)$", said)
    assert none > 1.2 * max(loss, bias)


def test_fsdp2_and_experts_on_two_processes():
    one = run("fsdp2_ep.py", "--steps", 30)
    two = run("fsdp2_ep.py", "--steps", 30, launcher=TORCHRUN)
    assert ("1 rank\n" in one, "2 ranks\n" in two) == (True, True)
    losses = [numbers(r"step \d+: loss ([\d.]+)", said) for said in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)
    assert losses[0][1] < losses[0][0]
    # The load counts the tokens of both ranks.
    tables = [numbers(r"\d+\.\d+", said[said.index(" rank") :]) for said in (one, two)]
    assert tables[1] == pytest.approx(tables[0], abs=0.02)


def test_train_moe():
    said = run("train_moe.py", "--steps", 21)
    losses = numbers(r"step \d+: loss ([\d.]+)", said)
    assert 5 < losses[0] < 6.5  # a uniform guess of 256 bytes has 5.5
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("own_gate.py --steps 0", "--steps must be at least 1, got 0"),
        ("watch_experts.py --steps 0", "--steps must be at least 1, got 0"),
        ("fsdp2_ep.py --steps -1", "--steps must be at least 1, got -1"),
        ("train_moe.py --steps 0", "--steps and --ep-size must be at least 1"),
        ("train_moe.py --zero 1", "--zero and --ep-size need --engine"),
        ("finetune_mixtral.py --steps 1", "--steps must be at least 2"),
        ("finetune_mixtral.py --length 0", "--batch and --length must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message, monkeypatch, capsys):
    name, *arguments = arguments.split()
    if name == "finetune_mixtral.py":
        pytest.importorskip("transformers", reason="needs the extra peers")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit, match=r"^2$"):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert message in capsys.readouterr().err


def test_quantise_model(tmp_path):
    pytest.importorskip("transformers", reason="needs the extra peers")
    said = run("quantise_model.py", "--steps", 60, "--tokens", 12, "--out", tmp_path)
    whole, packed = numbers(r"experts ([\d.]+) MB", said)
    assert packed < 0.145 * whole  # of float32's
    before, after = numbers(r"loss ([\d.]+)", said)
    assert before < 4
    assert abs(after - before) < 0.02
    assert said.count("def __init__(self, name, ") == 2
    assert "model.layers.1.mlp.experts" in said
    assert (tmp_path / "int4" / "model.safetensors").exists()
