"""DeepSpeed's forms of a routing: masks and index lists, from a plan and back.

S tokens, E experts, C capacity, locations within an expert, as in deepspeed/moe/sharded_moe.py of
DeepSpeed 0.19. Masks are quadratic in the tokens, since E * C grows with S; layers use plans.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import checks
from ..ops.plan import Plan, make_plan
from ..routing.route import Routing


def form(
    routing: Routing,
    sparse_routes: bool,
    use_tutel: bool,
    ep_group: dist.ProcessGroup | None = None,
) -> tuple:
    """Return the routing in the form that the flags of DeepSpeed's gates ask for."""
    C = _capacity(routing, ep_group)
    if sparse_routes:
        return sparse_routes_of(routing, C)
    return tutel_routes_of(routing, C) if use_tutel else dense_routes_of(routing, C)


def _exp_counts(routing: Routing) -> Tensor:
    return routing.plan.load.to(torch.int64)


def _capacity(routing: Routing, ep_group: dist.ProcessGroup | None) -> int:
    """C; without a capacity the largest load in the group, read back from the device."""
    if routing.plan.capacity is not None:
        return routing.plan.capacity
    largest = routing.plan.load.max().long()
    if ep_group is not None and dist.get_world_size(ep_group) > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=ep_group)
    return int(largest)


def _locations(routing: Routing) -> tuple[Tensor, Tensor]:
    """Expert, -1 where dropped, and row within the expert, 0 where dropped. Both [S, K] int64."""
    plan = routing.plan
    kept = plan.slots >= 0
    expert_ids = torch.where(kept, plan.expert_ids, -1).long()
    starts = plan.offsets[expert_ids.clamp(min=0)]
    return expert_ids, torch.where(kept, plan.slots - starts, 0).long()


def dense_routes_of(routing: Routing, C: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(l_aux, combine_weights [S, E, C], dispatch_mask [S, E, C] bool, exp_counts [E] int64)."""
    S, E = routing.weights.shape[0], routing.plan.num_experts
    expert_ids, locations = _locations(routing)
    # Dropped routes go to a last column, which is cut off.
    index = torch.where(expert_ids >= 0, expert_ids * C + locations, E * C)
    flat = routing.weights.new_zeros(S, E * C + 1).scatter(1, index, routing.weights)
    combine_weights = flat[:, :-1].reshape(S, E, C)
    return routing.l_aux, combine_weights, combine_weights.bool(), _exp_counts(routing)


def sparse_routes_of(routing: Routing, C: int) -> tuple:
    """(l_aux, C [] int64, E, indices, locations, gates, exp_counts [E] int64), routes [K, S].

    indices int32, -1 where dropped; locations int32 and gates like the weights, 0 where dropped.
    """
    expert_ids, locations = _locations(routing)
    return (
        routing.l_aux,
        torch.tensor(C, device="cpu"),
        routing.plan.num_experts,
        expert_ids.t().to(torch.int32).contiguous(),
        locations.t().to(torch.int32).contiguous(),
        routing.weights.t().contiguous(),
        _exp_counts(routing),
    )


def tutel_routes_of(routing: Routing, C: int) -> tuple:
    """(l_aux, C [] int64, E, indices, locations, gates, exp_counts), lists of K tensors [S]."""
    expert_ids, locations = _locations(routing)
    return (
        routing.l_aux,
        torch.tensor(C, device="cpu"),
        routing.plan.num_experts,
        list(expert_ids.unbind(dim=1)),
        list(locations.unbind(dim=1)),
        list(routing.weights.unbind(dim=1)),
        _exp_counts(routing),
    )


def plan_of(result: tuple, tokens: Tensor) -> tuple[Plan, Tensor, Tensor, Tensor]:
    """Make a plan from any of the forms: (plan, weights [S, K], l_aux, exp_counts).

    result: the return value of a gate written for DeepSpeed
    Rows are assigned anew in the order of the tokens: an expert's output for a row does not depend
    on its position. With masks every expert is one of a token's choices, K = E.
    """
    if not isinstance(result, tuple | list) or len(result) not in (4, 7):
        what = (
            f"{len(result)} things" if isinstance(result, tuple | list) else type(result).__name__
        )
        raise RuntimeError(
            "MOELayer: gate must return (l_aux, combine_weights [S, E, C], dispatch_mask "
            "[S, E, C], exp_counts), or the seven of sparse routes, or be a moe_ext.TopKGate or "
            f"have its num_experts and route; got {what}"
        )
    check = checks.Check("MOELayer")
    S = tokens.shape[0]
    l_aux, exp_counts = result[0], result[-1]
    if len(result) == 4:
        combine_weights, dispatch_mask = result[1:3]
        check.shape("combine_weights", combine_weights, [("S", S), ("E", None), ("C", None)])
        check.floating("combine_weights", combine_weights)
        _, E, C = combine_weights.shape
        check.shape("dispatch_mask", dispatch_mask, [("S", S), ("E", E), ("C", C)])
        kept = dispatch_mask.bool().any(dim=-1)
        expert_ids = torch.where(kept, torch.arange(E, device=kept.device), -1)
        weights = combine_weights.sum(dim=-1)
    else:
        C, E, indices, _, gates = result[1:6]
        expert_ids, weights = _routes_last(indices), _routes_last(gates)
        check.shape("indices", expert_ids, [("S", S), ("K", None)])
        check.shape("gates", weights, [("S", S), ("K", expert_ids.shape[1])])
        weights = torch.where(expert_ids >= 0, weights, 0)
    plan = make_plan(expert_ids.to(torch.int32), int(E), int(C), order="token")
    return plan, weights.to(checks.accumulate_dtype(tokens.dtype)), l_aux, exp_counts


def _routes_last(routes: Tensor | list[Tensor]) -> Tensor:
    """[K, S], or a list of K tensors [S] -> [S, K]."""
    return torch.stack(list(routes), dim=-1)
