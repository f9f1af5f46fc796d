"""Layers and experts of other libraries, made of equal weights: `LAYERS` and `EXPERTS`, ours first.

`make(weights, routing)` gives a module, [T, H] -> [T, H]. A layer routes by itself: `routing` is
top_k. Experts get their routing: `routing` is expert_ids [T, K], weights.router the weights [T, K].
"""

import importlib
from functools import partial
from typing import NamedTuple

import torch
from peers import Peer
from torch import Tensor, nn
from torch.nn import functional as F

from moe_ext import GroupedExperts, MOELayer, TopKGate


class Weights(NamedTuple):
    """Weights of SwiGLU experts and of their routing, top_k of softmax, normalized."""

    router: Tensor  # [E, H]; [T, K] for experts alone
    up: Tensor  # [E, 2F, H], the gates first
    down: Tensor  # [E, H, F]


def swiglu(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """One expert: rows [R, H], up [2F, H], down [H, F] -> [R, H]."""
    gate, linear = F.linear(rows, up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * linear, down)


def our_layer(E: int, H: int, ffn: int, top_k: int, **options) -> MOELayer:
    """Our layer with new weights. options: those of TopKGate."""
    gate = TopKGate(H, E, top_k, top2_2nd_expert_sampling=False, **options)
    return MOELayer(gate, GroupedExperts(E, H, ffn))


def our_experts(up: Tensor, down: Tensor) -> GroupedExperts:
    """Our experts with a copy of these weights."""
    experts = GroupedExperts(*down.shape, device=up.device, dtype=up.dtype)
    experts.load_state_dict({"gate_up_proj": up, "down_proj": down})
    return experts


def _ours(weights: Weights, top_k: int, capacity_factor: float | None = None) -> nn.Module:
    E, H = weights.router.shape
    gate = TopKGate(H, E, top_k, **_capacity(capacity_factor))
    layer = MOELayer(gate, our_experts(weights.up, weights.down)).to(weights.up.dtype)
    gate.wg.load_state_dict({"weight": weights.router})
    if capacity_factor is not None:
        layer.weights_of = partial(_routed, gate)
    return layer


def _routed(gate: TopKGate, tokens: Tensor) -> Tensor:
    routing = gate.route(tokens)
    chosen = routing.plan.expert_ids.long()
    return torch.zeros(len(tokens), gate.num_experts).scatter(1, chosen, routing.weights)


def _capacity(factor: float | None) -> dict:
    """Arguments of our gate and of DeepSpeed's; None: no token is dropped."""
    rule = {"drop_tokens": factor is not None, "top2_2nd_expert_sampling": False}
    if factor is not None:
        rule |= {"capacity_factor": factor, "eval_capacity_factor": factor, "min_capacity": 1}
    return rule


class PlainLayer(nn.Module):
    """Plain PyTorch: tokens sorted by expert, a loop over the experts, index_add."""

    def __init__(self, weights: Weights, top_k: int) -> None:
        super().__init__()
        for name, value in weights._asdict().items():
            self.register_parameter(name, nn.Parameter(value.clone()))
        self.top_k = top_k

    def forward(self, tokens: Tensor) -> Tensor:
        probs = F.linear(tokens.float(), self.router.float()).softmax(-1)
        weights, experts = probs.topk(self.top_k)
        weights, experts = weights / weights.sum(-1, keepdim=True), experts.flatten()
        order = torch.argsort(experts, stable=True)
        load = torch.bincount(experts, minlength=len(self.router)).tolist()
        index = order // self.top_k
        rows = tokens.index_select(0, index).split(load)
        out = torch.cat(list(map(swiglu, rows, self.up.unbind(), self.down.unbind())))
        weighed = out * weights.flatten()[order].to(tokens.dtype).unsqueeze(1)
        return torch.zeros_like(tokens).index_add(0, index, weighed)


class _Expert(nn.Module):
    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up.clone()), nn.Parameter(down.clone())

    def forward(self, rows: Tensor) -> Tensor:
        return swiglu(rows, self.up, self.down)


def _experts(weights: Weights) -> list[nn.Module]:
    return [_Expert(up, down) for up, down in zip(weights.up, weights.down, strict=True)]


class _DeepSpeed(nn.Module):
    def __init__(self, weights: Weights, top_k: int, capacity_factor: float | None = None) -> None:
        super().__init__()
        from deepspeed.moe.experts import Experts
        from deepspeed.moe.sharded_moe import MOELayer as Layer
        from deepspeed.moe.sharded_moe import TopKGate as Gate

        E, H = weights.router.shape
        gate = Gate(H, E, top_k, **_capacity(capacity_factor))
        gate.wg.weight = nn.Parameter(weights.router.clone())
        experts = Experts(nn.Identity(), E)
        experts.deepspeed_experts = nn.ModuleList(_experts(weights))
        self.layer = Layer(gate, experts, "ep_size_1", 1, E)
        if capacity_factor is not None:
            self.weights_of = lambda tokens: gate(tokens, None)[1].sum(-1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens, None)


class _DeepSpeedDense(_DeepSpeed):
    """DeepSpeed's layer before 0.19: masks [T, E, C] and einsums."""

    def forward(self, tokens: Tensor) -> Tensor:
        from deepspeed.moe.sharded_moe import einsum

        gate = self.layer.gate
        _, weights, mask, _ = gate(tokens, None)
        rows = einsum("sec,sm->ecm", mask.type_as(tokens), tokens)
        rows = self.layer.experts(rows.unsqueeze(0)).squeeze(0)
        return einsum("sec,ecm->sm", weights.type_as(tokens), rows)


def mixtral(cls: str, E: int, H: int, ffn: int, top_k: int, implementation: str) -> nn.Module:
    """A module of transformers' Mixtral; the weights of its experts are not set."""
    from transformers import MixtralConfig
    from transformers.models.mixtral import modeling_mixtral

    importlib.import_module("moe_ext.hf")  # registers the implementation "moe_ext"
    config = MixtralConfig(
        hidden_size=H,
        intermediate_size=ffn,
        num_local_experts=E,
        num_experts_per_tok=top_k,
        router_jitter_noise=0.0,
    )
    config._experts_implementation = implementation
    return getattr(modeling_mixtral, cls)(config)


def _mixtral(cls: str, weights: Weights, top_k: int, implementation: str) -> nn.Module:
    module = mixtral(cls, *weights.down.shape, top_k, implementation).to(weights.up.dtype)
    experts = getattr(module, "experts", module)
    experts.load_state_dict({"gate_up_proj": weights.up, "down_proj": weights.down})
    return module


class _HuggingFace(nn.Module):
    def __init__(self, weights: Weights, top_k: int, implementation: str) -> None:
        super().__init__()
        self.block = _mixtral("MixtralSparseMoeBlock", weights, top_k, implementation)
        self.block.gate.load_state_dict({"weight": weights.router})

    def forward(self, tokens: Tensor) -> Tensor:
        out = self.block(tokens.unsqueeze(0))
        return (out[0] if isinstance(out, tuple) else out).squeeze(0)


class _HuggingFaceExperts(nn.Module):
    def __init__(self, weights: Weights, expert_ids: Tensor, implementation: str) -> None:
        super().__init__()
        top_k = expert_ids.shape[1]
        self.experts = _mixtral("MixtralExperts", weights, top_k, implementation)
        self.expert_ids, self.weights = expert_ids, nn.Parameter(weights.router.clone())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.experts(tokens, self.expert_ids, self.weights)


class _Fairscale(nn.Module):
    """fairscale's gate samples the second expert and drops tokens over a capacity of 2T/E."""

    def __init__(self, weights: Weights, top_k: int) -> None:
        super().__init__()
        import torch.distributed as dist
        from fairscale.nn.moe import MOELayer as Layer
        from fairscale.nn.moe import Top2Gate

        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        E, H = weights.router.shape
        gate = Top2Gate(H, E)
        gate.wg.weight = nn.Parameter(weights.router.clone())
        self.layer = Layer(gate, nn.ModuleList(_experts(weights)))
        gate.register_forward_hook(self._record)
        self._chosen: Tensor | None = None

    def _record(self, _module: nn.Module, _args: tuple, out: tuple) -> None:
        self._chosen = out[1].detach().sum(-1)

    def weights_of(self, _tokens: Tensor) -> Tensor | None:
        return self._chosen

    def forward(self, tokens: Tensor) -> Tensor:
        E = len(self.layer.experts)
        return self.layer(tokens.view(E, -1, tokens.shape[1])).view_as(tokens)


def gradients(layer: nn.Module, weights: Weights) -> Weights:
    """Gradients of a layer's parameters, found by shape; those of single experts are stacked."""
    grads = [p.grad for p in layer.parameters()]

    def of(weight: Tensor) -> Tensor:
        whole = [g for g in grads if g.shape == weight.shape]
        return whole[0] if whole else torch.stack([g for g in grads if g.shape == weight.shape[1:]])

    return Weights(*map(of, weights))


LAYERS = [
    Peer("moe_ext", None, _ours),
    Peer("plain PyTorch", None, PlainLayer),
    Peer("DeepSpeed", "deepspeed", _DeepSpeed),
    Peer("DeepSpeed dense", "deepspeed", _DeepSpeedDense),
    *(
        Peer(f"Hugging Face {name}", "transformers", partial(_HuggingFace, implementation=name))
        for name in ("eager", "batched_mm", "grouped_mm")
    ),
    Peer("fairscale", "fairscale", _Fairscale),
]


def layers_with_capacity(factor: float) -> list[Peer]:
    """Layers that drop tokens beyond T * K / E * factor of an expert."""
    return [
        Peer("moe_ext", None, partial(_ours, capacity_factor=factor)),
        Peer("DeepSpeed", "deepspeed", partial(_DeepSpeed, capacity_factor=factor)),
    ]


EXPERTS = [
    Peer(name, "transformers", partial(_HuggingFaceExperts, implementation=name))
    for name in ("moe_ext", "eager", "batched_mm", "grouped_mm")
]
