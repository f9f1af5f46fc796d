"""DeepSpeed's forms of a routing: masks and index lists, from a plan and back.

S tokens, E experts, C capacity, locations within an expert, as in deepspeed/moe/sharded_moe.py of
DeepSpeed 0.19. Masks are quadratic in the tokens, since E * C grows with S; layers use plans.
"""

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
    """Return the routing in the form that the flags of DeepSpeed's gates ask for.

    Without a flag it is (l_aux, combine_weights [S, E, C], dispatch_mask [S, E, C] bool, exp_counts
    [E] int64), with one (l_aux, C [] int64, E, indices, locations, gates, exp_counts). The routes
    are then [K, S] with int32 indices and locations, with use_tutel lists of K tensors [S]. A
    dropped route has index -1, location 0 and gate 0.
    """
    C = _capacity(routing, ep_group)
    plan, weights, l_aux = routing.plan, routing.weights, routing.l_aux
    S, E = weights.shape[0], plan.num_experts
    exp_counts = plan.load.to(torch.int64)
    kept = plan.slots >= 0
    indices = torch.where(kept, plan.expert_ids, -1).long()
    locations = torch.where(kept, plan.slots - plan.offsets[indices.clamp(min=0)], 0).long()
    lists: list
    if sparse_routes:
        lists = [x.t().contiguous() for x in (indices.int(), locations.int(), weights)]
        return l_aux, torch.tensor(C, device="cpu"), E, *lists, exp_counts
    if use_tutel:
        lists = [list(x.unbind(dim=1)) for x in (indices, locations, weights)]
        return l_aux, torch.tensor(C, device="cpu"), E, *lists, exp_counts
    # Dropped routes go to a last column, which is cut off.
    column = torch.where(kept, indices * C + locations, E * C)
    flat = weights.new_zeros(S, E * C + 1).scatter(1, column, weights)
    combine_weights = flat[:, :-1].reshape(S, E, C)
    return l_aux, combine_weights, combine_weights.bool(), exp_counts


def _capacity(routing: Routing, ep_group: dist.ProcessGroup | None) -> int:
    """C; without a capacity the largest load in the group, read back from the device."""
    if routing.plan.capacity is not None:
        return routing.plan.capacity
    largest = routing.plan.load.max().long()
    if ep_group is not None and dist.get_world_size(ep_group) > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=ep_group)
    return int(largest)


def plan_of(result: tuple, tokens: Tensor) -> tuple[Plan, Tensor, Tensor, Tensor]:
    """Make a plan from any of the forms: (plan, weights [S, K], l_aux, exp_counts).

    result: the return value of a gate written for DeepSpeed
    Rows are assigned anew in the order of the tokens: an expert's output for a row does not depend
    on its position. With masks every expert is one of a token's choices, K = E.
    """
    if not isinstance(result, tuple | list) or len(result) not in (4, 7):
        got = f"{len(result)} things" if isinstance(result, tuple | list) else type(result).__name__
        raise RuntimeError(
            "MOELayer: gate must return (l_aux, combine_weights [S, E, C], dispatch_mask "
            "[S, E, C], exp_counts), or the seven of sparse routes, or be a moe_ext.TopKGate or "
            f"have its num_experts and route; got {got}"
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
        # [K, S], or a list of K tensors [S].
        expert_ids, weights = (torch.stack(list(routes), dim=-1) for routes in (indices, gates))
        check.shape("indices", expert_ids, [("S", S), ("K", None)])
        check.shape("gates", weights, [("S", S), ("K", expert_ids.shape[1])])
        weights = torch.where(expert_ids >= 0, weights, 0)
    plan = make_plan(expert_ids.to(torch.int32), int(E), int(C), order="token")
    return plan, weights.to(checks.accumulate_dtype(tokens.dtype)), l_aux, exp_counts
