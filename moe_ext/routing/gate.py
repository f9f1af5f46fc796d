"""The gate module: a router and a routing rule."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.types import Device

from .. import options
from ..ops import checks, reference
from ..ops.functional import has_autocast
from ..ops.registry import is_exporting
from . import choice_scores
from .route import Routing, route
from .routers import LinearRouter, WideProduct, dtype_of_logits, is_wide_product, logits_of
from .rule import Rule


def takes_with_loss(route: Callable) -> Callable:
    """Mark a gate's `route` that takes with_loss: layers leave out a loss that nobody may read.

    A gate that overrides `route` is not marked, and keeps its loss in every call.
    """
    route.takes_with_loss = True  # type: ignore[attr-defined]
    return route


class Gate(nn.Module):
    """A router, and the rule by which its logits choose the experts of each token.

    The gate computes in float32, or in float64 where the input or a weight is float64, under
    autocast too; it casts weights of other dtypes per call. The rules may be replaced later.

    Args:
        model_dim: H
        num_experts: E
        rule: how tokens choose in training
        eval_rule: how they choose in evaluation; None takes `rule`
        expert_bias: add a buffer expert_bias [E] to the scores that the choice is made on;
            `update_bias` balances the load with it
        aux_loss: computes l_aux [] from a Routing. None takes the load-balance loss of first
            choices for k <= 2 and of all choices for more, a mean over all T tokens, used or not.
        router: a module that maps [T, H] to logits [T, E]; None makes an nn.Linear without bias
        device: of the parameters
        dtype: of the parameters

    Raises:
        ValueError: an argument is out of range
    """

    __prepare_scriptable__ = checks.refuse_torchscript
    rule: Rule
    eval_rule: Rule
    expert_bias: Tensor | None

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        rule: Rule,
        eval_rule: Rule | None = None,
        *,
        expert_bias: bool = False,
        aux_loss: Callable[[Routing], Tensor] | None = None,
        router: nn.Module | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        self.model_dim = options.integer(owner, "model_dim", model_dim, 0)
        self.num_experts = options.integer(owner, "num_experts", num_experts, 1)
        self.rule = rule
        self.eval_rule = rule if eval_rule is None else eval_rule
        for name, checked in (("rule", rule), ("eval_rule", self.eval_rule)):
            if not isinstance(checked, Rule):
                raise ValueError(f"{owner}: {name} must be a Rule, got {checked!r}")
            checked.check(owner, self.num_experts)
        options.names(owner, expert_bias=(expert_bias, (True, False)))
        if router is not None and not isinstance(router, nn.Module):
            raise ValueError(f"{owner}: router must be None or a module, got {router!r}")
        if aux_loss is not None and not callable(aux_loss):
            raise ValueError(
                f"{owner}: aux_loss must be None or a function of a Routing, got {aux_loss!r}"
            )
        self.aux_loss = aux_loss
        if router is None:
            router = LinearRouter(self.model_dim, self.num_experts, device=device, dtype=dtype)
        self.wg = router
        bias = None
        if expert_bias:
            bias = torch.zeros(self.num_experts, device=device, dtype=torch.float32)
        self.register_buffer("expert_bias", bias)

    def reset_parameters(self) -> None:
        for module in self.wg.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        if self.expert_bias is not None:
            self.expert_bias.zero_()

    def extra_repr(self) -> str:
        shown = f"rule={self.rule}"
        if self.eval_rule != self.rule:
            shown += f", eval_rule={self.eval_rule}"
        return shown if self.expert_bias is None else f"{shown}, expert_bias=True"

    def _apply(self, fn, recurse: bool = True):
        """Keep expert_bias in float32: steps of 0.001 are rounded away in 16 bits."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        moved = self.expert_bias
        if bias is not None and moved is not None and moved.dtype != torch.float32:
            self.expert_bias = bias.to(moved.device)
        return self

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        if self.expert_bias is not None:  # load_state_dict(assign=True) takes a dict's own tensor
            self.expert_bias = self.expert_bias.float()

    def capacity(self, num_tokens: int) -> int | None:
        """Rows an expert may have in the current mode; None without limit.

        Args:
            num_tokens: T

        Raises:
            RuntimeError: torch.export traces with an unknown number of tokens
        """
        capacity_factor = self._current_rule().capacity_factor
        if capacity_factor is not None and is_exporting() and isinstance(num_tokens, torch.SymInt):
            raise RuntimeError(
                f"{type(self).__name__}: torch.export with a capacity needs a fixed number of "
                "tokens; a gate that drops nothing (capacity_factor=None in a Rule, "
                "drop_tokens=False in a TopKGate) exports with any"
            )
        return self._current_rule().capacity(num_tokens, self.num_experts)

    def _current_rule(self) -> Rule:
        return self.rule if self.training else self.eval_rule

    def forward(
        self, tokens: Tensor, used_token: Tensor | None = None, expert_ids: Tensor | None = None
    ) -> Routing:
        return self.route(tokens, used_token, expert_ids)

    @takes_with_loss
    def route(
        self,
        tokens: Tensor,
        used_token: Tensor | None = None,
        expert_ids: Tensor | None = None,
        *,
        with_loss: bool = True,
    ) -> Routing:
        """Choose the experts of every token.

        Args:
            tokens: [T, H]
            used_token: T values of any shape and dtype; a token with 0 (or False) is not routed
            expert_ids: [T, K] int32, a recorded choice to make again (`plan.expert_ids`); -1 is
                none
            with_loss: compute l_aux in any case; else it may be None

        Raises:
            RuntimeError: an argument breaks this contract
        """
        if tokens.dim() != 2 or tokens.shape[1] != self.model_dim:
            raise RuntimeError(
                f"{type(self).__name__}: tokens must be [T, H] with H = {self.model_dim}, "
                f"got {list(tokens.shape)}"
            )
        num_tokens = tokens.shape[0]
        if used_token is not None:
            options.used_token(type(self).__name__, used_token, num_tokens)
        rule = self._current_rule()
        logits = self._logits(tokens, rule)
        scores = None
        if expert_ids is None and rule.balancing == "forced":
            expert_ids = choice_scores.round_robin(
                num_tokens, rule.k, self.num_experts, tokens.device
            )
        elif expert_ids is None:
            scores = self._choice_scores(logits, used_token, rule)
        routing = route(
            logits,
            rule.k,
            choice_scores=scores,
            expert_ids=expert_ids,
            used_token=used_token,
            scoring=rule.scoring,
            normalize=rule.normalize,
            scale=rule.scale,
            capacity=self.capacity(num_tokens),
            drop_policy=rule.drop_policy,
            order=rule.order,
            aux_loss=self.aux_loss,
            with_loss=with_loss,
        )
        dtype = checks.accumulate_dtype(tokens.dtype)
        if routing.weights.dtype == dtype:
            return routing
        return routing._replace(weights=routing.weights.to(dtype))

    @torch.no_grad()
    def update_bias(
        self, load: Tensor, rate: float = 1e-3, group: dist.ProcessGroup | None = None
    ) -> None:
        """Balance without a loss (arXiv 2408.15664): raise expert_bias where the load is below
        its mean, lower it where it is above.

        Args:
            load: [E] integers, the sum of `layer.exp_counts` since the last update
            rate: the step of the bias
            group: sum the load over its ranks

        Raises:
            RuntimeError: the gate has no expert_bias, or load is not [E] integers
        """
        owner = type(self).__name__
        if self.expert_bias is None:
            raise RuntimeError(f"{owner}: update_bias needs expert_bias=True")
        if not isinstance(load, Tensor) or load.shape != self.expert_bias.shape:
            got = list(load.shape) if isinstance(load, Tensor) else load
            raise RuntimeError(
                f"{owner}: load must be [E] with E = {self.num_experts}, as exp_counts of a layer "
                f"that was called, got {got}"
            )
        if load.is_floating_point():
            # Floats above 2**24 are inexact: even loads could look uneven.
            raise RuntimeError(f"{owner}: load must be counts, integers, got {load.dtype}")
        load = load.to(self.expert_bias.device, torch.int64, copy=True)
        if group is not None:
            dist.all_reduce(load, group=group)
        self.expert_bias += rate * torch.sign(load.sum() - self.num_experts * load)

    def _logits(self, tokens: Tensor, rule: Rule) -> Tensor:
        num_tokens = tokens.shape[0]
        if rule.noise != "Jitter" and is_wide_product(self.wg, tokens):
            logits, dtype = WideProduct.call(tokens, self.wg.weight), torch.float32
        else:
            dtype = dtype_of_logits(self.wg, tokens)
            tokens = checks.as_dtype(tokens, dtype)
            if rule.noise == "Jitter":
                size = rule.noise_scale
                tokens = tokens * choice_scores.uniform(tokens, 1 - size, 1 + size)
            if has_autocast(tokens.device):
                with torch.autocast(tokens.device.type, enabled=False):
                    logits = logits_of(self.wg, tokens)
            else:
                logits = logits_of(self.wg, tokens)
        shape = (num_tokens, self.num_experts)
        if not isinstance(logits, Tensor) or logits.shape != shape:
            raise RuntimeError(
                f"{type(self).__name__}: router must return [T, E] = {list(shape)}, "
                f"got {checks.shape_of(logits)}"
            )
        logits = checks.as_dtype(logits, dtype)
        if rule.noise == "Gaussian":
            logits = logits + rule.noise_scale * torch.randn_like(logits)
        return logits

    def _choice_scores(
        self, logits: Tensor, used_token: Tensor | None, rule: Rule
    ) -> Tensor | None:
        """The scores that the choice is made on; None where they are the logits themselves."""
        noisy = logits
        if rule.noise == "RSample":
            noisy = logits + rule.noise_scale * choice_scores.gumbel(logits)
        if rule.balancing == "sinkhorn":
            noisy = choice_scores.sinkhorn(noisy, used_token)
        scores = self._scored(noisy, rule)
        allowed = None
        if rule.topk_groups < rule.num_groups:
            allowed = choice_scores.group_mask(
                scores, rule.num_groups, rule.topk_groups, rule.group_score
            )
            scores = choice_scores.within(scores, allowed)
        if rule.sample_second:
            drawn = self._scored(noisy + choice_scores.gumbel(noisy), rule)
            if allowed is not None:
                drawn = choice_scores.within(drawn, allowed)
            scores = choice_scores.keep_first(scores, drawn)
        return None if scores is logits else scores.detach()

    def _scored(self, logits: Tensor, rule: Rule) -> Tensor:
        """The scores that experts are compared by. Values matter with a bias, or sums of two."""
        sums_scores = rule.group_score == "top2_sum" and rule.topk_groups < rule.num_groups
        if self.expert_bias is None and not sums_scores:
            return logits
        scores = reference.scored(logits, rule.scoring)
        bias = self.expert_bias
        if bias is None:
            return scores
        if bias.device != scores.device:
            raise RuntimeError(
                f"{type(self).__name__}: expert_bias must be on {scores.device} like the tokens, "
                f"got {bias.device}; accelerate must not offload it: offload_buffers=False"
            )
        return scores + bias
