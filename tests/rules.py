"""What the tests of routing rules share: a gate of width 10 and 12 experts, and tokens for it."""

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
    """Without what is random, and without dropping where no capacity is asked for."""
    options = {
        "use_rts": False,
        "top2_2nd_expert_sampling": False,
        "min_capacity": 0,
        "drop_tokens": "capacity_factor" in options,
        "dtype": torch.float64,
    } | options
    return TopKGate(H, E, k, **options)


def tokens(number=T) -> torch.Tensor:
    return torch.randn(number, H, dtype=torch.float64)


def chosen(routing) -> torch.Tensor:
    return routing.plan.experts.long()
