"""DeepSpeed's layer: moe_ext's layer under DeepSpeed's names and arguments."""

import torch.distributed as dist
from torch import Tensor, nn

from .. import options
from ..experts.base import Experts
from ..experts.module import refuse_list
from ..experts.padded import refuse_wrapped, routed
from ..layer import Layer, Outcome
from ..ops.plan import Plan
from ..process_group import GroupAttribute
from ..routing.gate import Gate
from .foreign import Decision, decide, has_route
from .timers import Timers

MOE_TIMER = "moe"


class MOELayer(Layer):
    """A mixture-of-experts layer under DeepSpeed's name and arguments: a gate and experts.

    `layer(hidden, used_token=None)` returns a tensor like hidden and leaves `l_aux` and
    `exp_counts` of that call as attributes; `total_l_aux(model)` sums them over a model. Use
    `forward_with_aux`, which returns both, under checkpointing (use_reentrant=False), export and
    compile + checkpoint. In checkpoint(use_reentrant=True) the attribute `l_aux` has no gradient,
    and a loss that uses it warns. Copies and pickles hold None for both.

    A layer calls its `observer(plan, aux, routing, used_token)`, if there is one, as stats.track
    sets; routing is None for a gate written for DeepSpeed. Gate and experts may be replaced by
    others with as many experts. With `wall_clock_breakdown`, `time_moe` sums the time of all calls
    in milliseconds; torch.compile does not support that.

    Args:
        gate: a TopKGate, or a module with `num_experts` and `route(tokens, used_token)`, which may
            take recorded choices as a third argument `expert_ids`; or a gate written for DeepSpeed:
            `gate(tokens, used_token)` returns (l_aux, combine_weights [T, E, C], dispatch_mask
            [T, E, C], exp_counts [E]) or, if it knows `sparse_routes`, DeepSpeed's tuple of seven
        experts: Experts; or a module written for DeepSpeed, which maps [1, num_local_experts, C, H]
            to the same shape. Without dropping, C is then the largest load, read back from the
            device.
        ep_group_name: for DeepSpeed's callers: `experts` are this rank's part of ep_size, and
            `_set_ep_group` makes an ExpertParallel of them. Other callers pass an ExpertParallel.
        ep_size: for DeepSpeed's callers: the number of parts
        num_local_experts: experts on this rank, where `experts` does not say it
        use_tutel: accepted for DeepSpeed's callers; Tutel is not used

    Raises:
        ValueError: gate and experts do not fit
    """

    ep_group = GroupAttribute()

    def __init__(
        self,
        gate: nn.Module,
        experts: nn.Module,
        ep_group_name: str | None = None,
        ep_size: int = 1,
        num_local_experts: int | None = None,
        use_tutel: bool = False,
    ) -> None:
        options.integer("MOELayer", "ep_size", ep_size, 1)
        refuse_list("MOELayer", experts)
        if num_local_experts is None:
            num_local_experts = _num_experts(experts)
        here, is_own = num_local_experts, isinstance(experts, Experts)
        if is_own:
            here = getattr(experts, "num_local_experts", num_local_experts)
        if ep_size > 1 and here < num_local_experts:
            raise ValueError(
                f"MOELayer: ep_size must be 1 with experts that are ExpertParallel, got {ep_size}"
            )
        if is_own and num_local_experts != experts.num_experts:
            raise ValueError(
                f"MOELayer: num_local_experts must be {experts.num_experts}, "
                f"got {num_local_experts}"
            )
        if (getattr(gate, "num_experts", None) or 0) % ep_size:
            raise ValueError(
                "MOELayer: the gate's num_experts must be a multiple of ep_size, got "
                f"{gate.num_experts} and {ep_size}; with ep_size = 1 "
                "moe_ext.ExpertParallel.of(experts, group) also divides other numbers"
            )
        super().__init__(gate, experts, ep_size * num_local_experts)
        self.ep_group_name = ep_group_name
        self.ep_group = None
        self.ep_size = ep_size
        self.num_local_experts = here
        self.use_tutel = False
        self.timers = Timers()
        self.wall_clock_breakdown = False
        self.time_moe = 0.0
        # Exchanges between ranks overlap with other work: they have no time of their own.
        self.time_falltoall = 0.0
        self.time_salltoall = 0.0

    def _check_parts(self, gate: nn.Module, experts: nn.Module) -> None:
        has_route(gate)
        if not isinstance(experts, nn.Module) or isinstance(experts, Gate):
            raise ValueError(f"MOELayer: experts must be a module, got {type(experts).__name__}")
        if not isinstance(experts, Experts):
            refuse_wrapped("experts", experts)

    def _set_ep_group(self, ep_group: dist.ProcessGroup | None) -> None:
        size = 1 if ep_group is None else ep_group.size()
        if size != self.ep_size:
            raise RuntimeError(
                f"MOELayer: ep_group must have ep_size = {self.ep_size} processes, got {size}"
            )
        set_group = getattr(self.gate, "_set_ep_group", None)
        if set_group is not None:
            set_group(ep_group)
        self.ep_group = ep_group
        if ep_group is not None and size > 1:
            from ..parallel import ExpertParallel

            self.experts = ExpertParallel(
                self.experts,
                ep_group,
                num_local_experts=self.num_local_experts,
                ep_group_name=self.ep_group_name,
            )

    def _forward(
        self, hidden: Tensor, used_token: Tensor | None, expert_ids: Tensor | None
    ) -> tuple[Tensor, Outcome]:
        if not self.wall_clock_breakdown:
            return super()._forward(hidden, used_token, expert_ids)
        with self.timers.time(MOE_TIMER):
            result = super()._forward(hidden, used_token, expert_ids)
        self.time_moe = self.timers(MOE_TIMER).elapsed(reset=False)
        return result

    def _route(
        self, tokens: Tensor, used_token: Tensor | None, expert_ids: Tensor | None
    ) -> Decision:
        if self.ep_size > 1 and self.ep_group is None:
            raise RuntimeError(
                f"MOELayer: with ep_size = {self.ep_size} its process group must be set first, by "
                "MoE.set_deepspeed_parallelism() or _set_ep_group(group). deepspeed.initialize "
                "does so; deepspeed.init_inference does not, and is not supported with ep_size > 1"
            )
        return decide(self.gate, tokens, used_token, expert_ids)

    def _routed(self, tokens: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        return routed(self.experts, tokens, plan, weights)


def _num_experts(experts: nn.Module) -> int:
    for name in ("num_experts", "num_local_experts"):
        if isinstance(getattr(experts, name, None), int):
            return getattr(experts, name)
    raise ValueError(
        "MOELayer: num_local_experts must be given where experts are not moe_ext.Experts, got "
        f"{type(experts).__name__}; moe_ext.ModuleExperts(module, num_experts) makes E copies of "
        "one module"
    )
