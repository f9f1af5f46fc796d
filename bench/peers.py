"""Other implementations of our operators, behind one interface. `OPERATORS` lists them.

`make(operands)` gives a function without arguments that returns what ours returns, or a function
and another, not timed, that turns its result into ours. A peer whose package or device is missing
is named, with what it needs.
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import moe_ext


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
    """Operands and results of the operators for one routing, dropless and token-major."""

    logits: Tensor
    tokens: Tensor
    rows: Tensor
    weights: Tensor
    plan: moe_ext.Plan

    @property
    def top_k(self) -> int:
        return self.weights.shape[1]


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


class _DeepSpeedRoutes:
    """Slots [K, T] in a buffer [E, C] whose C is the largest load, as its gate makes them."""

    def __init__(self, o: Operands) -> None:
        from deepspeed.moe import sharded_moe

        self.module = sharded_moe
        self.num_experts, self.num_tokens = o.plan.num_experts, len(o.tokens)
        self.capacity = int(o.plan.load.max())
        starts = o.plan.offsets[o.plan.expert_ids.long()]
        places = (o.plan.slots - starts).t().contiguous()
        experts = o.plan.expert_ids.t().contiguous()
        self.slots = sharded_moe._route_slots(experts, places, self.num_experts, self.capacity)
        # The row of its buffer for each of our rows.
        route = o.plan.sources.long()
        self.of_rows = self.slots.t().flatten()[route]

    def read(self, buffer: Tensor) -> tuple[Tensor, ...]:
        return (buffer[self.of_rows],)

    def buffer(self, rows: Tensor) -> Tensor:
        size = self.num_experts * self.capacity, rows.shape[1]
        return rows.new_zeros(size).index_copy_(0, self.of_rows, rows)

    def mask(self, weights: Tensor) -> Tensor:
        """The weights as a mask [T, E, C], the form that its einsums take."""
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


def _deepspeed_encode(o: Operands) -> tuple[Callable, Callable]:
    routes = _DeepSpeedRoutes(o)
    encode, args = routes.module._sparse_encode, (routes.slots, routes.num_experts, routes.capacity)
    return (lambda: encode(o.tokens, *args).flatten(0, 1), routes.read)


def _deepspeed_decode(o: Operands) -> Callable:
    routes = _DeepSpeedRoutes(o)
    buffer, weights = routes.buffer(o.rows), o.weights.t().contiguous()
    decode = routes.module._sparse_decode
    return lambda: (decode(buffer, routes.slots, weights, routes.num_tokens),)


def _deepspeed_encode_dense(o: Operands) -> tuple[Callable, Callable]:
    routes = _DeepSpeedRoutes(o)
    mask = routes.mask(torch.ones_like(o.weights)).to(o.tokens.dtype)
    einsum = routes.module.einsum
    return (lambda: einsum("sec,sm->ecm", mask, o.tokens).flatten(0, 1), routes.read)


def _deepspeed_decode_dense(o: Operands) -> Callable:
    routes = _DeepSpeedRoutes(o)
    buffer, mask = routes.buffer(o.rows), routes.mask(o.weights).to(o.rows.dtype)
    buffer = buffer.view(routes.num_experts, routes.capacity, -1)
    return lambda: (routes.module.einsum("sec,ecm->sm", mask, buffer),)


def _moe_ops_gate(o: Operands) -> Callable:
    from moe_ops import fused_topk_softmax

    return lambda: fused_topk_softmax(o.logits, o.top_k)


def _moe_ops_permute(o: Operands) -> tuple[Callable, Callable]:
    from moe_ops import permute

    experts, E = o.plan.expert_ids, o.plan.num_experts
    K, T = experts.shape[1], len(o.tokens)

    def read(out: tuple) -> tuple[Tensor, ...]:
        # Its order within an expert is not defined; its map is [K, T].
        rows, places, _ = out
        return (rows[places.view(K, T).t().flatten()[o.plan.sources.long()].long()],)

    return (lambda: permute(o.tokens, experts, 0, E), read)


def _moe_ops_unpermute(o: Operands) -> Callable:
    from moe_ops import unpermute

    places = o.plan.slots.t().contiguous().flatten()
    T, K = o.weights.shape
    return lambda: (unpermute(o.rows, places, o.weights, T, K),)


def _liger_plan(o: Operands) -> tuple[Callable, Callable]:
    from liger_kernel.ops.fused_moe import compute_routing_metadata

    experts, num_experts = o.plan.expert_ids, o.plan.num_experts
    return (
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
    "activate, gelu": [Peer("torch", None, lambda o: lambda: (F.gelu(o.rows),))],
}
