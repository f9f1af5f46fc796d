"""The gate with a model's options gives the results of that model's router in transformers."""

from types import SimpleNamespace

import pytest
import torch
from cases import relative_error
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4HashRouter,
    DeepseekV4TopKRouter,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moe_ext import TopKGate

T, H = 200, 24

# The rows of docs/routing.md: router, options of the gate.
MODELS = {
    "Mixtral": (MixtralTopKRouter, {"k": 2, "normalize": "before"}),
    "Qwen3-MoE": (Qwen3MoeTopKRouter, {"k": 8, "normalize": "before"}),
    "OLMoE": (OlmoeTopKRouter, {"k": 8, "normalize": "never"}),
    "gpt-oss": (
        GptOssTopKRouter,
        {"k": 4, "normalize": "before", "router": torch.nn.Linear(H, 32)},
    ),
    "DeepSeek-V2": (
        DeepseekV2TopkRouter,
        {"k": 6, "normalize": "never", "scale": 16.0, "num_groups": 8, "topk_groups": 3},
    ),
    "DeepSeek-V3": (
        DeepseekV3TopkRouter,
        {"k": 8, "scoring": "sigmoid", "normalize": "before", "scale": 2.5, "expert_bias": True}
        | {"num_groups": 8, "topk_groups": 4, "group_score": "top2_sum"},
    ),
    "DeepSeek-V4": (
        DeepseekV4TopKRouter,
        {"k": 6, "scoring": "sqrtsoftplus", "normalize": "before", "scale": 1.5}
        | {"expert_bias": True},
    ),
}
# The names of the options in transformers.
CONFIG = {"k": "num_experts_per_tok", "scoring": "scoring_func", "scale": "routed_scaling_factor"}
CONFIG |= {"num_groups": "n_group", "topk_groups": "topk_group"}


def config_of(options: dict) -> SimpleNamespace:
    """The configuration of a router with these options of the gate."""
    known = {CONFIG[name]: value for name, value in options.items() if name in CONFIG}
    sizes = {"hidden_size": H, "num_experts": 32, "num_local_experts": 32, "vocab_size": 50}
    rules = {
        "norm_topk_prob": options["normalize"] == "before",
        "topk_method": "group_limited_greedy",
    }
    return SimpleNamespace(**sizes, **rules, **known)


def by_expert(weights, experts):
    """Sort the choices of a token, which some routers leave unsorted."""
    order = experts.argsort(dim=-1)
    return weights.gather(-1, order), experts.gather(-1, order)


def pair(name):
    """A model's router and the gate, with equal weights."""
    Router, options = MODELS[name]
    router = Router(config_of(options))
    gate = TopKGate(H, 32, drop_tokens=False, top2_2nd_expert_sampling=False, **options)
    with torch.no_grad():
        for mine, theirs in ((gate.wg.weight, "weight"), (gate.wg.bias, "bias")):
            if mine is not None:
                torch.nn.init.normal_(getattr(router, theirs), std=0.3)
                mine.copy_(getattr(router, theirs))
        if gate.expert_bias is not None:
            gate.expert_bias.copy_(0.1 * torch.randn(32))
            router.e_score_correction_bias.copy_(gate.expert_bias)
    return router, gate


@pytest.mark.parametrize("name", MODELS)
def test_routers_equal_transformers(name):
    router, gate = pair(name)
    x = torch.randn(T, H, requires_grad=True)
    grads = []
    results = []
    for logits, weights, experts in (router(x), gate.route(x).as_hf_tuple()):
        weights, experts = by_expert(weights, experts)
        results.append((logits, weights, experts))
        upstream = torch.arange(weights.numel()).mul(1.7).sin().view_as(weights)
        grads.append(torch.autograd.grad((weights * upstream).sum() + logits.sum(), x)[0])
    (their_logits, their_weights, their_experts), (logits, weights, experts) = results
    assert torch.equal(logits, their_logits)
    assert torch.equal(experts, their_experts)
    assert experts.dtype == their_experts.dtype
    assert relative_error(weights, their_weights) < 1e-6
    assert relative_error(grads[1], grads[0]) < 1e-5


def test_hash_routing_is_a_recorded_choice():
    options = {"k": 6, "scoring": "sqrtsoftplus", "normalize": "before", "scale": 1.5}
    router = DeepseekV4HashRouter(config_of(options))
    gate = TopKGate(H, 32, drop_tokens=False, **options)
    torch.nn.init.normal_(router.weight)
    table = torch.rand(50, 32).argsort(-1)[:, :6]
    router.tid2eid.copy_(table)
    gate.wg.load_state_dict({"weight": router.weight})
    x, ids = torch.randn(T, H), torch.randint(50, (T,))
    their_logits, their_weights, their_experts = router(x, ids)
    logits, weights, experts = gate.route(x, expert_ids=table[ids].int()).as_hf_tuple()
    assert torch.equal(experts, their_experts)
    assert torch.equal(logits, their_logits)
    assert relative_error(weights, their_weights) < 1e-6
