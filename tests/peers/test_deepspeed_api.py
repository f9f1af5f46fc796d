"""moe_ext.deepspeed has DeepSpeed's names, signatures, helpers and optimizer groups."""

import inspect

import pytest
import torch
from deepspeed.moe import experts as ds_experts
from deepspeed.moe import layer as ds_layer
from deepspeed.moe import mappings as ds_mappings
from deepspeed.moe import sharded_moe as ds
from deepspeed.moe import utils as ds_utils
from test_deepspeed import Case, expert
from torch import nn

import moe_ext
import moe_ext.deepspeed.experts
from moe_ext.deepspeed import layer as our_layer
from moe_ext.deepspeed import mappings, sharded_moe, utils


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        *((getattr(sharded_moe, name), getattr(ds, name)) for name in (
            "TopKGate", "MOELayer", "top1gating", "top2gating", "topkgating", "einsum",
            "multiplicative_jitter", "gumbel_rsample", "_capacity",
        )),
        (sharded_moe.TopKGate.forward, ds.TopKGate.forward),
        (moe_ext.deepspeed.experts.Experts, ds_experts.Experts),
        (our_layer.MoE, ds_layer.MoE),
        (our_layer.MoE.forward, ds_layer.MoE.forward),
        (mappings.drop_tokens, ds_mappings.drop_tokens),
        (mappings.gather_tokens, ds_mappings.gather_tokens),
        *((getattr(utils, name), getattr(ds_utils, name)) for name in dir(ds_utils)
          if getattr(getattr(ds_utils, name), "__module__", "") == ds_utils.__name__),
    ],
)  # fmt: skip
def test_signatures_are_deepspeeds(ours, theirs):
    """Every call that DeepSpeed accepts is accepted, by position and by keyword."""
    ours = list(inspect.signature(ours).parameters.values())
    theirs = list(inspect.signature(theirs).parameters.values())
    for mine, wanted in zip(ours, theirs, strict=False):
        assert (mine.name, mine.kind) == (wanted.name, wanted.kind)
        assert mine.default == wanted.default or wanted.default is inspect.Parameter.empty
    # Our own arguments have defaults.
    assert len(ours) >= len(theirs)
    for mine in ours[len(theirs) :]:
        assert mine.default is not mine.empty or mine.kind == mine.VAR_KEYWORD


def test_capacity_is_deepspeeds():
    draw = Case(7)
    for _ in range(3000):
        gates = torch.empty(draw.integer(1, 5000), draw.integer(1, 300))
        factor, least = torch.tensor(draw.number(0.01, 5)), torch.tensor(draw.integer(0, 9))
        ours, theirs = (module._capacity(gates, factor, least) for module in (sharded_moe, ds))
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype


RULES = [
    "s,se->se",
    "se,sc->sec",
    "se,se->s",
    "se,sec->sec",
    "sec,sm->ecm",
    "sec,ecm->sm",
    "ks,ksm->sm",
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rewritten", [False, True])
def test_einsum_is_deepspeeds(monkeypatch, rule, rewritten):
    for module in (sharded_moe, ds):
        monkeypatch.setattr(module, "USE_EINSUM", not rewritten)
    sizes = {letter: size for size, letter in enumerate("kecms", start=2)}
    a, b = (
        torch.randn([sizes[letter] for letter in side], dtype=torch.float64)
        for side in rule.split("->")[0].split(",")
    )
    ours = sharded_moe.einsum(rule, a, b)
    torch.testing.assert_close(ours, ds.einsum(rule, a, b).view_as(ours))


def test_optimizer_groups():
    model = nn.Sequential(nn.Linear(8, 8), ds_layer.MoE(8, expert(8), num_experts=3))
    parameters = list(model.parameters())
    model[1](model[0](torch.randn(5, 8)))[0].sum().backward()
    for p in model[1].deepspeed_moe.experts.deepspeed_experts[0].parameters():
        p.grad = None
    assert [utils.is_moe_param(p) for p in parameters] == [
        ds_utils.is_moe_param(p) for p in parameters
    ]
    for name in (
        "split_params_into_shared_and_expert_params",
        "split_params_grads_into_shared_and_expert_params",
    ):
        for mine, theirs in zip(
            getattr(utils, name)(parameters), getattr(ds_utils, name)(parameters), strict=True
        ):
            assert len(mine) == len(theirs)
            assert all(a is b for a, b in zip(mine, theirs, strict=True))
    for max_size in (178956971, 300, None):
        mine, theirs = (
            module.split_params_into_different_moe_groups_for_optimizer(
                {"params": list(parameters), "name": "all", "lr": 0.1}, max_size
            )
            for module in (utils, ds_utils)
        )
        # DeepSpeed makes an empty group if the first parameter is above the limit.
        theirs = [group for group in theirs if group["params"]]
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert a.keys() == b.keys()
            assert all(p is q for p, q in zip(a.pop("params"), b.pop("params"), strict=True))
            assert a == b
