"""moe_ext.deepspeed in DeepSpeed's engine trains as deepspeed.moe does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engines import (
    GROUPED,
    HALF,
    OURS,
    THEIRS,
    Grouped,
    H,
    Model,
    Result,
    Run,
    assert_alike,
    deepspeed_on,
    engine_of,
    results,
    trained,
    weights_of,
)
from processes import on_processes, on_ranks
from torch import Tensor, nn

import moe_ext

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_moe.py"


RUNS = [
    (ranks, Run(ep_size, stage, dtype, drops=dtype == "bf16"))
    for ranks, ep_size in ((1, 1), (2, 1), (2, 2))
    for stage in (0, 1, 2)
    for dtype in ("fp32", "bf16")
]


@pytest.mark.parametrize(("ranks", "run"), RUNS, ids=str)
def test_training_is_deepspeeds(ranks, run):
    """Losses, expert counts and weights are equal, with clipping and accumulation."""
    for mine, wanted in zip(results(ranks, OURS, run), results(ranks, THEIRS, run), strict=True):
        assert_alike(mine, wanted, run.dtype)
        assert wanted.losses[-1] < wanted.losses[0]


@pytest.mark.parametrize("ep_size", [1, 2])
def test_training_without_dropping_is_deepspeeds_but_for_rounding(ep_size):
    run = Run(ep_size, 1, "bf16")
    for mine, wanted in zip(results(2, OURS, run), results(2, THEIRS, run), strict=True):
        assert_alike(mine._replace(counts=wanted.counts), wanted, run.dtype)
        counts = torch.tensor([*map(sum, mine.counts)])
        assert torch.equal(counts, torch.tensor([*map(sum, wanted.counts)]))


@pytest.mark.parametrize("stage", [0, 1])
def test_optimizer_groups_of_either_package(stage):
    run = Run(2, stage)
    ours = [results(2, OURS, run._replace(splitter=name)) for name in (None, THEIRS, OURS)]
    for rank, wanted in enumerate(results(2, THEIRS, run._replace(splitter=THEIRS))):
        for mine in ours:
            assert_alike(mine[rank], wanted, run.dtype)


class WithoutMoE(nn.Module):
    """moe_ext's own layer: the engine treats its parameters like all others."""

    def __init__(self, *args) -> None:
        super().__init__()
        gate = moe_ext.TopKGate(H, 4, 2, drop_tokens=False, top2_2nd_expert_sampling=False)
        self.first = nn.Linear(H, H)
        self.layer = moe_ext.MOELayer(gate, moe_ext.GroupedExperts(4, H, H))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        out = self.layer(self.first(x))
        return out, self.layer.l_aux, [self.layer.exp_counts]


def test_the_engine_trains_a_layer_with_grouped_experts():
    found = [results(1, OURS, Run(stage=stage), WithoutMoE)[0] for stage in (0, 1, 2)]
    assert found[0].losses[-1] < found[0].losses[0]
    assert found[0].losses == found[1].losses == found[2].losses


@on_ranks(1)
def test_the_engine_times_the_layers(rank):
    engine = engine_of(rank, OURS, Run(), wall_clock_breakdown=True, steps_per_print=1)
    trained(engine, rank, range(4))
    for modules in (engine.gate_modules, engine.moe_layers):
        assert [type(module).__module__ for module in modules] == [f"{OURS}.sharded_moe"] * 3
    assert min(layer.time_moe for layer in engine.moe_layers) > 0
    assert min(gate.gate_time for gate in engine.gate_modules) > 0


def _divided_before(
    rank: int, run: Run, make: type[Model] = Model, groups_are_given: bool = False
) -> Result:
    """set_deepspeed_parallelism is called before deepspeed.initialize, which calls it too."""

    def divided(*args) -> nn.Module:
        model = make(*args)
        groups = moe_ext.parallel.make_groups(2) if groups_are_given else None
        for layer in model.layers:
            layer.set_deepspeed_parallelism(groups=groups)
        return model

    deepspeed_on(rank)
    return trained(engine_of(rank, OURS, run, make=divided), rank, range(HALF))


SPLIT = [(Run(size, 1, splitter=name), Grouped) for size in (1, 2) for name in (OURS, THEIRS)]


@pytest.mark.parametrize("args", [(Run(2),), *SPLIT], ids=str)
def test_groups_made_before_the_engine_are_the_engines(args):
    """Process groups, and optimizer groups of grouped experts too."""
    run, *make = args
    wanted = results(2, OURS, run._replace(splitter=None), *make)
    for a, b in zip(on_processes(2, _divided_before, *args), wanted, strict=True):
        assert a.losses == b.losses[:HALF]


def test_groups_given_before_the_engine_are_refused():
    with pytest.raises(RuntimeError, match=r"build the model anew and leave out the call before"):
        on_processes(2, _divided_before, Run(2), Model, True)


@on_ranks(2)
def test_a_model_may_have_a_second_engine(rank):
    """DeepSpeed's own layer refuses it: "Attempting to override an existing ep_group"."""
    first = engine_of(rank, OURS, Run(2))
    trained(first, rank, range(2))
    weights = weights_of(first)

    def same_weights(*args) -> nn.Module:
        model = Model(*args)
        for layer in model.layers:
            layer.set_deepspeed_parallelism()
        model.load_state_dict(weights)
        return model

    makers = (same_weights, lambda *args: first.module)
    fresh, again = (
        trained(engine_of(rank, OURS, Run(2), make=make), rank, range(HALF)) for make in makers
    )
    assert again.losses == fresh.losses


@pytest.mark.parametrize(("ranks", "run"), GROUPED, ids=str)
def test_grouped_experts_train_as_modules_do(ranks, run):
    ours = results(ranks, OURS, run, Grouped)
    for mine, wanted in zip(ours, results(ranks, OURS, run), strict=True):
        for a, b in zip(mine.losses, wanted.losses, strict=True):
            assert abs(a - b) < 1e-5
        assert mine.counts == wanted.counts


def printed(script: Path, launcher: tuple[str, ...], options: str) -> Tensor:
    """The loss and l_aux of every line that the script prints."""
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *options.split()],
        capture_output=True,
        text=True,
        timeout=300,
        # DeepSpeed compiles its gate, which is slow.
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pairs = re.findall(r"loss (\d+\.\d+), l_aux (\d+\.\d+)", done.stdout)
    return torch.tensor([[float(x) for x in pair] for pair in pairs])


TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"


@pytest.mark.parametrize(
    ("launcher", "options", "lines"),
    [((), "--steps 41", 5), (TORCHRUN, "--engine --zero 1 --ep-size 2 --steps 21", 3)],
)
def test_the_example_trains_alike_with_either_import(launcher, options, lines, tmp_path):
    original, text = tmp_path / "train_moe.py", EXAMPLE.read_text()
    original.write_text(text.replace("from moe_ext.deepspeed.", "from deepspeed.moe."))
    changed = [line for line in original.read_text().splitlines() if line not in text.splitlines()]
    assert [line.split()[1] for line in changed] == ["deepspeed.moe.layer", "deepspeed.moe.utils"]
    theirs, ours = (printed(script, launcher, options) for script in (original, EXAMPLE))
    assert len(theirs) == lines
    assert torch.allclose(ours, theirs, rtol=0, atol=2e-3)
    assert theirs[-1, 0] < 0.8 * theirs[0, 0]
