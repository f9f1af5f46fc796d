"""Unsupported uses of DeepSpeed's engine end in an error that names them."""

import importlib

import pytest
import torch
from engines import HALF, OURS, TOKENS, H, Model, Run, deepspeed_on, engine_of, trained
from hf_models import model_of
from processes import on_ranks
from torch import nn

import moe_ext.hf


@pytest.mark.parametrize("ep_size", [1, 2])
@on_ranks(lambda ep_size: ep_size)
def test_inference_with_expert_parallelism_is_refused(rank, ep_size):
    model = Model(OURS, ep_size, True).eval()
    x = torch.randn(TOKENS, H)
    options = {"dtype": torch.float32, "moe": {"ep_size": ep_size}}
    engine = deepspeed_on(rank).init_inference(model, **options)
    if ep_size == 1:
        assert torch.equal(engine(x)[0], model(x)[0])
        return
    with pytest.raises(RuntimeError, match=r"init_inference does not, and is not supported"):
        engine(x)


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


@pytest.mark.parametrize(
    ("run", "make_mpu", "message"),
    [
        (Run(stage=3), type(None), "Native DeepSpeed MoE is not supported with ZeRO Stage"),
        (Run(2), TensorParallel, "an mpu with tensor parallelism is not supported"),
    ],
)
@on_ranks(lambda run, **_: run.ep_size)
def test_zero_3_and_a_tensor_parallel_mpu_are_refused(rank, run, make_mpu, message):
    with pytest.raises((AssertionError, NotImplementedError), match=message):
        engine_of(rank, OURS, run, mpu=make_mpu())


AUTO_EP = {"expert_parallel": {"enabled": True, "autoep_size": 1}}


def _mixtral(kind: str) -> nn.Module:
    sizes = {"hidden_size": H, "intermediate_size": 2 * H, "num_hidden_layers": 1}
    model = model_of("mixtral", experts_implementation="moe_ext", **sizes)
    if kind != "transformers":
        module = importlib.import_module(kind)
        experts = moe_ext.GroupedExperts(4, H, 2 * H)
        model.model.layers[0].mlp = module.MOELayer(module.TopKGate(H, 4, 2), experts)
    return model


def auto_ep_engine(rank: int, kind: str):
    auto_ep = importlib.import_module("deepspeed.module_inject.auto_ep").AutoEP
    with pytest.MonkeyPatch.context() as patch:
        # DeepSpeed 0.19.8 does this; transformers 5.25 raises.
        patch.setattr(auto_ep, "_retarget_transformers_output_recorders", lambda *args: None)
        return engine_of(rank, OURS, Run(), make=lambda *args: _mixtral(kind), **AUTO_EP)


@on_ranks(1)
def test_auto_ep_replaces_transformers_experts_and_check_says_so(rank):
    model = auto_ep_engine(rank, "transformers").module
    names = [type(module).__name__ for module in model.modules()]
    assert "AutoEPMoELayer" in names
    assert "MixtralExperts" not in names
    with pytest.raises(ValueError, match=r"AutoEP.* leave it out to use moe_ext$"):
        moe_ext.hf.check(model)


@pytest.mark.parametrize("package", ["moe_ext", f"{OURS}.sharded_moe"])
@on_ranks(1)
def test_auto_ep_is_refused_by_our_layer(rank, package):
    """docs/deepspeed.md describes it."""
    with pytest.raises(RuntimeError, match="AutoEP cannot replace a layer of moe_ext"):
        auto_ep_engine(rank, package)


def test_a_gate_without_a_weight_is_otherwise_a_module():
    gate = moe_ext.TopKGate(H, 4)
    assert not hasattr(gate, "weight")
    gate.weight = nn.Parameter(torch.ones(1))
    assert gate.weight is dict(gate.named_parameters())["weight"]


@on_ranks(1)
def test_auto_ep_leaves_our_moe_alone(rank):
    found, wanted = (
        trained(engine_of(rank, OURS, Run(), **config), rank, range(HALF))
        for config in (AUTO_EP, {})
    )
    assert found.losses == wanted.losses
