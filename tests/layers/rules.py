"""Shared by the tests of routing rules: a gate of width 10 with 12 experts, and tokens for it."""

import torch
from torch import nn

from moe_ext import TopKGate

T, E, H = 60, 12, 10
SCORES = {
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: nn.functional.softplus(x).sqrt(),
}


def gate_for(k=3, **options) -> TopKGate:
    """A gate without randomness, and without dropping unless a capacity factor is given."""
    options = {
        "use_rts": False,
        "top2_2nd_expert_sampling": False,
        "min_capacity": 0,
        "drop_tokens": "capacity_factor" in options,
        "dtype": torch.float64,
    } | options
    with torch.device("cpu"):
        gate = TopKGate(H, E, k, **options)
    return gate.to(torch.get_default_device())


def tokens(number=T) -> torch.Tensor:
    """Random tokens, equal on every device."""
    drawn = torch.randn(number, H, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device())


def chosen(routing) -> torch.Tensor:
    return routing.plan.expert_ids.long()
