"""moe_ext.deepspeed in DeepSpeed's engine trains, saves and loads as deepspeed.moe does."""

import importlib
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
    expert,
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


def assert_resumes(
    rank: int, before: str, after: str, run: Run, folder: Path, make: type[Model] = Model
) -> None:
    """A training that resumes from a checkpoint is as one that continues."""
    first = engine_of(rank, before, run, make=make)
    saved = trained(first, rank, range(HALF))
    assert first.save_checkpoint(folder)
    second = engine_of(rank, after, run, make=make, seed=1)
    path, _ = second.load_checkpoint(folder)
    assert path is not None
    loaded = weights_of(second)
    assert saved.weights.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], w) for name, w in saved.weights.items())
    rest = range(HALF, 2 * HALF)
    continued, resumed = trained(first, rank, rest), trained(second, rank, rest)
    assert_alike(resumed, continued, run.dtype)
    assert any(not torch.equal(continued.weights[name], w) for name, w in saved.weights.items())
    assert saved.losses[-1] < saved.losses[0]


CHECKPOINTS = [
    (ranks, Run(ep_size, stage, dtype, drops=dtype == "bf16"))
    for ranks, ep_size in ((1, 1), (2, 1), (2, 2))
    for stage, dtype in ((0, "fp32"), (1, "fp32"), (2, "fp32"), (1, "bf16"))
]


@pytest.mark.parametrize(("ranks", "run"), CHECKPOINTS, ids=str)
@pytest.mark.parametrize(
    ("before", "after"),
    [(OURS, THEIRS), (THEIRS, OURS), (OURS, OURS)],
    ids=["ours to theirs", "theirs to ours", "ours to ours"],
)
@on_ranks(lambda ranks, **_: ranks)
def test_either_package_resumes_from_a_checkpoint(rank, before, after, ranks, run, tmp_path):
    assert_resumes(rank, before, after, run, tmp_path)
    assert len(list(tmp_path.glob("*/layer_*_expert_*"))) == 4 + 2 + 8


def _call(rank: int, method: str, package: str, folder: str) -> None:
    getattr(engine_of(rank, package, Run(2)), method)(folder)


@pytest.mark.parametrize("package", [OURS, THEIRS])
def test_a_missing_expert_file_is_named(package, tmp_path):
    on_processes(2, _call, "save_checkpoint", package, str(tmp_path))
    name = "layer_0_expert_3_mp_rank_00_model_states.pt"
    next(tmp_path.glob(f"*/{name}")).unlink()
    with pytest.raises(RuntimeError, match=f"FileNotFoundError.*{name}"):
        on_processes(2, _call, "load_checkpoint", package, str(tmp_path))


@pytest.mark.parametrize(("ranks", "run"), GROUPED, ids=str)
@on_ranks(lambda ranks, **_: ranks)
def test_checkpoints_hold_grouped_experts_one_by_one(rank, ranks, run, tmp_path):
    assert_resumes(rank, OURS, OURS, run, tmp_path, Grouped)
    name = "layer_2_expert_7_mp_rank_00_model_states.pt"
    one = torch.load(next(tmp_path.glob(f"*/{name}")), weights_only=True)
    place = "layers.2.deepspeed_moe.experts.deepspeed_experts.7"
    assert {key: list(w.shape) for key, w in one.items()} == {
        f"{place}.up_proj.weight": [2 * H, H],
        f"{place}.up_proj.bias": [2 * H],
        f"{place}.down_proj.weight": [H, 2 * H],
        f"{place}.down_proj.bias": [H],
    }


class OwnExperts(moe_ext.Experts):
    def __init__(self, *args) -> None:
        super().__init__(4)
        self.scale = nn.Parameter(torch.ones(4, H))

    def forward(self, rows: Tensor, plan) -> Tensor:
        return rows * self.scale.mean(0)


@on_ranks(1)
def test_checkpoints_of_other_stacked_experts_are_not_written(rank, tmp_path):
    """docs/troubleshooting.md has this text."""

    def make(*args) -> nn.Module:
        model = nn.Sequential(importlib.import_module(f"{OURS}.layer").MoE(H, expert(), 4))
        model[0].deepspeed_moe.experts = OwnExperts()
        return model

    engine = engine_of(rank, OURS, Run(), make=make)
    with pytest.raises(TypeError, match=r"int\(\) argument must be .*, not 'NoneType'"):
        engine.save_checkpoint(tmp_path)


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
