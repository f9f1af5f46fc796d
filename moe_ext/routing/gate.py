"""The gate module: a router and a routing rule."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import NoReturn, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.types import Device

from .. import options
from ..deepspeed import masks
from ..deepspeed.timers import Timers
from ..ops import checks, reference
from ..ops.functional import has_autocast
from ..ops.registry import is_exporting
from ..options import Balancing, DropPolicy, GroupScore, NoisePolicy, Normalize, Order, Scoring
from ..process_group import GroupAttribute
from . import choice_scores
from .capacity import expert_capacity
from .route import DROP_POLICIES, NORMALIZE, Routing, route
from .routers import logits_of

# What a None noise_scale is; of "Gaussian" it is 1 / E, as in Tutel.
NOISE_SCALES: dict[NoisePolicy | None, float | None] = {
    None: 0.0,
    "None": 0.0,
    "Jitter": 1e-2,
    "RSample": 1.0,
    "Gaussian": None,
}
TOPK_GATE_TIMER = "topk_gate"
BALANCING = (None, *get_args(Balancing))


class _NotForAutoEP:
    """An attribute that is not there, and says so to DeepSpeed's AutoEP by an error of its own.

    AutoEP replaces layers by their names in the model, and reads the weight of their gate.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module | None, owner: type) -> NoReturn:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("deepspeed.module_inject.auto_ep"):
            raise RuntimeError(
                "TopKGate: DeepSpeed's AutoEP cannot replace a layer of moe_ext, which divides its "
                'experts by itself; leave "expert_parallel" out of the engine\'s config'
            )
        raise AttributeError(f"{owner.__name__!r} object has no attribute {self.name!r}")


class TopKGate(nn.Module):
    """A router with top-k choice, under DeepSpeed's name and arguments; and every other rule.

    Everything is computed in float32, in float64 where the input or a weight is float64, under
    autocast too; a router's other weights are cast per call. All arguments but model_dim,
    num_experts, expert_bias and router may be changed later, as attributes. With
    `wall_clock_breakdown` set, `gate_time` is the time of all calls in milliseconds; torch.compile
    does not take that.

    Args:
        model_dim: H
        num_experts: E
        k: choices per token, 1..E
        capacity_factor: in training an expert takes
            max(ceil(T / E * k * capacity_factor), min_capacity) routes
        eval_capacity_factor: the same in evaluation
        min_capacity: routes that an expert takes at least
        noisy_gate_policy: "Jitter" multiplies the router's input by a uniform number in
            1 ± noise_scale; "RSample" adds Gumbel noise times noise_scale to what the choice is
            made on; "Gaussian" adds normal noise of deviation noise_scale to the logits, thus to
            the weights too. In training only.
        drop_tokens: False drops nothing: an expert takes what comes. With True a token's output
            depends on the other tokens of its batch, which may take its place.
        use_rts: in training, k = 1 drops at random (random token selection)
        ep_group: where it has several processes, `forward` gives all the same C without dropping
        top2_2nd_expert_sampling: in training with k = 2, the second choice is made on scores with
            Gumbel noise
        drop_policy: who is dropped. "random"; "position", the last to queue; "probs", the smallest
            score. None is DeepSpeed's choice: "random" for k = 1 with use_rts, "probs" for k > 2,
            else "position". In evaluation "random" is "position".
        order: how routes queue, "choice" (all first choices, then all second ones) or "token". None
            is DeepSpeed's: "token" for the policy "probs", else "choice".
        scoring: "softmax", "sigmoid" or "sqrtsoftplus"; probs = scoring(logits)
        normalize: divide a token's weights by their sum "before" or "after" dropping, or "never".
            None is DeepSpeed's: "never" for k = 1, else "after". With softmax and "before" the
            weights are the softmax over the chosen logits.
        scale: factor on the weights
        num_groups: a token chooses within its best groups (see `choice_scores.group_mask`); one
            group is no limit
        topk_groups: how many groups a token may use
        group_score: how groups are compared, "max" or "top2_sum"
        expert_bias: a buffer expert_bias [E] is added to the scores that the choice is made on,
            and to nothing else; `update_bias` balances the load by it
        balancing: "sinkhorn" chooses on `choice_scores.sinkhorn` of the logits, in training;
            "forced" gives every expert as many routes of all tokens, whatever the router says, for
            benchmarks
        noise_scale: see noisy_gate_policy; None is 0.01, 1 or 1 / E
        noise_in_eval: noisy_gate_policy in evaluation too
        sampling_in_eval: random token selection and the second expert's sampling in evaluation too,
            as DeepSpeed has it
        aux_loss: gives l_aux [] from a Routing. None is the load-balance loss: of first choices for
            k <= 2 and of all for more, a mean over all T tokens, those that used_token takes out
            too, as DeepSpeed's is.
        router: a module that maps [T, H] to logits [T, E]; None is an nn.Linear without bias
        device: of the parameters
        dtype: of the parameters

    Raises:
        ValueError: an argument is out of range

    Examples:
        A gate that drops nothing, and what it decides for five tokens:

        >>> import torch, moe_ext
        >>> gate = moe_ext.TopKGate(
        ...     model_dim=16, num_experts=4, k=2, drop_tokens=False, normalize="before"
        ... )
        >>> routing = gate.eval().route(torch.randn(5, 16))
        >>> routing.weights.shape, routing.plan.expert_ids.shape, routing.plan.load.sum().item()
        (torch.Size([5, 2]), torch.Size([5, 2]), 10)

        In a layer:

        >>> layer = moe_ext.MOELayer(gate, moe_ext.GroupedExperts(4, hidden_size=16, ffn_size=32))
        >>> out = layer(torch.randn(3, 7, 16))
        >>> out.shape, layer.l_aux.shape
        (torch.Size([3, 7, 16]), torch.Size([]))

        DeepSeek-V3's rule:

        >>> gate = moe_ext.TopKGate(
        ...     16, 32, k=8, scoring="sigmoid", normalize="before", scale=2.5, drop_tokens=False,
        ...     expert_bias=True, num_groups=8, topk_groups=4, group_score="top2_sum",
        ... )
        >>> gate.route(torch.randn(5, 16)).weights.sum(-1).detach()
        tensor([2.5000, 2.5000, 2.5000, 2.5000, 2.5000])
    """

    ep_group = GroupAttribute()
    weight = _NotForAutoEP()

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 8,
        noisy_gate_policy: NoisePolicy | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        ep_group: dist.ProcessGroup | None = None,
        top2_2nd_expert_sampling: bool = True,
        *,
        drop_policy: DropPolicy | None = None,
        order: Order | None = None,
        scoring: Scoring = "softmax",
        normalize: Normalize | None = None,
        scale: float = 1.0,
        num_groups: int = 1,
        topk_groups: int = 1,
        group_score: GroupScore = "max",
        expert_bias: bool = False,
        balancing: Balancing | None = None,
        noise_scale: float | None = None,
        noise_in_eval: bool = False,
        sampling_in_eval: bool = False,
        aux_loss: Callable[[Routing], Tensor] | None = None,
        router: nn.Module | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model_dim = options.integer("TopKGate", "model_dim", model_dim, 0)
        self.num_experts = options.integer("TopKGate", "num_experts", num_experts, 1)
        self.k = options.integer("TopKGate", "k", k, 1)
        self.min_capacity = options.integer("TopKGate", "min_capacity", min_capacity, 0)
        if k > num_experts:
            raise ValueError(f"TopKGate: k must be in 1..num_experts = {num_experts}, got {k}")
        options.names(
            "TopKGate",
            noisy_gate_policy=(noisy_gate_policy, tuple(NOISE_SCALES)),
            drop_policy=(drop_policy, (None, *DROP_POLICIES)),
            order=(order, (None, *checks.ORDERS)),
            scoring=(scoring, checks.SCORINGS),
            normalize=(normalize, (None, *NORMALIZE)),
            group_score=(group_score, choice_scores.GROUP_SCORES),
            balancing=(balancing, BALANCING),
            drop_tokens=(drop_tokens, (True, False)),
            use_rts=(use_rts, (True, False)),
            top2_2nd_expert_sampling=(top2_2nd_expert_sampling, (True, False)),
            expert_bias=(expert_bias, (True, False)),
            noise_in_eval=(noise_in_eval, (True, False)),
            sampling_in_eval=(sampling_in_eval, (True, False)),
        )
        options.numbers(
            "TopKGate",
            capacity_factor=(capacity_factor, 1e-6, 1e6),
            eval_capacity_factor=(eval_capacity_factor, 1e-6, 1e6),
            scale=(scale, -1e6, 1e6),
            noise_scale=(0 if noise_scale is None else noise_scale, 0, 1e6),
        )
        choice_scores.check_groups("TopKGate", num_experts, k, num_groups, topk_groups)
        for name, value, fits, wanted in (
            ("ep_group", ep_group, isinstance(ep_group, dist.ProcessGroup), "a process group"),
            ("router", router, isinstance(router, nn.Module), "a module"),
            ("aux_loss", aux_loss, callable(aux_loss), "a function of a Routing"),
        ):
            if value is not None and not fits:
                raise ValueError(f"TopKGate: {name} must be None or {wanted}, got {value!r}")
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.noisy_gate_policy = noisy_gate_policy
        self.drop_tokens = drop_tokens
        self.use_rts = use_rts
        self.ep_group = ep_group
        self.top2_2nd_expert_sampling = top2_2nd_expert_sampling
        self.drop_policy = drop_policy
        self.order = order
        self.scoring = scoring
        self.normalize = normalize
        self.scale = scale
        self.num_groups = num_groups
        self.topk_groups = topk_groups
        self.group_score = group_score
        self.balancing = balancing
        self.noise_scale = noise_scale
        self.noise_in_eval = noise_in_eval
        self.sampling_in_eval = sampling_in_eval
        self.aux_loss = aux_loss
        self.timers = Timers()
        self.wall_clock_breakdown = False
        self.gate_time = 0.0
        if router is None:
            router = nn.Linear(
                self.model_dim, self.num_experts, bias=False, device=device, dtype=dtype
            )
        self.wg = router
        self.expert_bias: Tensor | None
        bias = torch.zeros(num_experts, device=device, dtype=torch.float32) if expert_bias else None
        self.register_buffer("expert_bias", bias)

    def reset_parameters(self) -> None:
        for module in self.wg.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        if self.expert_bias is not None:
            self.expert_bias.zero_()

    def extra_repr(self) -> str:
        """The options that are not what they are by default."""
        shown = [f"k={self.k}"]
        for name, parameter in inspect.signature(TopKGate).parameters.items():
            # A group may be gone.
            if name in ("model_dim", "num_experts", "k", "router", "ep_group"):
                continue
            value = getattr(self, name, parameter.default)
            if name == "expert_bias":
                value = value is not None
            if value != parameter.default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)

    def _apply(self, fn, recurse: bool = True):
        """As of every module, but expert_bias stays float32: steps of 0.001 are lost in 16 bits."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        moved = self.expert_bias
        if bias is not None and moved is not None and moved.dtype != torch.float32:
            self.expert_bias = bias.to(moved.device)
        return self

    def _set_ep_group(self, ep_group: dist.ProcessGroup | None) -> None:
        if self.ep_group is not None:
            raise RuntimeError("TopKGate: ep_group has been set already")
        self.ep_group = ep_group

    def capacity(self, num_tokens: int) -> int | None:
        """Rows an expert may have, in the present mode of training or evaluation.

        Args:
            num_tokens: T

        Returns:
            how many; None without limit
        """
        if not self.drop_tokens:
            return None
        if is_exporting() and isinstance(num_tokens, torch.SymInt):
            raise RuntimeError(
                "TopKGate: torch.export with a capacity needs a fixed number of tokens; "
                "drop_tokens=False exports with any"
            )
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        return expert_capacity(num_tokens, self.num_experts, self.k * factor, self.min_capacity)

    def route(
        self,
        tokens: Tensor,
        used_token: Tensor | None = None,
        expert_ids: Tensor | None = None,
    ) -> Routing:
        """Decide for every token.

        Args:
            tokens: [T, H]
            used_token: T values of any shape and dtype; a token with 0 (or False) is not routed
            expert_ids: [T, K] int32, a recorded choice to make again (`plan.expert_ids`); -1 is
                none

        Raises:
            RuntimeError: an argument breaks this contract
        """
        if tokens.dim() != 2 or tokens.shape[1] != self.model_dim:
            raise RuntimeError(
                f"TopKGate: tokens must be [T, H] with H = {self.model_dim}, "
                f"got {list(tokens.shape)}"
            )
        if used_token is not None:
            options.used_token("TopKGate", used_token, tokens.shape[0])
        if not self.wall_clock_breakdown:
            return self._route(tokens, used_token, expert_ids)
        with self.timers.time(TOPK_GATE_TIMER):
            routing = self._route(tokens, used_token, expert_ids)
        self.gate_time = self.timers(TOPK_GATE_TIMER).elapsed(reset=False)
        return routing

    def forward(
        self,
        input: Tensor,
        used_token: Tensor | None = None,
        sparse_routes: bool = False,
        use_tutel: bool = False,
    ) -> tuple:
        """DeepSpeed's forms of `route`, for its callers; the layer does not use them.

        exp_counts counts all choices before dropping, on the input's device. Where nothing is
        dropped C is the largest load, which is read back from the device.

        Args:
            input: [T, H]
            used_token: as of `route`
            sparse_routes: a tuple of seven, of routes (see `route_forms`)
            use_tutel: the same as lists

        Returns:
            (l_aux, combine_weights [T, E, C], dispatch_mask [T, E, C], exp_counts [E] int64), or a
            tuple of seven
        """
        routing = self.route(input, used_token)
        return masks.form(routing, sparse_routes, use_tutel, self.ep_group)

    @torch.no_grad()
    def update_bias(
        self, load: Tensor, rate: float = 1e-3, group: dist.ProcessGroup | None = None
    ) -> None:
        """Balance without a loss (arXiv 2408.15664): raise expert_bias by rate where the load is
        below its mean, lower it where it is above.

        Args:
            load: [E] integers, routes since the last update: a sum of `layer.exp_counts`
            rate: the step of the bias
            group: count the load of all its processes

        Raises:
            RuntimeError: the gate has no expert_bias, or the load is not [E] integers
        """
        if self.expert_bias is None:
            raise RuntimeError("TopKGate: update_bias needs expert_bias=True")
        if not isinstance(load, Tensor) or load.shape != self.expert_bias.shape:
            got = list(load.shape) if isinstance(load, Tensor) else load
            raise RuntimeError(
                f"TopKGate: load must be [E] with E = {self.num_experts}, as exp_counts of a layer "
                f"that was called, got {got}"
            )
        if load.is_floating_point():
            # Of rounded numbers none would be at the mean.
            raise RuntimeError(f"TopKGate: load must be counts, integers, got {load.dtype}")
        load = load.to(self.expert_bias.device, torch.int64, copy=True)
        if group is not None:
            dist.all_reduce(load, group=group)
        self.expert_bias += rate * torch.sign(load.sum() - self.num_experts * load)

    def _noise(self) -> tuple[NoisePolicy | None, float]:
        """The noise that acts in the present mode, and its size."""
        policy = self.noisy_gate_policy if self.training or self.noise_in_eval else None
        if self.noise_scale is not None:
            return policy, self.noise_scale
        scale = NOISE_SCALES[policy]
        return policy, 1 / self.num_experts if scale is None else scale

    def _draws(self) -> bool:
        """Whether random token selection and the second expert's sampling act in this mode."""
        return self.training or self.sampling_in_eval

    def _dropping(self) -> tuple[DropPolicy, Order]:
        """drop_policy and order in the present mode, DeepSpeed's where they are None."""
        policy, order = self.drop_policy, self.order
        if policy is None:
            is_random = self.k == 1 and self.use_rts
            policy = "random" if is_random else "probs" if self.k > 2 else "position"
        if order is None:
            order = "token" if policy == "probs" else "choice"
        return "position" if policy == "random" and not self._draws() else policy, order

    def _route(
        self, tokens: Tensor, used_token: Tensor | None, expert_ids: Tensor | None
    ) -> Routing:
        num_tokens = tokens.shape[0]
        logits = self._logits(tokens)
        if expert_ids is None and self.balancing == "forced":
            expert_ids = choice_scores.round_robin(
                num_tokens, self.k, self.num_experts, tokens.device
            )
        drop_policy, order = self._dropping()
        normalize = self.normalize
        if normalize is None:
            normalize = "never" if self.k == 1 else "after"
        routing = route(
            logits,
            self.k,
            choice_scores=self._choice_scores(logits, used_token) if expert_ids is None else None,
            expert_ids=expert_ids,
            used_token=used_token,
            scoring=self.scoring,
            normalize=normalize,
            scale=self.scale,
            capacity=self.capacity(num_tokens),
            drop_policy=drop_policy,
            order=order,
            aux_loss=self.aux_loss,
        )
        weights = routing.weights.to(checks.accumulate_dtype(tokens.dtype))
        return routing._replace(weights=weights)

    def _logits(self, tokens: Tensor) -> Tensor:
        dtypes = {tokens.dtype, *(p.dtype for p in self.wg.parameters())}
        tokens = tokens.to(torch.float64 if torch.float64 in dtypes else torch.float32)
        noise, size = self._noise()
        if noise == "Jitter":
            tokens = tokens * choice_scores.uniform(tokens, 1 - size, 1 + size)
        if has_autocast(tokens.device):
            with torch.autocast(tokens.device.type, enabled=False):
                logits = logits_of(self.wg, tokens)
        else:
            logits = logits_of(self.wg, tokens)
        shape = (tokens.shape[0], self.num_experts)
        if not isinstance(logits, Tensor) or logits.shape != shape:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise RuntimeError(f"TopKGate: router must return [T, E] = {list(shape)}, got {got}")
        logits = logits.to(tokens.dtype)
        if noise == "Gaussian":
            logits = logits + size * torch.randn_like(logits)
        return logits

    def _choice_scores(self, logits: Tensor, used_token: Tensor | None) -> Tensor | None:
        """What the choice is made on, None where it is the logits themselves."""
        fixed = logits
        noise, size = self._noise()
        if noise == "RSample":
            logits = fixed + size * choice_scores.gumbel(fixed)
        scores = self._selection_scores(logits, used_token)
        allowed = None
        if self.topk_groups < self.num_groups:
            allowed = choice_scores.group_mask(
                scores, self.num_groups, self.topk_groups, self.group_score
            )
            scores = choice_scores.within(scores, allowed)
        samples_second = self.k == 2 and self.top2_2nd_expert_sampling and self._draws()
        if samples_second and noise != "RSample":
            drawn = self._selection_scores(fixed + choice_scores.gumbel(fixed), used_token)
            if allowed is not None:
                drawn = choice_scores.within(drawn, allowed)
            scores = choice_scores.keep_first(scores, drawn)
        return None if scores is fixed else scores.detach()

    def _selection_scores(self, logits: Tensor, used_token: Tensor | None) -> Tensor:
        """Of logits, with noise or not, what experts compete by."""
        if self.balancing == "sinkhorn" and self.training:
            logits = choice_scores.sinkhorn(logits, used_token)
        by_sum = self.group_score == "top2_sum" and self.topk_groups < self.num_groups
        if self.expert_bias is None and not by_sum:
            return logits
        scores = reference.scored(logits, self.scoring)
        return scores if self.expert_bias is None else scores + self.expert_bias
