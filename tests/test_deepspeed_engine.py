"""moe_ext.deepspeed in DeepSpeed's engine: one program, run with the imports of either package."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from processes import on_processes
from torch import Tensor, nn

pytest.importorskip("deepspeed", reason="needs the extra peers")

import moe_ext
from moe_ext import convert

THEIRS, OURS = "deepspeed.moe", "moe_ext.deepspeed"
EXAMPLE = Path(__file__).parent.parent / "examples" / "train_moe.py"
H, TOKENS, MICRO_STEPS = 16, 48, 40


class Run(NamedTuple):
    """How an engine is configured.

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


def without_compiler(rank: int):
    """DeepSpeed, in one of several processes."""
    # The backend compiles for speed alone.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    os.environ["LOCAL_RANK"] = str(rank)
    return importlib.import_module("deepspeed")


def engine_of(rank: int, package: str, run: Run, *, make=Model, seed: int = 0, mpu=None, **config):
    deepspeed = without_compiler(rank)
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
    (ranks, Run(ep_size, stage, dtype, drops=dtype == "bf16"))
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


@pytest.mark.parametrize("ep_size", [1, 2])
def test_training_without_dropping_is_deepspeeds_but_for_rounding(ep_size):
    run = Run(ep_size, 1, "bf16")
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


HALF = 6


class Resumed(NamedTuple):
    """A training that goes on, and one that takes its checkpoint, in one process."""

    saved: Result
    loaded: dict[str, Tensor]
    continued: Result
    resumed: Result


def weights_of(engine) -> dict[str, Tensor]:
    return {name: w.detach().clone() for name, w in engine.module.state_dict().items()}


def _resume(
    rank: int, before: str, after: str, run: Run, folder: str, make: tuple = (Model, Model)
) -> Resumed:
    first = engine_of(rank, before, run, make=make[0])
    saved = trained(first, rank, range(HALF))
    assert first.save_checkpoint(folder)
    second = engine_of(rank, after, run, make=make[1], seed=1)
    path, _ = second.load_checkpoint(folder)
    assert path is not None
    loaded = weights_of(second)
    rest = range(HALF, 2 * HALF)
    return Resumed(saved, loaded, trained(first, rank, rest), trained(second, rank, rest))


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
def test_training_goes_on_from_a_checkpoint_of_either_package(before, after, ranks, run, tmp_path):
    found = on_processes(ranks, _resume, before, after, run, str(tmp_path))
    for saved, loaded, continued, resumed in found:
        assert saved.weights.keys() == loaded.keys()
        assert all(torch.equal(loaded[name], w) for name, w in saved.weights.items())
        assert_alike(resumed, continued, run.dtype)
        assert any(not torch.equal(continued.weights[name], w) for name, w in saved.weights.items())
    assert len(list(tmp_path.glob("*/layer_*_expert_*"))) == 4 + 2 + 8


def _save(rank: int, package: str, folder: str) -> None:
    engine_of(rank, package, Run(2)).save_checkpoint(folder)


def _load(rank: int, package: str, folder: str) -> None:
    engine_of(rank, package, Run(2)).load_checkpoint(folder)


@pytest.mark.parametrize("package", [OURS, THEIRS])
def test_a_missing_expert_file_is_named(package, tmp_path):
    on_processes(2, _save, package, str(tmp_path))
    name = "layer_0_expert_3_mp_rank_00_model_states.pt"
    next(tmp_path.glob(f"*/{name}")).unlink()
    with pytest.raises(RuntimeError, match=f"FileNotFoundError.*{name}"):
        on_processes(2, _load, package, str(tmp_path))


def _timed(rank: int) -> dict:
    engine = engine_of(rank, OURS, Run(), wall_clock_breakdown=True, steps_per_print=1)
    trained(engine, rank, range(4))
    return {
        "gates": [type(gate).__module__ for gate in engine.gate_modules],
        "layers": [type(layer).__module__ for layer in engine.moe_layers],
        "times": [layer.time_moe for layer in engine.moe_layers],
        "gate times": [gate.gate_time for gate in engine.gate_modules],
    }


def test_the_engine_times_the_layers():
    (found,) = on_processes(1, _timed)
    assert found["gates"] == found["layers"] == ["moe_ext.deepspeed.sharded_moe"] * 3
    assert min(found["times"] + found["gate times"]) > 0


def _parallel_before(rank: int, groups_are_given: bool) -> Result:
    """set_deepspeed_parallelism is called before deepspeed.initialize, which calls it too."""

    def make(*args) -> nn.Module:
        model = Model(*args)
        groups = moe_ext.parallel.make_groups(2) if groups_are_given else None
        for layer in model.layers:
            layer.set_deepspeed_parallelism(groups=groups)
        return model

    without_compiler(rank).init_distributed("gloo")
    return trained(engine_of(rank, OURS, Run(2), make=make), rank, range(HALF))


def test_groups_made_before_the_engine_are_the_engines():
    for mine, wanted in zip(
        on_processes(2, _parallel_before, False), on_processes(2, _train, OURS, Run(2)), strict=True
    ):
        assert mine.losses == wanted.losses[:HALF]


def test_groups_given_before_the_engine_are_refused():
    with pytest.raises(RuntimeError, match=r"build the model anew and leave out the call before"):
        on_processes(2, _parallel_before, True)


def _initialize_twice(rank: int) -> tuple[Result, Result]:
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
    return again, fresh


def test_a_model_may_have_a_second_engine():
    """DeepSpeed's own layer refuses it: "Attempting to override an existing ep_group"."""
    for again, fresh in on_processes(2, _initialize_twice):
        assert again.losses == fresh.losses


class Grouped(Model):
    """The same model, its experts replaced as docs/deepspeed.md has it."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        for moe in self.layers:
            layer = moe.deepspeed_moe
            layout = convert.deepspeed(convert.PerExpert(up="0", down="2"))
            weights = convert.to_grouped(layer.experts.state_dict(), layout)
            experts = moe_ext.GroupedExperts(moe.num_local_experts, H, 2 * H, "gelu", True)
            experts.load_state_dict(weights)
            layer.experts = experts


def _train_grouped(rank: int, run: Run) -> Result:
    return trained(engine_of(rank, OURS, run, make=Grouped), rank)


def _train_split(rank: int, run: Run) -> Result:
    """The script makes optimizer groups of grouped experts itself."""

    def make(*args) -> nn.Module:
        model = Grouped(*args)
        for layer in model.layers:
            layer.set_deepspeed_parallelism()
        return model

    without_compiler(rank).init_distributed("gloo")
    return trained(engine_of(rank, OURS, run, make=make), rank, range(HALF))


@pytest.mark.parametrize("splitter", [OURS, THEIRS])
@pytest.mark.parametrize("ep_size", [1, 2])
def test_optimizer_groups_of_grouped_experts(ep_size, splitter):
    run = Run(ep_size, 1, splitter=splitter)
    mine = on_processes(2, _train_split, run)
    wanted = on_processes(2, _train_grouped, run._replace(splitter=None))
    for a, b in zip(mine, wanted, strict=True):
        assert a.losses == b.losses[:HALF]


GROUPED = [
    (ranks, Run(ep_size, stage)) for ranks, ep_size in ((1, 1), (2, 1), (2, 2)) for stage in (0, 1)
]


@pytest.mark.parametrize(("ranks", "run"), GROUPED, ids=str)
def test_grouped_experts_train_as_modules_do(ranks, run):
    ours = on_processes(ranks, _train_grouped, run)
    for mine, wanted in zip(ours, on_processes(ranks, _train, OURS, run), strict=True):
        for a, b in zip(mine.losses, wanted.losses, strict=True):
            assert abs(a - b) < 1e-5
        assert mine.counts == wanted.counts


@pytest.mark.parametrize(("ranks", "run"), GROUPED, ids=str)
def test_checkpoints_hold_grouped_experts_one_by_one(ranks, run, tmp_path):
    found = on_processes(ranks, _resume, OURS, OURS, run, str(tmp_path), (Grouped, Grouped))
    for saved, loaded, continued, resumed in found:
        assert all(torch.equal(loaded[name], w) for name, w in saved.weights.items())
        assert saved.losses[-1] < saved.losses[0]
        assert_alike(resumed, continued, run.dtype)
    name = "layer_2_expert_7_mp_rank_00_model_states.pt"
    one = torch.load(next(tmp_path.glob(f"*/{name}")), weights_only=True)
    place = "layers.2.deepspeed_moe.experts.deepspeed_experts.7"
    assert {key: list(w.shape) for key, w in one.items()} == {
        f"{place}.up_proj.weight": [2 * H, H],
        f"{place}.up_proj.bias": [2 * H],
        f"{place}.down_proj.weight": [H, 2 * H],
        f"{place}.down_proj.bias": [H],
    }


def _infer(rank: int, ep_size: int) -> tuple[Tensor, Tensor]:
    model = Model(OURS, ep_size, True).eval()
    x = torch.randn(TOKENS, H)
    deepspeed = without_compiler(rank)
    deepspeed.init_distributed("gloo")
    engine = deepspeed.init_inference(model, dtype=torch.float32, moe={"ep_size": ep_size})
    return engine(x)[0].detach(), model(x)[0].detach()


def test_inference_without_expert_parallelism():
    ((found, wanted),) = on_processes(1, _infer, 1)
    assert torch.equal(found, wanted)


def test_inference_with_expert_parallelism_is_refused():
    with pytest.raises(RuntimeError, match=r"init_inference does not, and is not supported"):
        on_processes(2, _infer, 2)


def _engine(rank: int, run: Run) -> None:
    engine_of(rank, OURS, run)


def test_zero_3_is_refused():
    with pytest.raises(RuntimeError, match="Native DeepSpeed MoE is not supported with ZeRO Stage"):
        on_processes(1, _engine, Run(stage=3))


class TensorParallel:
    """An mpu of two ranks that share every tensor."""

    def __init__(self) -> None:
        self.alone, _ = torch.distributed.new_subgroups(1)

    def __getattr__(self, name: str):
        whole, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
        parts = {"model": (whole, 2, rank), "data": (self.alone, 1, 0)}
        for kind, (group, size, place) in parts.items():
            of_kind = {"group": group, "world_size": size, "rank": place}
            for what, value in of_kind.items():
                if name in (f"get_{kind}_parallel_{what}", f"get_tensor_{kind}_parallel_{what}"):
                    return lambda: value
        raise AttributeError(name)


def _with_mpu(rank: int) -> None:
    engine_of(rank, OURS, Run(2), mpu=TensorParallel())


def test_a_tensor_parallel_mpu_is_refused():
    with pytest.raises(RuntimeError, match="an mpu with tensor parallelism is not supported"):
        on_processes(2, _with_mpu)


AUTO_EP = {"expert_parallel": {"enabled": True, "autoep_size": 1}}


def _mixtral(kind: str) -> nn.Module:
    transformers = importlib.import_module("transformers")
    importlib.import_module("moe_ext.hf")
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=H,
        intermediate_size=2 * H,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        experts_implementation="moe_ext",
    )
    model = transformers.MixtralForCausalLM(config)
    if kind != "transformers":
        module = importlib.import_module(kind)
        experts = moe_ext.GroupedExperts(4, H, 2 * H)
        model.model.layers[0].mlp = module.MOELayer(module.TopKGate(H, 4, 2), experts)
    return model


def _auto_ep(rank: int, kind: str) -> tuple[list[str], str]:
    auto_ep = importlib.import_module("deepspeed.module_inject.auto_ep").AutoEP
    with pytest.MonkeyPatch.context() as patch:
        # Of DeepSpeed 0.19.8, which transformers 5.24 stops.
        patch.setattr(auto_ep, "_retarget_transformers_output_recorders", lambda *args: None)
        engine = engine_of(rank, OURS, Run(), make=lambda *args: _mixtral(kind), **AUTO_EP)
    names = [type(module).__name__ for module in engine.module.modules()]
    with pytest.raises(ValueError, match="AutoEP") as error:
        moe_ext.hf.check(engine.module)
    return names, str(error.value)


def test_auto_ep_replaces_transformers_experts_and_check_says_so():
    pytest.importorskip("transformers", reason="needs the extra peers")
    ((names, error),) = on_processes(1, _auto_ep, "transformers")
    assert "AutoEPMoELayer" in names
    assert "MixtralExperts" not in names
    assert error.endswith("leave it out to use moe_ext")


@pytest.mark.parametrize("package", ["moe_ext", f"{OURS}.sharded_moe"])
def test_auto_ep_is_refused_by_our_layer(package):
    """docs/troubleshooting.md has this text."""
    pytest.importorskip("transformers", reason="needs the extra peers")
    with pytest.raises(RuntimeError, match="AutoEP cannot replace a layer of moe_ext"):
        on_processes(1, _auto_ep, package)


def test_a_gate_without_a_weight_is_otherwise_a_module():
    gate = moe_ext.TopKGate(H, 4)
    assert not hasattr(gate, "weight")
    gate.weight = nn.Parameter(torch.ones(1))
    assert gate.weight is dict(gate.named_parameters())["weight"]


def _beside_auto_ep(rank: int) -> Result:
    return trained(engine_of(rank, OURS, Run(), **AUTO_EP), rank, range(HALF))


def test_auto_ep_leaves_our_moe_alone():
    (found,), (wanted,) = on_processes(1, _beside_auto_ep), on_processes(1, _train, OURS, Run())
    assert found.losses == wanted.losses[:HALF]


class OwnExperts(moe_ext.Experts):
    def __init__(self, *args) -> None:
        super().__init__(4)
        self.scale = nn.Parameter(torch.ones(4, H))

    def forward(self, rows: Tensor, plan) -> Tensor:
        return rows * self.scale.mean(0)


def _save_own_experts(rank: int, folder: str) -> None:
    def make(*args) -> nn.Module:
        model = nn.Sequential(importlib.import_module(f"{OURS}.layer").MoE(H, expert(), 4))
        model[0].deepspeed_moe.experts = OwnExperts()
        return model

    engine_of(rank, OURS, Run(), make=make).save_checkpoint(folder)


def test_checkpoints_of_other_stacked_experts_are_not_written(tmp_path):
    """docs/troubleshooting.md has this text."""
    with pytest.raises(RuntimeError, match=r"int\(\) argument must be .*, not 'NoneType'"):
        on_processes(1, _save_own_experts, str(tmp_path))


def printed(script: Path, *launcher: str) -> list[float]:
    arguments = ["--engine", "--zero", "1", "--ep-size", "2", "--steps", "21"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        # DeepSpeed compiles its gate, which takes long.
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [float(x) for x in re.findall(r"loss (\d+\.\d+), l_aux (?:\d+\.\d+)", done.stdout)]


def test_the_example_trains_in_the_engine_with_either_import(tmp_path):
    original = tmp_path / "train_moe.py"
    text = EXAMPLE.read_text()
    original.write_text(text.replace("from moe_ext.deepspeed.", "from deepspeed.moe."))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    theirs, ours = (printed(script, *launcher) for script in (original, EXAMPLE))
    assert len(theirs) == 3
    assert ours == pytest.approx(theirs, abs=2e-3)
    assert theirs[-1] < 0.8 * theirs[0]
