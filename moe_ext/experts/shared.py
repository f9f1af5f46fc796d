"""Shared experts: a network beside the routed ones."""

import torch
from torch import Tensor, nn

from ..ops import checks
from ..ops.plan import Plan
from .base import Experts, check_shape


class SharedExperts(Experts):
    """Experts and a shared network that every token goes through (DeepSeekMoE, arXiv 2401.06066).

    The output of a token without a route is the shared output alone.

    Args:
        experts: Experts for the routed tokens
        shared: a module that maps [T, H] to the same shape
        gate: a module that maps [T, H] to [T, 1]; its sigmoid scales the shared output, as in
            Qwen2-MoE

    Raises:
        ValueError: a part has another type
    """

    def __init__(self, experts: Experts, shared: nn.Module, gate: nn.Module | None = None) -> None:
        if not isinstance(experts, Experts):
            raise ValueError(
                f"SharedExperts: experts must be Experts, got {type(experts).__name__}"
            )
        for name, part in (("shared", shared), ("gate", gate)):
            if not isinstance(part, nn.Module) and (name, part) != ("gate", None):
                raise ValueError(
                    f"SharedExperts: {name} must be a module, got {type(part).__name__}"
                )
        super().__init__(experts.num_experts)
        self.experts = experts
        self.shared = shared
        self.gate = gate

    @property
    def hidden_size(self) -> int | None:
        return getattr(self.experts, "hidden_size", None)

    def routed(self, tokens: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        # A call of the module, so that hooks, FSDP and compile() see it.
        return self(tokens, plan, weights)

    # The interface of experts is `routed`; each class has arguments of its own here.
    def forward(  # type: ignore[override]
        self, tokens: Tensor, plan: Plan, weights: Tensor
    ) -> Tensor:
        """Add the shared output to the weighted sum of every token's experts.

        Args:
            tokens: [T, H]
            plan: for the same T tokens
            weights: [T, K]

        Returns:
            [T, H]
        """
        # Data-parallel wrappers may cast their inputs.
        weights = weights.to(checks.accumulate_dtype(tokens.dtype))
        out, of_shared = self.experts.routed_beside(
            lambda: self._of_shared(tokens), tokens, plan, weights
        )
        return out + of_shared

    def _of_shared(self, tokens: Tensor) -> Tensor:
        of_shared = self.shared(tokens)
        check_shape("SharedExperts: shared must return [T, H]", of_shared, tokens.shape)
        if self.gate is None:
            return of_shared
        scores = self.gate(tokens)
        check_shape("SharedExperts: gate must return [T, 1]", scores, (tokens.shape[0], 1))
        return of_shared * torch.sigmoid(scores)
