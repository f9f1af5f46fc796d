"""A routing rule: one frozen value that says how a gate chooses."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import get_args

from .. import options
from ..ops import checks
from ..options import Balancing, DropPolicy, GroupScore, Noise, Normalize, Order, Scoring
from . import choice_scores
from .capacity import expert_capacity
from .route import DROP_POLICIES, NORMALIZE


@dataclass(frozen=True)
class Rule:
    """How a gate chooses, in one mode: a gate has one rule for training and one for evaluation.

    Attributes:
        k, drop_policy, order, scoring, normalize, scale: as for `route`
        capacity_factor: an expert takes max(ceil(T / E * k * capacity_factor), min_capacity)
            routes; None drops nothing
        min_capacity: routes that an expert takes at least
        num_groups: a token chooses within its best groups (see `choice_scores.group_mask`)
        topk_groups: how many groups a token may use
        group_score: how groups are compared, "max" or "top2_sum"
        balancing: "sinkhorn" chooses on `choice_scores.sinkhorn` of the logits; "forced" gives
            every expert as many routes, whatever the router says; None leaves the choice alone
        noise: "Jitter" on the router's input, "Gaussian" on the logits, "RSample" on the scores
            that the choice is made on; None adds none
        noise_scale: its size, above 0 where there is noise
        sample_second: the second choice is made on scores with Gumbel noise
    """

    k: int = 1
    capacity_factor: float | None = None
    min_capacity: int = 0
    drop_policy: DropPolicy = "position"
    order: Order = "choice"
    scoring: Scoring = "softmax"
    normalize: Normalize = "never"
    scale: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    group_score: GroupScore = "max"
    balancing: Balancing | None = None
    noise: Noise | None = None
    noise_scale: float = 0.0
    sample_second: bool = False

    def __repr__(self) -> str:
        """The options that are not the default."""
        given = ((field, getattr(self, field.name)) for field in fields(self))
        shown = [f"{field.name}={value!r}" for field, value in given if value != field.default]
        return f"Rule({', '.join(shown)})"

    def check(self, owner: str, num_experts: int) -> None:
        """Check every option for E experts.

        Args:
            owner: whose rule it is, for the error
            num_experts: E

        Raises:
            ValueError: an option is out of range
        """
        options.integer(owner, "k", self.k, 1)
        if self.k > num_experts:
            raise ValueError(f"{owner}: k must be in 1..num_experts = {num_experts}, got {self.k}")
        options.integer(owner, "min_capacity", self.min_capacity, 0)
        groups = options.integer(owner, "num_groups", self.num_groups, 1)
        used_groups = options.integer(owner, "topk_groups", self.topk_groups, 1)
        options.names(
            owner,
            drop_policy=(self.drop_policy, DROP_POLICIES),
            order=(self.order, checks.ORDERS),
            scoring=(self.scoring, checks.SCORINGS),
            normalize=(self.normalize, NORMALIZE),
            group_score=(self.group_score, choice_scores.GROUP_SCORES),
            balancing=(self.balancing, (None, *get_args(Balancing))),
            noise=(self.noise, (None, *get_args(Noise))),
            sample_second=(self.sample_second, (True, False)),
        )
        factor = 1.0 if self.capacity_factor is None else self.capacity_factor
        options.numbers(
            owner,
            capacity_factor=(factor, 1e-6, 1e6),
            scale=(self.scale, -1e6, 1e6),
            noise_scale=(self.noise_scale, 0, 1e6),
        )
        if self.noise is not None and self.noise_scale == 0:
            raise ValueError(
                f"{owner}: noise_scale must be above 0 with noise = {self.noise!r}, got 0"
            )
        if num_experts % groups:
            raise ValueError(
                f"{owner}: num_groups must divide num_experts = {num_experts}, got {groups}"
            )
        if used_groups > groups:
            raise ValueError(
                f"{owner}: topk_groups must be in 1..num_groups = {groups}, got {used_groups}"
            )
        if self.k > num_experts // groups * used_groups:
            raise ValueError(
                f"{owner}: topk_groups must leave k = {self.k} experts to choose from, "
                f"got {used_groups} groups of {num_experts // groups}"
            )

    def capacity(self, num_tokens: int, num_experts: int) -> int | None:
        """Rows an expert may have; None without limit.

        Args:
            num_tokens: T
            num_experts: E
        """
        if self.capacity_factor is None:
            return None
        factor = self.k * self.capacity_factor
        return expert_capacity(num_tokens, num_experts, factor, self.min_capacity)
