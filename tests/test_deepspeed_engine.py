"""moe_ext.deepspeed in DeepSpeed's engine: one program, run with the imports of either package."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import importlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from processes import on_processes
from torch import Tensor, nn

pytest.importorskip("deepspeed", reason="needs the extra peers")


import moe_ext

THEIRS, OURS = "deepspeed.moe", "moe_ext.deepspeed"
EXAMPLE = Path(__file__).parent.parent / "examples" / "train_moe.py"
H, TOKENS, MICRO_STEPS = 16, 48, 20


class Run(NamedTuple):
    """How an engine is configured.

    splitter: the package whose function makes optimizer groups; None, where the engine does
    drops: whether the third layer drops tokens. Where it does not and ranks share experts, these
        get another number of rows than DeepSpeed pads them to, so that 16-bit outputs are rounded
        otherwise.
    """

    ep_size: int = 1
    stage: int = 0
    dtype: str = "fp32"
    drops: bool = False
    splitter: str | None = None


class Result(NamedTuple):
    losses: list[float]
    counts: list[list[int]]
    weights: dict[str, Tensor]


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(H, 2 * H), nn.GELU(), nn.Linear(2 * H, H))


class Model(nn.Module):
    """Three MoE layers of different numbers of experts, the first a residual one."""

    def __init__(self, package: str, ep_size: int, drops: bool) -> None:
        super().__init__()
        MoE = importlib.import_module(f"{package}.layer").MoE
        self.first = nn.Linear(H, H)
        self.layers = nn.ModuleList(
            [
                MoE(H, expert(), 4, ep_size, k=1, use_residual=True, min_capacity=0),
                MoE(H, expert(), 2, ep_size, k=2, capacity_factor=0.7),
                MoE(H, expert(), 8, ep_size, k=4, drop_tokens=drops),
            ]
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        hidden, l_aux, counts = self.first(x), 0.0, []
        for layer in self.layers:
            out, layer_loss, layer_counts = layer(hidden)
            hidden, l_aux = hidden + out, l_aux + layer_loss
            counts.append(layer_counts)
        return hidden, l_aux, counts


def config_of(run: Run) -> dict:
    return {
        "train_micro_batch_size_per_gpu": TOKENS,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 3e-3}},
        "zero_optimization": {"stage": run.stage},
        **({"bf16": {"enabled": True}} if run.dtype == "bf16" else {}),
    }


def engine_of(rank: int, package: str, run: Run, *, make=Model, **config):
    import deepspeed

    # What the backend compiles is for speed.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    os.environ["LOCAL_RANK"] = str(rank)
    torch.manual_seed(0)
    model = make(package, run.ep_size, run.drops)
    parameters = list(model.parameters())
    if run.splitter is not None:
        utils = importlib.import_module(f"{run.splitter}.utils")
        parameters = utils.split_params_into_different_moe_groups_for_optimizer(
            {"params": parameters, "name": "all"}
        )
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameters, config=config_of(run) | config
    )
    return engine


def trained(engine, rank: int, steps: range = range(MICRO_STEPS)) -> Result:
    losses, counts = [], []
    dtype = next(engine.module.parameters()).dtype
    for step in steps:
        draws = torch.Generator().manual_seed(1000 * step + rank)
        x = torch.randn(TOKENS, H, generator=draws)
        torch.manual_seed(step)
        out, l_aux, counts_of_layers = engine(x.to(dtype))
        loss = (out.float() - x.roll(1, -1)).square().mean() + 0.01 * l_aux
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        counts += [count.tolist() for count in counts_of_layers]
    weights = {name: w.detach().clone() for name, w in engine.module.state_dict().items()}
    return Result(losses, counts, weights)


def _train(rank: int, package: str, run: Run) -> Result:
    return trained(engine_of(rank, package, run), rank)


def assert_alike(ours: Result, theirs: Result, dtype: str) -> None:
    eps = torch.finfo(torch.bfloat16).eps
    for a, b in zip(ours.losses, theirs.losses, strict=True):
        assert abs(a - b) <= (1e-6 if dtype == "fp32" else eps * abs(b))
    assert ours.counts == theirs.counts
    assert ours.weights.keys() == theirs.weights.keys()
    for name, theirs_ in theirs.weights.items():
        assert ours.weights[name].dtype == theirs_.dtype
        error = (ours.weights[name] - theirs_).double().norm() / theirs_.double().norm()
        # A step of Adam has the size of the learning rate, however small the gradient.
        assert error <= (1e-5 if dtype == "fp32" else 2 * eps), name


RUNS = [
    (ranks, Run(ep_size, stage, dtype, drops=ep_size > 1 and dtype == "bf16"))
    for ranks, ep_size in ((1, 1), (2, 1), (2, 2))
    for stage in (0, 1, 2)
    for dtype in ("fp32", "bf16")
]


@pytest.mark.parametrize(("ranks", "run"), RUNS, ids=str)
def test_training_is_deepspeeds(ranks, run):
    """Losses, expert counts and weights, with clipping and accumulation."""
    theirs, ours = (on_processes(ranks, _train, package, run) for package in (THEIRS, OURS))
    for mine, wanted in zip(ours, theirs, strict=True):
        assert_alike(mine, wanted, run.dtype)
        assert wanted.losses[-1] < wanted.losses[0]


def test_training_without_dropping_is_deepspeeds_but_for_rounding():
    run = Run(2, 1, "bf16")
    theirs, ours = (on_processes(2, _train, package, run) for package in (THEIRS, OURS))
    for mine, wanted in zip(ours, theirs, strict=True):
        assert_alike(mine._replace(counts=wanted.counts), wanted, run.dtype)
        counts = torch.tensor([*map(sum, mine.counts)])
        assert torch.equal(counts, torch.tensor([*map(sum, wanted.counts)]))


@pytest.mark.parametrize("stage", [0, 1])
def test_optimizer_groups_of_either_package(stage):
    run = Run(2, stage)
    ours = [
        on_processes(2, _train, OURS, run._replace(splitter=splitter))
        for splitter in (None, THEIRS, OURS)
    ]
    for rank, wanted in enumerate(on_processes(2, _train, THEIRS, run._replace(splitter=THEIRS))):
        for mine in ours:
            assert_alike(mine[rank], wanted, run.dtype)


class WithoutMoE(nn.Module):
    """moe_ext's own layer, whose parameters are like all others to the engine."""

    def __init__(self, *args) -> None:
        super().__init__()
        gate = moe_ext.TopKGate(H, 4, 2, drop_tokens=False, top2_2nd_expert_sampling=False)
        self.first = nn.Linear(H, H)
        self.layer = moe_ext.MOELayer(gate, moe_ext.GroupedExperts(4, H, H))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        out = self.layer(self.first(x))
        return out, self.layer.l_aux, [self.layer.exp_counts]


def _train_without_moe(rank: int, stage: int) -> Result:
    return trained(engine_of(rank, OURS, Run(stage=stage), make=WithoutMoE), rank)


def test_the_engine_trains_a_layer_with_grouped_experts():
    found = [on_processes(1, _train_without_moe, stage)[0] for stage in (0, 1, 2)]
    assert found[0].losses[-1] < found[0].losses[0]
    assert found[0].losses == found[1].losses == found[2].losses
