"""DeepSpeed's `deepspeed.moe.experts`."""

import copy

import torch
from torch import Tensor, nn

from .. import options
from ..experts.base import ExpertParameters, check_shape, first_of


class Experts(ExpertParameters):
    """DeepSpeed's `Experts`: copies of a module for the parts of [ep, num_local_experts, C, H].

    expert: maps [ep, 1, C, H] to the same shape, or to a tuple that begins with it
    num_local_experts: the number of copies
    expert_group_name: the `group_name` of its parameters, which have `allreduce = False`
    """

    expert_lists = ("deepspeed_experts",)

    def __init__(
        self, expert: nn.Module, num_local_experts: int = 1, expert_group_name: str | None = None
    ) -> None:
        super().__init__()
        options.integer("Experts", "num_local_experts", num_local_experts, 1)
        self.deepspeed_experts = nn.ModuleList(
            copy.deepcopy(expert) for _ in range(num_local_experts)
        )
        self.num_local_experts = num_local_experts
        self.expert_group_name = expert_group_name
        self.mark()

    def forward(self, inputs: Tensor) -> Tensor:
        """[ep, num_local_experts, C, H] -> the same shape."""
        if inputs.dim() != 4 or inputs.shape[1] != self.num_local_experts:
            raise RuntimeError(
                "Experts: inputs must be [ep, num_local_experts, C, H] with num_local_experts = "
                f"{self.num_local_experts}, got {list(inputs.shape)}"
            )
        outputs = []
        parts = zip(self.deepspeed_experts, inputs.split(1, dim=1), strict=True)
        for e, (expert, part) in enumerate(parts):
            out = first_of(expert(part))
            check_shape(f"Experts: expert {e} must return [ep, 1, C, H]", out, part.shape)
            outputs.append(out)
        return torch.cat(outputs, dim=1)
