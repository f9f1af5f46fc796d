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
    with torch.device("cpu"):
        gate = TopKGate(H, E, k, **options)
    return gate.to(torch.get_default_device())


def tokens(number=T) -> torch.Tensor:
    """The same on every device."""
    drawn = torch.randn(number, H, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device())


def chosen(routing) -> torch.Tensor:
    return routing.plan.expert_ids.long()
