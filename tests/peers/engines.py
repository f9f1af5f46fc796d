"""One training program in DeepSpeed's engine, with the imports of either package."""

import functools
import importlib
import os
from typing import NamedTuple

import torch
from processes import on_processes
from torch import Tensor, nn

import moe_ext
from moe_ext import convert

THEIRS, OURS = "deepspeed.moe", "moe_ext.deepspeed"

H, TOKENS, MICRO_STEPS, HALF = 16, 48, 40, 6


class Run(NamedTuple):
    """The configuration of an engine.

    splitter: the package whose function makes optimizer groups; None, where the engine does
    drops: whether the third layer drops tokens. Where it does not, gradients differ from
        DeepSpeed's by roundings, and with 16 bits these change a token's choice in time.
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
    """Three MoE layers with different numbers of experts; the first has a residual."""

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


def deepspeed_on(rank: int):
    """Initialise DeepSpeed on one of several ranks. Returns the package."""
    # Compilation only affects speed.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    os.environ["LOCAL_RANK"] = str(rank)
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.init_distributed("gloo")
    return deepspeed


def engine_of(rank: int, package: str, run: Run, *, make=Model, seed: int = 0, mpu=None, **config):
    deepspeed = deepspeed_on(rank)
    torch.manual_seed(seed)
    model = make(package, run.ep_size, run.drops)
    parameters = list(model.parameters())
    if run.splitter is not None:
        utils = importlib.import_module(f"{run.splitter}.utils")
        parameters = utils.split_params_into_different_moe_groups_for_optimizer(
            {"params": parameters, "name": "all"}
        )
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameters, config=config_of(run) | config, mpu=mpu
    )
    return engine


def weights_of(engine) -> dict[str, Tensor]:
    return {name: w.detach().clone() for name, w in engine.module.state_dict().items()}


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
    return Result(losses, counts, weights_of(engine))


def train(rank: int, package: str, run: Run, make=Model) -> Result:
    return trained(engine_of(rank, package, run, make=make), rank)


@functools.cache
def results(ranks: int, *args) -> list[Result]:
    """Every rank's result of `train`; equal calls train once."""
    return on_processes(ranks, train, *args)


def assert_alike(ours: Result, theirs: Result, dtype: str) -> None:
    eps = torch.finfo(torch.bfloat16).eps
    for a, b in zip(ours.losses, theirs.losses, strict=True):
        assert abs(a - b) <= (1e-6 if dtype == "fp32" else eps * abs(b))
    assert ours.counts == theirs.counts
    assert ours.weights.keys() == theirs.weights.keys()
    for name, theirs_ in theirs.weights.items():
        assert ours.weights[name].dtype == theirs_.dtype
        error = (ours.weights[name] - theirs_).double().norm() / theirs_.double().norm()
        # A step of Adam is as large as the learning rate for any gradient.
        assert error <= (1e-5 if dtype == "fp32" else 2 * eps), name


class Grouped(Model):
    """The same model with its experts replaced as in docs/deepspeed.md."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        for moe in self.layers:
            layer = moe.deepspeed_moe
            layout = convert.deepspeed(convert.PerExpert(up="0", down="2"))
            weights = convert.to_grouped(layer.experts.state_dict(), layout)
            experts = moe_ext.GroupedExperts(moe.num_local_experts, H, 2 * H, "gelu", True)
            experts.load_state_dict(weights)
            layer.experts = experts


GROUPED = [
    (ranks, Run(ep_size, stage)) for ranks, ep_size in ((1, 1), (2, 1), (2, 2)) for stage in (0, 1)
]
