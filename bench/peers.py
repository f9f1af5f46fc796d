"""Other implementations, behind one interface: each gives what ours gives.

An operator's peer is a function of the operator's own arguments; a layer's peer is a module made of
the same weights. A peer whose package or device is missing is named, with what it needs.
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import moe_ext
from moe_ext import MOELayer, TopKGate


class Peer(NamedTuple):
    name: str
    package: str | None
    make: Callable
    gpu_only: bool = False

    def missing(self, device: torch.device) -> str | None:
        if self.package and importlib.util.find_spec(self.package.replace("-", "_")) is None:
            return f"needs {self.package}"
        if self.gpu_only and device.type != "cuda":
            return "needs a GPU"
        return None


class Operands(NamedTuple):
    """Of one routing, dropless and token-major: what the operators take and give."""

    logits: Tensor
    tokens: Tensor
    rows: Tensor
    weights: Tensor
    plan: moe_ext.Plan

    @property
    def top_k(self) -> int:
        return self.weights.shape[1]


# ---- operators: make(operands) gives a function without arguments ------------------------------


def _torch_gate(o: Operands) -> Callable:
    def gate() -> tuple[Tensor, ...]:
        probs = o.logits.softmax(-1)
        weights, experts = probs.topk(o.top_k)
        return weights / weights.sum(-1, keepdim=True), experts, probs, probs.sum(0)

    return gate


def _torch_plan(o: Operands) -> Callable:
    experts, num_experts = o.plan.expert_ids.flatten().long(), o.plan.num_experts

    def plan() -> tuple[Tensor, ...]:
        sources = torch.argsort(experts, stable=True)
        load = torch.bincount(experts, minlength=num_experts)
        offsets = torch.cat([load.new_zeros(1), load.cumsum(0)])
        slots = torch.empty_like(sources)
        slots[sources] = torch.arange(len(sources), device=sources.device)
        return slots.view(o.plan.expert_ids.shape), sources, offsets, load

    return plan


def _index_select(o: Operands) -> Callable:
    index = (o.plan.sources // o.top_k).long()
    return lambda: (o.tokens.index_select(0, index),)


def _embedding_bag(o: Operands) -> Callable:
    slots, weights = o.plan.slots.long(), o.weights.to(o.rows.dtype)
    return lambda: (F.embedding_bag(slots, o.rows, mode="sum", per_sample_weights=weights),)


def _index_add(o: Operands) -> Callable:
    sources = o.plan.sources.long()
    index = sources // o.top_k
    weights = o.weights.flatten()[sources].to(o.rows.dtype).unsqueeze(1)
    return lambda: (torch.zeros_like(o.tokens).index_add_(0, index, o.rows * weights),)


def _swiglu(o: Operands) -> Callable:
    gate, up = o.rows.chunk(2, dim=1)
    return lambda: (F.silu(gate) * up,)


def _gelu(o: Operands) -> Callable:
    return lambda: (F.gelu(o.rows),)


class _DeepSpeedRoutes:
    """Slots [K, T] in a buffer [E, C] whose C is the largest load, as its gate makes them."""

    def __init__(self, o: Operands) -> None:
        from deepspeed.moe import sharded_moe

        self.module = sharded_moe
        self.num_experts, self.num_tokens = o.plan.num_experts, len(o.tokens)
        self.capacity = int(o.plan.load.max())
        starts = o.plan.offsets[o.plan.expert_ids.long()]
        places = (o.plan.slots - starts).t().contiguous()
        self.experts = o.plan.expert_ids.t().contiguous()
        self.slots = sharded_moe._route_slots(self.experts, places, self.num_experts, self.capacity)
        # Where each of our rows is in its buffer.
        route = o.plan.sources.long()
        self.of_rows = self.slots.t().flatten()[route]

    def encode(self, tokens: Tensor) -> Tensor:
        out = self.module._sparse_encode(tokens, self.slots, self.num_experts, self.capacity)
        return out.flatten(0, 1)

    def buffer(self, rows: Tensor) -> Tensor:
        size = self.num_experts * self.capacity, rows.shape[1]
        return rows.new_zeros(size).index_copy_(0, self.of_rows, rows)

    def mask(self, weights: Tensor) -> Tensor:
        """[T, E, C] of the weights, as its gate gives them to the einsums."""
        mask = weights.new_zeros(self.num_tokens, self.num_experts * self.capacity)
        return mask.scatter_(1, self.slots.t(), weights).view(
            self.num_tokens, self.num_experts, self.capacity
        )


def _deepspeed_gate(o: Operands) -> Callable:
    from deepspeed.moe.sharded_moe import topkgating

    num_tokens, k = len(o.logits), o.top_k

    def gate() -> tuple[Tensor, ...]:
        _, _, _, experts, _, weights, _ = topkgating(
            o.logits, k, 1.0, num_tokens, drop_tokens=False, sparse_routes=True
        )
        return weights.t(), experts.t()

    return gate


def _deepspeed_encode(o: Operands) -> Callable:
    routes = _DeepSpeedRoutes(o)
    return Seen(lambda: routes.encode(o.tokens), lambda out: (out[routes.of_rows],))


def _deepspeed_decode(o: Operands) -> Callable:
    routes = _DeepSpeedRoutes(o)
    buffer, weights = routes.buffer(o.rows), o.weights.t().contiguous()
    decode = routes.module._sparse_decode
    return lambda: (decode(buffer, routes.slots, weights, routes.num_tokens),)


def _deepspeed_encode_dense(o: Operands) -> Callable:
    routes = _DeepSpeedRoutes(o)
    mask = routes.mask(torch.ones_like(o.weights)).to(o.tokens.dtype)
    einsum = routes.module.einsum
    return Seen(
        lambda: einsum("sec,sm->ecm", mask, o.tokens).flatten(0, 1),
        lambda out: (out[routes.of_rows],),
    )


def _deepspeed_decode_dense(o: Operands) -> Callable:
    routes = _DeepSpeedRoutes(o)
    buffer, mask = routes.buffer(o.rows), routes.mask(o.weights).to(o.rows.dtype)
    buffer = buffer.view(routes.num_experts, routes.capacity, -1)
    return lambda: (routes.module.einsum("sec,ecm->sm", mask, buffer),)


class Seen:
    """A function, and how its result is read as ours: that is not part of its time."""

    def __init__(self, function: Callable, read: Callable) -> None:
        self.function, self.read = function, read

    def __call__(self):
        return self.function()


def _moe_ops_gate(o: Operands) -> Callable:
    from moe_ops import fused_topk_softmax

    return lambda: fused_topk_softmax(o.logits, o.top_k)


def _moe_ops_permute(o: Operands) -> Callable:
    from moe_ops import permute

    experts, E = o.plan.expert_ids, o.plan.num_experts
    K, T = experts.shape[1], len(o.tokens)

    def read(out: tuple) -> tuple[Tensor, ...]:
        # Its order within an expert is not defined; its map is [K, T].
        rows, places, _ = out
        return (rows[places.view(K, T).t().flatten()[o.plan.sources.long()].long()],)

    return Seen(lambda: permute(o.tokens, experts, 0, E), read)


def _moe_ops_unpermute(o: Operands) -> Callable:
    from moe_ops import unpermute

    places = o.plan.slots.t().contiguous().flatten()
    T, K = o.weights.shape
    return lambda: (unpermute(o.rows, places, o.weights, T, K),)


def _liger_plan(o: Operands) -> Callable:
    from liger_kernel.ops.fused_moe import compute_routing_metadata

    experts, num_experts = o.plan.expert_ids, o.plan.num_experts
    return Seen(
        lambda: compute_routing_metadata(experts, num_experts),
        lambda out: (out[4].view(experts.shape), out[3], out[1], out[0]),
    )


OPERATORS = {
    "gate": [
        Peer("torch", None, _torch_gate),
        Peer("DeepSpeed, with positions and loss", "deepspeed", _deepspeed_gate),
        Peer("moe-ops", "moe-ops", _moe_ops_gate, gpu_only=True),
    ],
    "plan": [
        Peer("torch.argsort", None, _torch_plan),
        Peer("Liger", "liger-kernel", _liger_plan, gpu_only=True),
    ],
    "dispatch": [
        Peer("index_select", None, _index_select),
        Peer("DeepSpeed sparse", "deepspeed", _deepspeed_encode),
        Peer("DeepSpeed dense", "deepspeed", _deepspeed_encode_dense),
        Peer("moe-ops", "moe-ops", _moe_ops_permute, gpu_only=True),
    ],
    "combine": [
        Peer("embedding_bag", None, _embedding_bag),
        Peer("index_add_", None, _index_add),
        Peer("DeepSpeed sparse", "deepspeed", _deepspeed_decode),
        Peer("DeepSpeed dense", "deepspeed", _deepspeed_decode_dense),
        Peer("moe-ops", "moe-ops", _moe_ops_unpermute, gpu_only=True),
    ],
    "activate, swiglu": [Peer("torch", None, _swiglu)],
    "activate, gelu": [Peer("torch", None, _gelu)],
}


# ---- layers: make(weights, top_k) gives a module, [T, H] -> [T, H] -------------------------------


class Weights(NamedTuple):
    """Of a layer of SwiGLU experts whose chosen probabilities are normalized."""

    router: Tensor  # [E, H]
    up: Tensor  # [E, 2F, H], the gates first
    down: Tensor  # [E, H, F]


def _parameters(module: nn.Module, weights: Weights) -> nn.Module:
    for name, value in weights._asdict().items():
        module.register_parameter(name, nn.Parameter(value.clone()))
    return module


def _ours(weights: Weights, top_k: int) -> nn.Module:
    E, H = weights.router.shape
    gate = TopKGate(H, E, k=top_k, drop_tokens=False, top2_2nd_expert_sampling=False)
    experts = moe_ext.GroupedExperts(E, H, weights.down.shape[2], activation="swiglu", bias=False)
    layer = MOELayer(gate, experts).to(weights.up.dtype)
    with torch.no_grad():
        gate.wg.weight.copy_(weights.router)
        experts.gate_up_proj.copy_(weights.up)
        experts.down_proj.copy_(weights.down)
    return layer


def _choose(tokens: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    probs = F.linear(tokens.float(), router.float()).softmax(-1)
    weights, experts = probs.topk(top_k)
    return weights / weights.sum(-1, keepdim=True), experts


class PlainLayer(nn.Module):
    """What a careful reader of PyTorch's documentation writes."""

    def __init__(self, weights: Weights, top_k: int) -> None:
        super().__init__()
        _parameters(self, weights)
        self.top_k = top_k

    def forward(self, tokens: Tensor) -> Tensor:
        weights, experts = _choose(tokens, self.router, self.top_k)
        experts = experts.flatten()
        order = torch.argsort(experts, stable=True)
        load = torch.bincount(experts, minlength=len(self.router)).tolist()
        index = order // self.top_k
        rows = tokens.index_select(0, index).split(load)
        out = []
        for mine, up, down in zip(rows, self.up.unbind(), self.down.unbind(), strict=True):
            gate, linear = F.linear(mine, up).chunk(2, dim=-1)
            out.append(F.linear(F.silu(gate) * linear, down))
        weighed = torch.cat(out) * weights.flatten()[order].to(tokens.dtype).unsqueeze(1)
        return torch.zeros_like(tokens).index_add(0, index, weighed)


class _Expert(nn.Module):
    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up.clone()), nn.Parameter(down.clone())

    def forward(self, rows: Tensor) -> Tensor:
        gate, linear = F.linear(rows, self.up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * linear, self.down)


def _experts(weights: Weights) -> list[nn.Module]:
    return [_Expert(up, down) for up, down in zip(weights.up, weights.down, strict=True)]


class _DeepSpeed(nn.Module):
    def __init__(self, weights: Weights, top_k: int) -> None:
        super().__init__()
        from deepspeed.moe.experts import Experts
        from deepspeed.moe.sharded_moe import MOELayer as Layer
        from deepspeed.moe.sharded_moe import TopKGate as Gate

        E, H = weights.router.shape
        gate = Gate(H, E, top_k, drop_tokens=False, top2_2nd_expert_sampling=False)
        gate.wg.weight = nn.Parameter(weights.router.clone())
        experts = Experts(nn.Identity(), E)
        experts.deepspeed_experts = nn.ModuleList(_experts(weights))
        self.layer = Layer(gate, experts, "ep_size_1", 1, E)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens, None)


class _DeepSpeedDense(_DeepSpeed):
    """Its layer before 0.19: masks [T, E, C] and einsums."""

    def forward(self, tokens: Tensor) -> Tensor:
        from deepspeed.moe.sharded_moe import einsum

        gate = self.layer.gate
        _, weights, mask, _ = gate(tokens, None)
        rows = einsum("sec,sm->ecm", mask.type_as(tokens), tokens)
        rows = self.layer.experts(rows.unsqueeze(0)).squeeze(0)
        return einsum("sec,ecm->sm", weights.type_as(tokens), rows)


class _HuggingFace(nn.Module):
    def __init__(self, weights: Weights, top_k: int, implementation: str) -> None:
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        E, H = weights.router.shape
        config = MixtralConfig(
            hidden_size=H,
            intermediate_size=weights.down.shape[2],
            num_local_experts=E,
            num_experts_per_tok=top_k,
            router_jitter_noise=0.0,
        )
        config._experts_implementation = implementation
        self.block = MixtralSparseMoeBlock(config).to(weights.up.dtype)
        with torch.no_grad():
            self.block.gate.weight.copy_(weights.router)
            self.block.experts.gate_up_proj.copy_(weights.up)
            self.block.experts.down_proj.copy_(weights.down)

    def forward(self, tokens: Tensor) -> Tensor:
        out = self.block(tokens.unsqueeze(0))
        return (out[0] if isinstance(out, tuple) else out).squeeze(0)


def _hugging_face(implementation: str) -> Callable:
    return lambda weights, top_k: _HuggingFace(weights, top_k, implementation)


class _Liger(PlainLayer):
    """Its fused experts behind plain routing."""

    def forward(self, tokens: Tensor) -> Tensor:
        from liger_kernel.ops import LigerFusedMoEFunction

        weights, experts = _choose(tokens, self.router, self.top_k)
        return LigerFusedMoEFunction.apply(
            tokens, self.up, self.down, experts.int(), weights.to(tokens.dtype)
        )


class _MoeOps(_Liger):
    def forward(self, tokens: Tensor) -> Tensor:
        import moe_ops

        logits = F.linear(tokens.float(), self.router.float())
        weights, experts = moe_ops.fused_topk_softmax(logits, self.top_k)
        E, (T, K) = len(self.router), experts.shape
        rows, places, offsets = moe_ops.permute(tokens, experts, 0, E)
        ends = offsets[1:].contiguous()
        gate, linear = moe_ops.grouped_gemm(rows, self.up, ends).chunk(2, dim=-1)
        out = moe_ops.grouped_gemm(F.silu(gate) * linear, self.down, ends)
        return moe_ops.unpermute(out, places, weights, T, K)


class _Fairscale(nn.Module):
    """Its gate samples the second expert and drops over a capacity of 2T/E: `weights_of` records
    its choice, by which its output is checked."""

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
        self.weights_of: Tensor | None = None

    def _record(self, _module: nn.Module, _args: tuple, out: tuple) -> None:
        self.weights_of = out[1].detach().sum(-1)

    def forward(self, tokens: Tensor) -> Tensor:
        E = len(self.layer.experts)
        return self.layer(tokens.view(E, -1, tokens.shape[1])).view_as(tokens)


def gradients(layer: nn.Module, weights: Weights) -> Weights:
    """Of a layer's parameters, known by their shapes; those of one expert each are stacked."""
    grads = [p.grad for p in layer.parameters()]

    def of(weight: Tensor) -> Tensor:
        whole = [g for g in grads if g.shape == weight.shape]
        return whole[0] if whole else torch.stack([g for g in grads if g.shape == weight.shape[1:]])

    return Weights(*map(of, weights))


OURS = Peer("moe_ext", None, _ours)
LAYERS = [
    Peer("plain PyTorch", None, PlainLayer),
    Peer("DeepSpeed", "deepspeed", _DeepSpeed),
    Peer("DeepSpeed dense", "deepspeed", _DeepSpeedDense),
    Peer("Hugging Face eager", "transformers", _hugging_face("eager")),
    Peer("Hugging Face batched_mm", "transformers", _hugging_face("batched_mm")),
    Peer("Hugging Face grouped_mm", "transformers", _hugging_face("grouped_mm")),
    Peer("fairscale", "fairscale", _Fairscale),
    Peer("Liger", "liger-kernel", _Liger, gpu_only=True),
    Peer("moe-ops", "moe-ops", _MoeOps, gpu_only=True),
]
