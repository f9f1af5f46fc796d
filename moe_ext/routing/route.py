"""Route: choose experts from logits, place the routes, weight those that are kept."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from .. import options
from ..ops import checks
from ..ops.autograd import Balance, GatePlanBalance, MaskWeights
from ..ops.functional import Choice, gate, mask_weights
from ..ops.plan import Plan, make_plan
from ..options import DropPolicy, Normalize, Order, Scoring
from . import losses

DROP_POLICIES = get_args(DropPolicy)
NORMALIZE = get_args(Normalize)
_CHECK = checks.Check("route")
_LOGITS = ("T", None), ("E", None)


class Routing(NamedTuple):
    """The decision of a gate for T tokens. A pytree.

    Attributes:
        weights: [T, K] float32 (float64 for float64 tokens), 0 where the route was dropped
        plan: the row of every route
        probs: [T, E] scores of all experts
        importance: [E] column sums of probs
        l_aux: [] auxiliary loss, not scaled; None where it is not computed. Its gradient may reach
            the logits without passing through `importance`
        logits: [T, E] the scores come from
    """

    weights: Tensor
    plan: Plan
    probs: Tensor
    importance: Tensor
    # `Tensor | None` would have every reader rule out what only aux_loss sees.
    l_aux: Tensor | Any
    logits: Tensor

    def as_hf_tuple(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what routers of transformers return.

        Returns:
            (logits [T, E], weights [T, K], expert ids [T, K] int64); a dropped route has weight 0
        """
        return self.logits, self.weights, self.plan.expert_ids.long()


def route(
    logits: Tensor,
    k: int,
    *,
    choice_scores: Tensor | None = None,
    expert_ids: Tensor | None = None,
    used_token: Tensor | None = None,
    scoring: Scoring = "softmax",
    normalize: Normalize = "never",
    scale: float = 1.0,
    capacity: int | None = None,
    drop_policy: DropPolicy = "position",
    order: Order = "choice",
    aux_loss: Callable[[Routing], Tensor] | None = None,
    with_loss: bool = True,
) -> Routing:
    """Choose k experts for every token, give routes their rows, weight those that are kept.

    Args:
        logits: [T, E], as for `gate`
        k: choices per token, 1..E
        choice_scores: [T, E] like logits, used for the choice; None uses the logits
        expert_ids: [T, K] int32 with K = k, a recorded or forced choice; -1 is none. It overrides
            choice_scores.
        used_token: T values of any shape and dtype; a token with 0 (or False) is not routed
        scoring: "softmax", "sigmoid" or "sqrtsoftplus"; probs = scoring(logits)
        normalize: divide a token's weights by their sum "before" or "after" dropping, or "never"
        scale: factor on the weights
        capacity: rows per expert; None drops nothing
        drop_policy: which routes are dropped: "position", the last to queue; "probs", the smallest
            score; "random", by one torch.rand(T, E)
        order: how routes queue, "choice" (all first choices, then all second ones) or "token"
        aux_loss: computes l_aux from the routing, whose l_aux is None then; None takes the
            load-balance loss of first choices for k <= 2 and of all choices for more
        with_loss: compute l_aux in any case; else the load-balance loss of a softmax is left None,
            and `balance_of` computes it

    Raises:
        RuntimeError: an argument breaks this contract
    """
    _CHECK.one_of("normalize", normalize, NORMALIZE)
    _CHECK.one_of("drop_policy", drop_policy, DROP_POLICIES)
    _CHECK.shape("logits", logits, _LOGITS)
    try:
        k = operator.index(k)
    except TypeError:
        _CHECK.fail(f"k must be an integer, got {k!r}")
    masks = not (capacity is None and used_token is None and expert_ids is None)
    # The gate divides at once where nothing comes between. Probabilities that another score chose
    # may vanish: mask_weights treats those, below.
    divides_later = normalize == "after" and (masks or choice_scores is not None)
    in_gate: dict[str, Any] = {
        "scoring": scoring,
        "normalize": normalize != "never" and not divides_later,
        "scale": 1.0 if divides_later else scale,
    }
    l_aux = None
    has_priority = _has_priority(drop_policy, capacity)
    balances = with_loss and aux_loss is None and scoring == "softmax"
    if balances and not has_priority and expert_ids is None and used_token is None:
        # Nothing comes between gate, plan and balance.
        rule = scoring, in_gate["normalize"], in_gate["scale"], capacity, order, _counted(k)
        results = GatePlanBalance.call(logits, choice_scores, k, *rule)
        *parts, slots, sources, offsets, load, l_aux, _ = results
        choice = Choice(*parts)
        plan = Plan(slots, sources, offsets, load, choice.expert_ids, logits.shape[1], capacity)
    else:
        if expert_ids is None:
            choice = gate(logits, k, choice_scores=choice_scores, **in_gate)
        else:
            choice = _recorded(logits, k, expert_ids, **in_gate)
        expert_ids = choice.expert_ids
        if used_token is not None:
            options.used_token("route", used_token, logits.shape[0])
            expert_ids = torch.where(used_token.reshape(-1, 1) != 0, expert_ids, -1)
        are_scores = not in_gate["normalize"] and in_gate["scale"] == 1
        priority = _priority(choice, drop_policy, are_scores) if has_priority else None
        plan = make_plan(expert_ids, logits.shape[1], capacity, priority=priority, order=order)
    weights = choice.weights
    if masks or divides_later:
        info = torch.finfo(weights.dtype)
        # Probabilities as small as eps are noise beside those of other experts; scores that stand
        # alone are not.
        eps = info.eps if scoring == "softmax" else info.tiny
        later_scale = scale if divides_later else 1.0
        weights = mask_weights(weights, plan, normalize=divides_later, eps=eps, scale=later_scale)
    routing = Routing(weights, plan, choice.probs, choice.importance, l_aux, logits)
    if l_aux is not None:
        return routing
    if aux_loss is not None:
        l_aux = aux_loss(routing)
        if not isinstance(l_aux, Tensor) or l_aux.dim() != 0:
            _CHECK.fail(f"aux_loss must return a tensor [], got {checks.shape_of(l_aux)}")
    elif scoring != "softmax":
        importance = losses.shares(choice.probs).sum(dim=0)
        l_aux = _balance(importance, plan.load, plan.expert_ids)
    elif with_loss:
        l_aux = balance_of(routing)()
    return routing._replace(l_aux=l_aux)


def balance_of(routing: Routing) -> Callable[[], Tensor]:
    """Return a function that computes the load-balance loss; it keeps nothing of [T, E]."""
    plan = routing.plan
    return functools.partial(_balance, routing.importance, plan.load, plan.expert_ids)


def _recorded(
    logits: Tensor, k: int, expert_ids: Tensor, *, scoring: Scoring, normalize: bool, scale: float
) -> Choice:
    """`gate` for a given choice."""
    T, E = logits.shape
    _CHECK.shape("expert_ids", expert_ids, [("T", T), ("K", k)])
    _CHECK.dtype("expert_ids", expert_ids, torch.int32)
    if expert_ids.device.type != "cpu":
        # As in a plan, which raises on the CPU.
        expert_ids = torch.where(expert_ids < E, expert_ids, -1)
    choice = gate(logits, 1, scoring=scoring)
    chosen = choice.probs.gather(-1, _indices(expert_ids, E))
    # mask_weights zeroes the weight of expert -1 as that of slot -1.
    tiny = torch.finfo(chosen.dtype).tiny
    weights = MaskWeights.call(chosen, expert_ids, normalize, tiny, scale)
    return choice._replace(weights=weights, expert_ids=expert_ids)


def _has_priority(drop_policy: str, capacity: int | None) -> bool:
    """Whether routes are kept by a priority, not by the order of the queue. "random" draws one
    where nothing is dropped too, as DeepSpeed does: later draws with the same seed stay the same.
    Not under torch.func, where vmap refuses a draw that changes no result."""
    if drop_policy == "random" and capacity is None:
        return not torch._C._are_functorch_transforms_active()
    return drop_policy != "position" and capacity is not None


def _priority(choice: Choice, drop_policy: str, are_scores: bool) -> Tensor:
    """The routes' priority [T, K] float32, where there is one.

    are_scores: the weights are the unchanged scores
    """
    if drop_policy == "probs" and are_scores:
        return choice.weights.detach().to(torch.float32)
    scores = choice.probs.detach()
    if drop_policy == "random":
        scores = torch.rand(scores.shape, device=scores.device, dtype=torch.float32)
    return scores.gather(-1, _indices(choice.expert_ids, scores.shape[1])).to(torch.float32)


def _indices(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Valid indices; callers ignore the values at -1."""
    return expert_ids.clamp(0, num_experts - 1).long()


def _balance(importance: Tensor, load: Tensor, expert_ids: Tensor) -> Tensor:
    return Balance.call(importance, load, expert_ids, _counted(expert_ids.shape[1]))[0]


def _counted(k: int) -> int:
    """How many choices of a token the load-balance loss counts."""
    return 1 if k <= 2 else k
