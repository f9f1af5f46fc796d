"""DeepSpeed's `deepspeed.moe.sharded_moe`: its names, arguments and results.

Masks [S, E, C] are quadratic in the tokens; `MOELayer` makes none. S tokens, E experts, C capacity,
M the model's width. docs/deepspeed.md lists the results that differ from DeepSpeed's.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from ..ops import checks
from ..options import DropPolicy, NoisePolicy
from ..routing import choice_scores
from ..routing.capacity import expert_capacity
from ..routing.losses import load_balance_loss
from ..routing.route import Routing, route
from . import engine, gate, moe_layer
from .gate import TOPK_GATE_TIMER
from .mappings import drop_tokens, gather_tokens
from .masks import form
from .moe_layer import MOE_TIMER

__all__ = [
    "FIRST_ALLTOALL_TIMER",
    "MOE_TIMER",
    "SECOND_ALLTOALL_TIMER",
    "TOPK_GATE_TIMER",
    "TUTEL_INSTALLED",
    "USE_EINSUM",
    "MOELayer",
    "TopKGate",
    "_AllToAll",
    "_capacity",
    "drop_tokens",
    "einsum",
    "gather_tokens",
    "gumbel_rsample",
    "multiplicative_jitter",
    "top1gating",
    "top2gating",
    "topkgating",
]

# Names of DeepSpeed's timers; exchanges overlap with other work and are not timed here.
FIRST_ALLTOALL_TIMER = "1st_a2a"
SECOND_ALLTOALL_TIMER = "2nd_a2a"

# Tutel's form of a routing does not need Tutel.
TUTEL_INSTALLED = False

# Accepted for DeepSpeed's callers and ignored.
USE_EINSUM = True


class TopKGate(gate.TopKGate, engine.known_as("sharded_moe", "TopKGate")):  # type: ignore[misc]
    """moe_ext.TopKGate, recognised by DeepSpeed's engine."""


class MOELayer(moe_layer.MOELayer, engine.known_as("sharded_moe", "MOELayer")):  # type: ignore[misc]
    """moe_ext.MOELayer, recognised by DeepSpeed's engine."""


def multiplicative_jitter(x: Tensor, device=None, epsilon: float = 1e-2) -> Tensor:
    """Multiply every element by a uniform number in 1 ± epsilon; float32 for 16-bit x.

    device: accepted for DeepSpeed's callers and ignored
    """
    return x if epsilon == 0 else x * choice_scores.uniform(x, 1 - epsilon, 1 + epsilon)


def gumbel_rsample(shape: tuple, device: torch.device) -> Tensor:
    """Draw Gumbel(0, 1) noise, float32."""
    return choice_scores.gumbel(torch.empty(shape, device=device))


class _AllToAll(Function):
    """`_AllToAll.apply(group, input)`: part i of dimension 0 goes to rank i of the group.

    All parts have equal size, so it is its own inverse and its own gradient.
    """

    @staticmethod
    def forward(ctx, group: dist.ProcessGroup | None, input: Tensor) -> Tensor:
        ctx.group = group
        if not dist.is_initialized():
            raise RuntimeError("_AllToAll: torch.distributed is not initialised")
        size = dist.get_world_size(group)
        if input.dim() == 0 or input.shape[0] % size:
            raise RuntimeError(
                f"_AllToAll: dimension 0 of input must be a multiple of the group's size {size}, "
                f"got {list(input.shape)}"
            )
        input = input.contiguous()
        output = torch.empty_like(input)
        dist.all_to_all_single(output, input, group=group)
        return output

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[None, Tensor]:
        return None, _AllToAll.apply(ctx.group, grad_output)


def einsum(rule: str, a: Tensor, b: Tensor) -> Tensor:
    """torch.einsum(rule, a, b), whatever USE_EINSUM is."""
    return torch.einsum(rule, a, b)


def _capacity(gates: Tensor, capacity_factor: Tensor, min_capacity: Tensor) -> Tensor:
    """C for gates [S, E], as a tensor [] int64 on the host: see `expert_capacity`."""
    S, E = gates.shape
    C = expert_capacity(S, E, float(capacity_factor), int(min_capacity))
    return torch.tensor(C, device="cpu")


def top1gating(
    logits: Tensor,
    capacity_factor: float,
    min_capacity: int,
    used_token: Tensor | None = None,
    noisy_gate_policy: NoisePolicy | None = None,
    drop_tokens: bool = True,
    use_rts: bool = True,
    ep_group: dist.ProcessGroup | bool | None = None,
    sparse_routes: bool = False,
    use_tutel: bool = False,
) -> tuple:
    """Choose one expert per token: (l_aux, combine_weights, dispatch_mask, exp_counts).

    logits: [S, E]
    used_token: [S], 0 where a token is not routed
    noisy_gate_policy: "RSample" adds Gumbel noise to the scores that the choice is made on
    use_rts: keep a random C of an expert's tokens, else the first C
    ep_group: without dropping, its ranks use their largest C. A bool is use_tutel, which has this
        position in DeepSpeed 0.7.
    sparse_routes, use_tutel: return index lists in a tuple of seven (see masks.py)
    """
    if isinstance(ep_group, bool):
        use_tutel = ep_group
        ep_group = None
    logits = _wide(logits, "top1gating")
    noisy = noisy_gate_policy == "RSample"
    scores = logits.detach() + choice_scores.gumbel(logits) if noisy else None
    routing = route(
        logits,
        1,
        choice_scores=scores,
        used_token=used_token,
        capacity=_rows(logits, capacity_factor, min_capacity, drop_tokens),
        drop_policy="random" if use_rts else "position",
    )
    return form(routing, sparse_routes, use_tutel, ep_group)


def top2gating(
    logits: Tensor,
    capacity_factor: float,
    min_capacity: int,
    drop_tokens: bool = True,
    ep_group: dist.ProcessGroup | None = None,
    top2_2nd_expert_sampling: bool = True,
    sparse_routes: bool = False,
) -> tuple:
    """Choose two experts per token; first choices queue first. Otherwise as `top1gating`.

    top2_2nd_expert_sampling: make the second choice on logits with Gumbel noise
    """
    logits = _wide(logits, "top2gating")
    scores = None
    if top2_2nd_expert_sampling:
        fixed = logits.detach()
        scores = choice_scores.keep_first(fixed, fixed + choice_scores.gumbel(fixed))
    routing = route(
        logits,
        2,
        choice_scores=scores,
        normalize="after",
        capacity=_rows(logits, 2 * capacity_factor, min_capacity, drop_tokens),
    )
    return form(routing, sparse_routes, False, ep_group)


def topkgating(
    logits: Tensor,
    k: int,
    capacity_factor: float,
    min_capacity: int,
    drop_tokens: bool = True,
    ep_group: dist.ProcessGroup | None = None,
    drop_policy: DropPolicy = "probs",
    sparse_routes: bool = False,
) -> tuple:
    """Choose k experts per token; routes queue token after token. Otherwise as `top1gating`.

    drop_policy: "probs" keeps the most probable of an expert's tokens, "position" the first
    """

    def all_choices(routing: Routing) -> Tensor:
        return load_balance_loss(routing.importance, routing.plan.load, logits.shape[0], k)

    logits = _wide(logits, "topkgating")
    routing = route(
        logits,
        k,
        normalize="after",
        capacity=_rows(logits, k * capacity_factor, min_capacity, drop_tokens),
        drop_policy=drop_policy,
        order="token",
        aux_loss=all_choices,
    )
    return form(routing, sparse_routes, False, ep_group)


def _wide(logits: Tensor, name: str) -> Tensor:
    check = checks.Check(name)
    check.shape("logits", logits, [("S", None), ("E", None)])
    check.floating("logits", logits)
    return logits.to(checks.accumulate_dtype(logits.dtype))


def _rows(logits: Tensor, factor: float, min_capacity: int, drop_tokens: bool) -> int | None:
    S, E = logits.shape
    return expert_capacity(S, E, factor, min_capacity) if drop_tokens else None
