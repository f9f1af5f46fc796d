"""DeepSpeed's gate: moe_ext's rule under DeepSpeed's names and arguments."""

import inspect
import sys
from collections.abc import Callable
from typing import Any, NoReturn, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.types import Device

from .. import options
from ..options import Balancing, DropPolicy, GroupScore, NoisePolicy, Normalize, Order, Scoring
from ..process_group import GroupAttribute
from ..routing.gate import Gate, takes_with_loss
from ..routing.route import Routing
from ..routing.rule import Rule
from . import masks
from .timers import Timers

# The noise_scale for None. "Gaussian" takes 1 / E, as in Tutel.
NOISE_SCALES: dict[NoisePolicy | None, float | None] = {
    None: 0.0,
    "None": 0.0,
    "Jitter": 1e-2,
    "RSample": 1.0,
    "Gaussian": None,
}
TOPK_GATE_TIMER = "topk_gate"
# Options that a rule has under the same name, and options that are True or False.
_SAME = "k", "min_capacity", "scoring", "scale", "num_groups", "topk_groups", "group_score"
_FLAGS = (
    *("drop_tokens", "use_rts", "top2_2nd_expert_sampling"),
    *("noise_in_eval", "sampling_in_eval"),
)
# The names that other options take.
_NAMES: dict[str, tuple] = {
    "noisy_gate_policy": tuple(NOISE_SCALES),
    "drop_policy": (None, *get_args(DropPolicy)),
    "order": (None, *get_args(Order)),
    "normalize": (None, *get_args(Normalize)),
    "balancing": (None, *get_args(Balancing)),
    **dict.fromkeys(_FLAGS, (True, False)),
}
# The options that make the rules: they may change later, as attributes.
_OPTIONS = {*_SAME, *_NAMES, "capacity_factor", "eval_capacity_factor", "noise_scale"}


def rules_of(given: dict[str, Any], num_experts: int) -> tuple[Rule, Rule]:
    """Check the options of TopKGate and translate them to its rules, in training and evaluation.

    Integers in `given` become int. Raises ValueError for an option that is out of range.
    """
    owner = "TopKGate"
    given["k"] = options.integer(owner, "k", given["k"], 1)
    given["min_capacity"] = options.integer(owner, "min_capacity", given["min_capacity"], 0)
    options.names(owner, **{name: (given[name], names) for name, names in _NAMES.items()})
    noise_scale = 0 if given["noise_scale"] is None else given["noise_scale"]
    options.numbers(
        owner,
        capacity_factor=(given["capacity_factor"], 1e-6, 1e6),
        eval_capacity_factor=(given["eval_capacity_factor"], 1e-6, 1e6),
        noise_scale=(noise_scale, 0, 1e6),
    )
    rules = rule_of(given, num_experts, True), rule_of(given, num_experts, False)
    for rule in rules:
        rule.check(owner, num_experts)
    return rules


def rule_of(given: dict[str, Any], num_experts: int, training: bool) -> Rule:
    """Translate the options of TopKGate to the rule of a mode; None is DeepSpeed's default."""
    k = given["k"]
    draws = training or given["sampling_in_eval"]
    drop_policy, order, normalize = given["drop_policy"], given["order"], given["normalize"]
    if drop_policy is None:
        is_random = k == 1 and given["use_rts"]
        drop_policy = "random" if is_random else "probs" if k > 2 else "position"
    if order is None:
        order = "token" if drop_policy == "probs" else "choice"
    if drop_policy == "random" and not draws:
        drop_policy = "position"
    if normalize is None:
        normalize = "never" if k == 1 else "after"
    noise = given["noisy_gate_policy"] if training or given["noise_in_eval"] else None
    noise = None if noise == "None" else noise
    noise_scale = NOISE_SCALES[noise] if given["noise_scale"] is None else given["noise_scale"]
    factor = given["capacity_factor" if training else "eval_capacity_factor"]
    balancing = given["balancing"]
    samples = k == 2 and given["top2_2nd_expert_sampling"] and draws and noise != "RSample"
    noise = None if noise_scale == 0 else noise
    return Rule(
        **{name: given[name] for name in _SAME},
        capacity_factor=factor if given["drop_tokens"] else None,
        drop_policy=drop_policy,
        order=order,
        normalize=normalize,
        balancing=None if balancing == "sinkhorn" and not training else balancing,
        noise=noise,
        noise_scale=1 / num_experts if noise_scale is None else noise_scale,
        sample_second=samples,
    )


class _NotForAutoEP:
    """A missing attribute; DeepSpeed's AutoEP gets an error of its own.

    AutoEP replaces layers by name and reads the weight of their gate.
    """

    def __get__(self, module: nn.Module | None, owner: type) -> NoReturn:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("deepspeed.module_inject.auto_ep"):
            raise RuntimeError(
                "TopKGate: DeepSpeed's AutoEP cannot replace a layer of moe_ext, which divides its "
                'experts itself; leave "expert_parallel" out of the engine\'s config'
            )
        raise AttributeError(f"{owner.__name__!r} object has no attribute 'weight'")


class TopKGate(Gate):
    """A top-k gate under DeepSpeed's name and arguments, with every other rule as an option.

    The gate computes in float32, or in float64 where the input or a weight is float64, under
    autocast too; it casts weights of other dtypes per call. All options but model_dim, num_experts,
    expert_bias and router are attributes that may change later: a change makes `rule` and
    `eval_rule` anew, so set options, not rules; one that does not fit the other options raises
    ValueError and changes nothing. With `wall_clock_breakdown`, `gate_time` sums the time of all
    calls in milliseconds; torch.compile does not support that.

    Args:
        model_dim: H
        num_experts: E
        k: choices per token, 1..E
        capacity_factor: in training an expert takes
            max(ceil(T / E * k * capacity_factor), min_capacity) routes
        eval_capacity_factor: the same in evaluation
        min_capacity: routes that an expert takes at least
        noisy_gate_policy: in training, "Jitter" multiplies the router's input by a uniform number
            in 1 ± noise_scale; "RSample" adds Gumbel noise times noise_scale to the scores that the
            choice is made on; "Gaussian" adds normal noise of deviation noise_scale to the logits,
            and so changes the weights
        drop_tokens: False drops nothing. True makes a token's output depend on the other tokens of
            its batch, which compete with it for capacity.
        use_rts: in training, k = 1 drops at random (random token selection)
        ep_group: ranks that agree on C where `forward` does not drop
        top2_2nd_expert_sampling: in training with k = 2, the second choice is made on scores with
            Gumbel noise
        drop_policy: which routes are dropped: "random"; "position", the last to queue; "probs", the
            smallest score. None takes DeepSpeed's: "random" for k = 1 with use_rts, "probs" for
            k > 2, else "position". In evaluation "random" means "position".
        order: how routes queue, "choice" (all first choices, then all second ones) or "token". None
            takes DeepSpeed's: "token" for the policy "probs", else "choice".
        scoring: "softmax", "sigmoid" or "sqrtsoftplus"; probs = scoring(logits)
        normalize: divide a token's weights by their sum "before" or "after" dropping, or "never".
            None takes DeepSpeed's: "never" for k = 1, else "after". With softmax, "before" makes
            the weights a softmax over the chosen logits.
        scale: factor on the weights
        num_groups: a token chooses within its best groups (see `choice_scores.group_mask`); one
            group is no limit
        topk_groups: how many groups a token may use
        group_score: how groups are compared, "max" or "top2_sum"
        expert_bias: add a buffer expert_bias [E] to the scores that the choice is made on;
            `update_bias` balances the load with it
        balancing: in training, "sinkhorn" chooses on `choice_scores.sinkhorn` of the logits;
            "forced" gives every expert equally many routes, for benchmarks
        noise_scale: see noisy_gate_policy; None is 0.01 for Jitter, 1 for RSample and
            1 / E for Gaussian
        noise_in_eval: noisy_gate_policy in evaluation too
        sampling_in_eval: random token selection and sampling of the second expert in evaluation
            too, as in DeepSpeed
        aux_loss: computes l_aux [] from a Routing. None takes the load-balance loss of first
            choices for k <= 2 and of all choices for more. It is a mean over all T tokens, unused
            ones included, as in DeepSpeed.
        router: a module that maps [T, H] to logits [T, E]; None makes an nn.Linear without bias
        device: of the parameters
        dtype: of the parameters

    Raises:
        ValueError: an argument is out of range

    Examples:
        A gate that drops nothing, and its decision for five tokens:

        >>> import torch, moe_ext
        >>> gate = moe_ext.TopKGate(
        ...     model_dim=16, num_experts=4, k=2, drop_tokens=False, normalize="before"
        ... )
        >>> routing = gate.eval().route(torch.randn(5, 16))
        >>> routing.weights.shape, routing.plan.expert_ids.shape, routing.plan.load.sum().item()
        (torch.Size([5, 2]), torch.Size([5, 2]), 10)
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
        arguments = dict(locals())
        given = {name: value for name, value in arguments.items() if name in _OPTIONS}
        num_experts = options.integer("TopKGate", "num_experts", num_experts, 1)
        rules = rules_of(given, num_experts)
        if ep_group is not None and not isinstance(ep_group, dist.ProcessGroup):
            raise ValueError(
                f"TopKGate: ep_group must be None or a process group, got {ep_group!r}"
            )
        super().__init__(
            model_dim,
            num_experts,
            *rules,
            expert_bias=expert_bias,
            aux_loss=aux_loss,
            router=router,
            device=device,
            dtype=dtype,
        )
        for name, value in given.items():
            super().__setattr__(name, value)
        self.ep_group = ep_group
        self.timers = Timers()
        self.wall_clock_breakdown = False
        self.gate_time = 0.0

    def __setattr__(self, name: str, value: Any) -> None:
        # A subclass may set an option before this constructor does.
        if name in _OPTIONS and "eval_rule" in vars(self):
            given = {option: getattr(self, option) for option in _OPTIONS} | {name: value}
            self.rule, self.eval_rule = rules_of(given, self.num_experts)
            value = given[name]
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """The options that differ from the default."""
        shown = [f"k={self.k}"]
        for name, parameter in inspect.signature(TopKGate).parameters.items():
            # A group may be destroyed.
            if name in ("model_dim", "num_experts", "k", "router", "ep_group"):
                continue
            value = getattr(self, name, parameter.default)
            if name == "expert_bias":
                value = value is not None
            if value != parameter.default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)

    def _set_ep_group(self, ep_group: dist.ProcessGroup | None) -> None:
        if self.ep_group is not None:
            raise RuntimeError("TopKGate: ep_group has been set already")
        self.ep_group = ep_group

    @takes_with_loss
    def route(
        self,
        tokens: Tensor,
        used_token: Tensor | None = None,
        expert_ids: Tensor | None = None,
        *,
        with_loss: bool = True,
    ) -> Routing:
        """Choose the experts of every token; with `wall_clock_breakdown`, add to `gate_time`.

        Args:
            tokens: [T, H]
            used_token: T values of any shape and dtype; a token with 0 (or False) is not routed
            expert_ids: [T, K] int32, a recorded choice to make again; -1 is none
            with_loss: compute l_aux in any case; else it may be None
        """
        if not self.wall_clock_breakdown:
            return super().route(tokens, used_token, expert_ids, with_loss=with_loss)
        with self.timers.time(TOPK_GATE_TIMER):
            routing = super().route(tokens, used_token, expert_ids, with_loss=with_loss)
        self.gate_time = self.timers(TOPK_GATE_TIMER).elapsed(reset=False)
        return routing

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        used_token: Tensor | None = None,
        sparse_routes: bool = False,
        use_tutel: bool = False,
    ) -> tuple:
        """Route, and return one of DeepSpeed's tuples; moe_ext's layers do not use this.

        exp_counts counts all choices before dropping, on the input's device. Without dropping, C is
        the largest load, which is read back from the device.

        Args:
            input: [T, H]
            used_token: as for `route`
            sparse_routes: return index lists in a tuple of seven (see masks.py)
            use_tutel: the same as lists of tensors

        Returns:
            (l_aux, combine_weights [T, E, C], dispatch_mask [T, E, C], exp_counts [E] int64), or a
            tuple of seven
        """
        routing = self.route(input, used_token)
        return masks.form(routing, sparse_routes, use_tutel, self.ep_group)
