"""Scores used for top-k selection where they are not the logits: noise, groups, balance.

`gate` takes them as `choice_scores`, [T, E]. No gradient flows through a choice, so these functions
have none.
"""

import math
from typing import get_args

import torch
from torch import Tensor
from torch.types import Device

from ..ops import reference
from ..options import GroupScore
from .capacity import float32

GROUP_SCORES = get_args(GroupScore)


def uniform(x: Tensor, low: float, high: float) -> Tensor:
    """Draw a number in [low, high) for every element of x.

    The draw is one torch.rand in float32: equal seeds give equal draws for every dtype.

    Args:
        x: any shape; its shape and device are used
        low: the smallest number
        high: the bound above
    """
    low, high = (
        math.copysign(float32(abs(bound)), bound) if bound else 0.0 for bound in (low, high)
    )
    return low + torch.rand(x.shape, device=x.device, dtype=torch.float32) * (high - low)


def gumbel(x: Tensor) -> Tensor:
    """Draw Gumbel(0, 1) noise for every element of x.

    argmax(x + gumbel(x)) is a sample of softmax(x).

    Args:
        x: any shape; its shape and device are used
    """
    info = torch.finfo(torch.float32)
    return -(-uniform(x, info.tiny, 1 - info.eps).log()).log()


def keep_first(scores: Tensor, drawn: Tensor) -> Tensor:
    """Put the first choice of `scores` above all in `drawn`: NaN ranks above infinity.

    Args:
        scores: [T, E]
        drawn: [T, E], scores with noise
    """
    return drawn.scatter(-1, scores.argmax(dim=-1, keepdim=True), torch.nan)


def group_mask(
    scores: Tensor, num_groups: int, topk_groups: int, group_score: GroupScore
) -> Tensor:
    """Mark the experts in the best groups of every token.

    Args:
        scores: [T, E]
        num_groups: consecutive experts form groups of E / num_groups
        topk_groups: how many groups a token may use
        group_score: groups compare by their largest score, "max" (DeepSeek-V2, arXiv
            2405.04434), or by the sum of the two largest, "top2_sum" (DeepSeek-V3, arXiv
            2412.19437)

    Returns:
        [T, E] bool
    """
    groups = scores.unflatten(-1, (num_groups, -1))
    if group_score == "max":
        worth = groups.amax(dim=-1)
    else:
        worth = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(dim=-1)
    # Stable as the gate's choice: the lower of two equal groups wins.
    best = reference.stable_order(worth, descending=True)[:, :topk_groups]
    chosen = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, best, True)
    return chosen.unsqueeze(-1).expand_as(groups).flatten(-2)


def within(scores: Tensor, allowed: Tensor) -> Tensor:
    """Push scores that are not allowed below every allowed one, -inf included.

    Args:
        scores: [T, E]
        allowed: [T, E] bool
    """
    lowest = torch.finfo(scores.dtype).min
    return torch.where(allowed, scores.clamp(min=lowest), -torch.inf)


def sinkhorn(logits: Tensor, used_token: Tensor | None = None, iterations: int = 8) -> Tensor:
    """Add a number to each expert's logits that balances the demand for experts.

    The softmax of the result has column sums near T / E. This is Sinkhorn's algorithm in
    logarithms; its last step is over the columns (S-BASE, arXiv 2202.01169). A token that is not
    used, or whose logsumexp is not finite, takes no part and keeps its logits.

    Args:
        logits: [T, E]
        used_token: T values of any shape and dtype; a token with 0 (or False) is not used
        iterations: passes over rows and columns
    """
    takes_part = logits.logsumexp(dim=-1, keepdim=True).isfinite()
    if used_token is not None:
        takes_part = takes_part & (used_token.reshape(-1, 1) != 0)
    x = torch.where(takes_part, logits, 0)
    columns = torch.zeros_like(x[:1])
    for _ in range(iterations):
        rows = -(x + columns).logsumexp(dim=-1, keepdim=True)
        asked = torch.where(takes_part, x + rows, -torch.inf).logsumexp(dim=0, keepdim=True)
        # An expert that no token may choose keeps its number.
        columns = torch.where(asked.isfinite(), -asked, 0)
    return torch.where(takes_part, x + columns, logits)


def round_robin(num_tokens: int, k: int, num_experts: int, device: Device = None) -> Tensor:
    """Give route t * K + k the expert of that number modulo E: a balanced load.

    Args:
        num_tokens: T
        k: K
        num_experts: E
        device: of the result

    Returns:
        [T, K] int32
    """
    routes = torch.arange(num_tokens * k, device=device)
    return (routes % num_experts).to(torch.int32).view(num_tokens, k)
