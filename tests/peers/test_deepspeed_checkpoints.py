"""The engine's checkpoints of one package load into the other."""

import importlib
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
    Run,
    assert_alike,
    engine_of,
    expert,
    trained,
    weights_of,
)
from processes import on_processes, on_ranks
from torch import Tensor, nn

import moe_ext


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
