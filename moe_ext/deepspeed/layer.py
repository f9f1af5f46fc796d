"""DeepSpeed's `deepspeed.moe.layer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from .. import options
from ..experts.base import Experts, first_of
from ..layer import Aux
from ..options import NoisePolicy
from . import engine
from .experts import Experts as DeepSpeedExperts
from .sharded_moe import MOELayer, TopKGate

if TYPE_CHECKING:
    from ..parallel import Groups


class MoE(engine.known_as("layer", "MoE")):  # type: ignore[misc]
    """DeepSpeed's `deepspeed.moe.layer.MoE`: a layer with its gate and copies of one expert.

    `moe(hidden, used_token=None)` returns (out like hidden, l_aux, exp_counts). If DeepSpeed is
    installed, this is a subclass of its MoE, which its engine trains, saves and loads.

    Args:
        hidden_size: H
        expert: a module that maps [..., H] to the same shape, or to a tuple that begins with it;
            every expert is a copy of it
        num_experts: E
        ep_size: ranks that share the experts, a divisor of E; `set_deepspeed_parallelism` makes
            their group
        k: as for TopKGate
        capacity_factor: as for TopKGate
        eval_capacity_factor: as for TopKGate
        min_capacity: as for TopKGate, but 4 unless set
        use_residual: add the output of `expert` itself, by a softmax over `coefficient` (Residual
            MoE, arXiv 2201.05596)
        noisy_gate_policy: as for TopKGate
        drop_tokens: as for TopKGate
        use_rts: as for TopKGate
        use_tutel: accepted for DeepSpeed's callers
        enable_expert_tensor_parallelism: accepted for DeepSpeed's callers
        top2_2nd_expert_sampling: as for TopKGate
        **gate_options: any other option of TopKGate

    Raises:
        ValueError: an argument is out of range
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: NoisePolicy | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
        **gate_options: Any,
    ) -> None:
        super().__init__()
        options.integer("MoE", "num_experts", num_experts, 1)
        if not isinstance(expert, nn.Module) or isinstance(expert, Experts | nn.ModuleList):
            raise ValueError(
                f"MoE: expert must be the module of one expert, got {type(expert).__name__}; "
                "moe_ext.Experts and ModuleExperts(nn.ModuleList(...)) go into "
                "MOELayer(gate, experts)"
            )
        options.integer("MoE", "ep_size", ep_size, 1)
        if num_experts % ep_size:
            raise ValueError(
                f"MoE: num_experts must be a multiple of ep_size = {ep_size}, got {num_experts}; "
                "moe_ext.MOELayer(gate, moe_ext.ExpertParallel.of(experts, group)) also takes "
                "other numbers"
            )
        for name in {"device", "dtype"} & gate_options.keys():
            raise ValueError(
                f"MoE: {name} must not be given to the gate alone; use expert.to() and moe.to()"
            )
        self.use_residual = use_residual
        self.enable_expert_tensor_parallelism = enable_expert_tensor_parallelism
        self.ep_size = ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        self.num_experts = num_experts
        self.num_local_experts = num_experts // ep_size
        experts = DeepSpeedExperts(expert, self.num_local_experts, self.expert_group_name)
        gate = TopKGate(
            hidden_size,
            num_experts,
            k,
            capacity_factor,
            eval_capacity_factor,
            min_capacity,
            noisy_gate_policy,
            drop_tokens,
            use_rts,
            None,
            top2_2nd_expert_sampling,
            **gate_options,
        )
        self.deepspeed_moe = MOELayer(
            gate, experts, self.expert_group_name, ep_size, self.num_local_experts, use_tutel
        )
        if use_residual:
            self.mlp = expert
            self.coefficient = nn.Linear(hidden_size, 2)

    def set_deepspeed_parallelism(
        self, use_data_before_expert_parallel_: bool = False, *, groups: Groups | None = None
    ) -> None:
        """Divide the experts among ranks. All ranks call it; DeepSpeed's engine calls it itself.

        If DeepSpeed's communication is initialised, the layer uses DeepSpeed's groups, as its
        optimizers, gradient norms and checkpoints do.

        Args:
            use_data_before_expert_parallel_: consecutive ranks hold copies, as in DeepSpeed
            groups: use these, of another layer or of `parallel.make_groups(ep_size)`; not for a
                layer in DeepSpeed's engine

        Raises:
            ValueError: the groups have two levels, which only ExpertParallel supports
            RuntimeError: another group divides the experts already
            NotImplementedError: DeepSpeed's engine runs with a tensor-parallel mpu
        """
        for parameter in self.deepspeed_moe.experts.parameters():
            # Experts that replaced the given ones are not marked yet.
            parameter.allreduce = False
            parameter.group_name = self.expert_group_name
        group = None
        if groups is None:
            group = engine.expert_group(self.ep_size, use_data_before_expert_parallel_)
        if group is None:
            if groups is None and self.ep_size == 1:
                return
            from ..parallel import make_groups

            neighbours_share = not use_data_before_expert_parallel_
            groups = groups or make_groups(self.ep_size, neighbours_share=neighbours_share)
            if not isinstance(groups.ep, dist.ProcessGroup):
                raise ValueError(
                    "MoE.set_deepspeed_parallelism: groups must have one level, as from "
                    "make_groups(ep_size), got two levels; use ExpertParallel for those"
                )
            group = groups.ep
        elif engine.name_each_expert not in self._state_dict_hooks.values():
            self.register_state_dict_post_hook(engine.name_each_expert)
        present = self.deepspeed_moe.ep_group
        if present is None:
            self.deepspeed_moe._set_ep_group(group)
        elif present.group_name != group.group_name:
            raise RuntimeError(
                "MoE.set_deepspeed_parallelism: the experts are divided by another group already. "
                "deepspeed.initialize makes the call by itself: build the model anew and leave out "
                "the call before it, or call deepspeed.init_distributed() before it and pass no "
                "groups"
            )

    def forward(
        self,
        hidden_states: Tensor,
        used_token: Tensor | None = None,
        *,
        expert_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Send every token through its experts.

        Args:
            hidden_states: [..., H]
            used_token: as for MOELayer
            expert_ids: as for MOELayer

        Returns:
            (out like hidden_states, l_aux [], exp_counts [E] int64)
        """
        layer = self.deepspeed_moe
        output = layer(hidden_states, used_token, expert_ids=expert_ids)
        return self._with_residual(output, hidden_states), layer.l_aux, layer.exp_counts

    def forward_with_aux(
        self,
        hidden_states: Tensor,
        used_token: Tensor | None = None,
        *,
        expert_ids: Tensor | None = None,
    ) -> tuple[Tensor, Aux]:
        """`forward` without side effects.

        Args:
            hidden_states: [..., H]
            used_token: as for MOELayer
            expert_ids: as for MOELayer

        Returns:
            (out, Aux(l_aux, exp_counts, expert_ids))
        """
        output, aux = self.deepspeed_moe.forward_with_aux(
            hidden_states, used_token, expert_ids=expert_ids
        )
        return self._with_residual(output, hidden_states), aux

    def _with_residual(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        if not self.use_residual:
            return output
        residual = first_of(self.mlp(hidden_states))
        shares = F.softmax(self.coefficient(hidden_states), dim=-1)
        # Autocast computes the softmax in float32.
        return (output * shares[..., 0:1] + residual * shares[..., 1:]).to(hidden_states.dtype)
