"""Shared by the tests of layers: a gate of width 10 with 12 experts, a layer, and tokens for it."""

import torch
from cases import FUNCTIONS
from torch import Tensor, nn
from torch.nn import functional as F

from moe_ext import GroupedExperts, MOELayer, TopKGate

T, E, H, FFN = 60, 12, 10, 12
SCORES = {
    "softmax": lambda x: x.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
}


class Apply(nn.Module):
    """A module of a function, in the place of an expert or of experts."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


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


def tokens(number=T) -> Tensor:
    """Random tokens, equal on every device."""
    drawn = torch.randn(number, H, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device())


def chosen(routing) -> Tensor:
    return routing.plan.expert_ids.long()


def layer_for(k, dtype=torch.float64, bias=False, **options) -> MOELayer:
    """A layer that drops the last to queue."""
    options = {"drop_tokens": True, "drop_policy": "position"} | options
    experts = GroupedExperts(E, H, FFN, bias=bias, dtype=dtype)
    return MOELayer(gate_for(k, dtype=dtype, **options), experts)


def expert_by_hand(experts: GroupedExperts, e: int, x: Tensor) -> Tensor:
    """The output of expert e for every token of x."""
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    up, down, up_bias, down_bias = (
        getattr(experts, name)[e] if hasattr(experts, name) else None
        for name in (up_name, "down_proj", f"{up_name}_bias", "down_proj_bias")
    )
    pre_activation = F.linear(x, up, up_bias)
    function = FUNCTIONS[experts.activation]
    if experts.activation == "swiglu_oai":
        active = function(pre_activation[:, ::2]) * (pre_activation[:, 1::2].clamp(-7, 7) + 1)
    elif experts.has_gate:
        gate, up = pre_activation.chunk(2, dim=-1)
        active = function(gate) * up
    else:
        active = function(pre_activation)
    return F.linear(active, down, down_bias)


def gradients_of(layer: MOELayer, x: Tensor, out: Tensor, l_aux: Tensor) -> tuple[Tensor, ...]:
    """The gradients of a loss of both results, for x and the parameters."""
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    loss = (out * upstream).sum() + 3 * l_aux
    return torch.autograd.grad(loss, [x, *layer.parameters()])
