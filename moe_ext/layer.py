"""The layer: a gate and experts."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .experts import Experts
from .topk_gate import TopKGate


class Aux(NamedTuple):
    """What a layer says beside its output. A pytree.

    l_aux: [] load-balance loss, not scaled
    exp_counts: [E] int64, routes that asked for an expert, before dropping
    """

    l_aux: Tensor
    exp_counts: Tensor


class MOELayer(nn.Module):
    """Mixture of experts under DeepSpeed's name and arguments.

    gate: a TopKGate, or a module with its `num_experts` and `route(tokens, used_token)`
    experts: Experts of as many
    ep_group_name, ep_size, num_local_experts, use_tutel: taken for DeepSpeed's callers. All experts
        are local: ep_size is 1 and num_local_experts their number. Tutel is not used.

    `layer(hidden, used_token=None)` returns a tensor like hidden and leaves `l_aux` and
    `exp_counts` of that call as attributes. Under checkpointing, export and compile + checkpoint
    use `forward_with_aux`, which returns them. Copies and pickles leave the attributes out.
    Raises ValueError where gate and experts do not fit.
    """

    def __init__(
        self,
        gate: TopKGate,
        experts: Experts,
        ep_group_name: str | None = None,
        ep_size: int = 1,
        num_local_experts: int | None = None,
        use_tutel: bool = False,
    ) -> None:
        super().__init__()
        if not (hasattr(gate, "route") and hasattr(gate, "num_experts")):
            raise ValueError(
                "MOELayer: gate must be a moe_ext.TopKGate or have its num_experts and route, "
                f"got {type(gate).__name__}"
            )
        if not isinstance(experts, Experts):
            raise ValueError(
                f"MOELayer: experts must be moe_ext.Experts, got {type(experts).__name__}; "
                "wrap a module of one expert in moe_ext.ModuleExperts"
            )
        if gate.num_experts != experts.num_experts:
            raise ValueError(
                f"MOELayer: experts must have the gate's num_experts = {gate.num_experts}, "
                f"got {experts.num_experts}"
            )
        widths = getattr(gate, "model_dim", None), getattr(experts, "hidden_size", None)
        if None not in widths and widths[0] != widths[1]:
            raise ValueError(
                f"MOELayer: experts must have the gate's model_dim = {widths[0]} as hidden_size, "
                f"got {widths[1]}"
            )
        if ep_size != 1:
            raise ValueError(f"MOELayer: ep_size must be 1, all experts are local, got {ep_size}")
        if num_local_experts not in (None, experts.num_experts):
            raise ValueError(
                f"MOELayer: num_local_experts must be {experts.num_experts}, "
                f"got {num_local_experts}"
            )
        self.gate = gate
        self.experts = experts
        self.ep_group_name = ep_group_name
        self.ep_size = ep_size
        self.num_local_experts = experts.num_experts
        self.l_aux: Tensor | None = None
        self.exp_counts: Tensor | None = None

    def forward(self, hidden: Tensor, used_token: Tensor | None = None) -> Tensor:
        """hidden: [..., H] -> the same shape and dtype.

        used_token: a value for every token of hidden; a token with 0 (or False) gives zeros
        """
        out, aux = self.forward_with_aux(hidden, used_token)
        self.l_aux, self.exp_counts = aux
        return out

    def forward_with_aux(
        self, hidden: Tensor, used_token: Tensor | None = None
    ) -> tuple[Tensor, Aux]:
        """`forward` without side effects: (out, Aux(l_aux, exp_counts))."""
        if hidden.dim() == 0:
            raise RuntimeError("MOELayer: hidden must be [..., H], got []")
        tokens = hidden.reshape(-1, hidden.shape[-1])
        routing = self.gate.route(tokens, used_token)
        out = self.experts.routed(tokens, routing.plan, routing.weights)
        aux = Aux(routing.l_aux, routing.plan.load.to(torch.int64))
        return out.to(hidden.dtype).view(hidden.shape), aux

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "l_aux": None, "exp_counts": None}
