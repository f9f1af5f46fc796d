"""The gate: who goes to which expert, with what weight, and who is dropped."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import contracts, sharded_moe
from .functional import Choice, gate, has_autocast
from .plan import Plan, make_plan

NOISE_POLICIES = (None, "None", "Jitter", "RSample")
DROP_POLICIES = ("random", "position", "probs")
JITTER = 1e-2


class Routing(NamedTuple):
    """What a gate decides for T tokens. A pytree.

    weights: [T, K] float32 (float64 for float64 tokens), 0 where the route was dropped
    plan: where every route goes
    probs: [T, E], importance: [E], the scores of all experts and their column sums
    l_aux: [] load-balance loss, not scaled
    """

    weights: Tensor
    plan: Plan
    probs: Tensor
    importance: Tensor
    l_aux: Tensor


def _float32(x):
    """x > 0 rounded to float32, in arithmetic that torch.compile traces with x unknown.

    24 bits are left of a double; a logarithm that rounds up to the next integer moves the grid only
    for an x that becomes that power of two anyway.
    """
    scale = 2.0 ** (23 - math.floor(math.log2(x)))
    return round(x * scale) / scale


def expert_capacity(num_tokens: int, num_experts: int, factor: float, min_capacity: int) -> int:
    """Rows an expert may have: max(ceil(num_tokens / num_experts * factor), min_capacity).

    The product is a float32 one, as in DeepSpeed; float64 differs for some sizes, in both
    directions (25 tokens, 2 experts, factor 1.2: 16 against 15).
    """
    if num_tokens == 0:
        return min_capacity
    # The ratio makes the factor a constant for torch.compile; the tokens may stay unknown.
    numerator, denominator = float(factor).as_integer_ratio()
    product = _float32(num_tokens / num_experts) * _float32(numerator / denominator)
    return max(math.ceil(_float32(product)), min_capacity)


def load_balance_loss(importance: Tensor, load: Tensor, num_tokens: int, choices: int) -> Tensor:
    """E / choices * sum over e of importance[e] / T * load[e] / T; 1 where both are even.

    importance: [E] column sums of the probabilities, differentiable
    load: [E] how often an expert was chosen, counting `choices` choices of every token
    The loss of Switch Transformers (arXiv 2101.03961, eq. 4) for choices = 1.
    """
    tokens = max(num_tokens, 1)
    shares = (importance / tokens) * (load.to(importance.dtype) / tokens)
    return shares.sum() * (importance.shape[0] / choices)


def _gumbel_like(x: Tensor) -> Tensor:
    return -torch.empty_like(x).exponential_().log()


class TopKGate(nn.Module):
    """A linear router with top-k choice, under DeepSpeed's name and arguments.

    model_dim: H
    num_experts: E
    k: choices per token, 1..E. With k = 1 a weight is the softmax probability; with more the
        weights of a token's kept routes are divided by their sum.
    capacity_factor, eval_capacity_factor: an expert takes
        max(ceil(T / E * k * factor), min_capacity) routes
    noisy_gate_policy: in training only, "Jitter" multiplies the gate's input by a uniform number
        in 1 ± 0.01 and "RSample" adds Gumbel noise to the scores that the choice is made on
    drop_tokens: False drops nothing: an expert takes what comes
    use_rts: in training, k = 1 drops at random (random token selection)
    ep_group: taken for DeepSpeed's callers; None, all experts are local
    top2_2nd_expert_sampling: in training with k = 2, the second choice is made on scores with
        Gumbel noise
    drop_policy: who is dropped. "random"; "position", the last to queue, all first choices before
        all second ones; "probs", the smallest probability, routes queueing token after token. None
        is DeepSpeed's choice: "random" for k = 1 with use_rts, "probs" for k > 2, else "position".
        In evaluation "random" is "position".

    The loss counts first choices for k <= 2 and all choices for more, and is a mean over all T
    tokens, those that used_token takes out too, as DeepSpeed's is.
    Everything is computed in float32, in float64 where the input or the weight is float64, under
    autocast too. Raises ValueError where an argument is out of range.
    """

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 8,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        ep_group=None,
        top2_2nd_expert_sampling: bool = True,
        *,
        drop_policy: str | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.model_dim = contracts.integer("TopKGate", "model_dim", model_dim, 0)
        self.num_experts = contracts.integer("TopKGate", "num_experts", num_experts, 1)
        self.k = contracts.integer("TopKGate", "k", k, 1)
        self.min_capacity = contracts.integer("TopKGate", "min_capacity", min_capacity, 0)
        if k > num_experts:
            raise ValueError(f"TopKGate: k must be in 1..num_experts = {num_experts}, got {k}")
        for name, factor in (
            ("capacity_factor", capacity_factor),
            ("eval_capacity_factor", eval_capacity_factor),
        ):
            if not 1e-6 <= factor <= 1e6:
                raise ValueError(
                    f"TopKGate: {name} must be in 1e-6..1e6, got {factor}; "
                    "drop_tokens=False is without limit"
                )
        if ep_group is not None:
            raise ValueError("TopKGate: ep_group must be None, all experts are local")
        if noisy_gate_policy not in NOISE_POLICIES:
            raise ValueError(
                f"TopKGate: noisy_gate_policy must be one of {NOISE_POLICIES}, "
                f"got {noisy_gate_policy!r}"
            )
        if drop_policy is None:
            drop_policy = "random" if k == 1 and use_rts else "probs" if k > 2 else "position"
        if drop_policy not in DROP_POLICIES:
            raise ValueError(
                f"TopKGate: drop_policy must be None or one of {DROP_POLICIES}, got {drop_policy!r}"
            )
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.noisy_gate_policy = noisy_gate_policy
        self.drop_tokens = drop_tokens
        self.use_rts = use_rts
        self.top2_2nd_expert_sampling = top2_2nd_expert_sampling
        self.drop_policy = drop_policy
        self.wg = nn.Linear(
            self.model_dim, self.num_experts, bias=False, device=device, dtype=dtype
        )

    def reset_parameters(self) -> None:
        self.wg.reset_parameters()

    def extra_repr(self) -> str:
        return (
            f"k={self.k}, drop_tokens={self.drop_tokens}, drop_policy={self.drop_policy!r}, "
            f"capacity_factor={self.capacity_factor}, min_capacity={self.min_capacity}"
        )

    def capacity(self, num_tokens: int) -> int | None:
        """Rows an expert may have for this many tokens, in the present mode; None without limit."""
        if not self.drop_tokens:
            return None
        if torch.compiler.is_exporting() and isinstance(num_tokens, torch.SymInt):
            raise RuntimeError(
                "TopKGate: torch.export with a capacity needs a fixed number of tokens; "
                "drop_tokens=False exports with any"
            )
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        return expert_capacity(num_tokens, self.num_experts, self.k * factor, self.min_capacity)

    def route(self, tokens: Tensor, used_token: Tensor | None = None) -> Routing:
        """Decide for every token.

        tokens: [T, H]
        used_token: T values of any shape and dtype; a token with 0 (or False) is not routed

        Raises RuntimeError where an argument breaks this contract.
        """
        if tokens.dim() != 2 or tokens.shape[1] != self.model_dim:
            raise RuntimeError(
                f"TopKGate: tokens must be [T, H] with H = {self.model_dim}, "
                f"got {list(tokens.shape)}"
            )
        num_tokens = tokens.shape[0]
        logits = self._logits(tokens)
        choice = gate(logits, self.k, choice_scores=self._choice_scores(logits))
        experts = choice.experts
        if used_token is not None:
            if not isinstance(used_token, Tensor):
                raise RuntimeError(
                    f"TopKGate: used_token must be a tensor, got {type(used_token).__name__}"
                )
            if used_token.numel() != num_tokens:
                raise RuntimeError(
                    f"TopKGate: used_token must have T = {num_tokens} values, "
                    f"got {list(used_token.shape)}"
                )
            experts = torch.where(used_token.reshape(-1, 1) != 0, experts, -1)
        plan = make_plan(
            experts,
            self.num_experts,
            self.capacity(num_tokens),
            priority=self._priority(choice),
            order="token" if self.drop_policy == "probs" else "choice",
        )
        return Routing(
            self._weights(choice, plan, tokens.dtype),
            plan,
            choice.probs,
            choice.importance,
            self._balance(choice, plan),
        )

    def forward(
        self,
        input: Tensor,
        used_token: Tensor | None = None,
        sparse_routes: bool = False,
        use_tutel: bool = False,
    ) -> tuple:
        """DeepSpeed's forms of `route`, for its callers; the layer does not use them.

        input: [T, H]. Returns (l_aux, combine_weights [T, E, C], dispatch_mask [T, E, C],
        exp_counts [E] int64), or a tuple of seven with `sparse_routes` or `use_tutel` (see
        `sharded_moe`). exp_counts counts all choices before dropping, on the input's device. Where
        nothing is dropped C is the largest load, which is read back from the device.
        """
        routing = self.route(input, used_token)
        if use_tutel:
            return sharded_moe.tutel_routes(routing)
        if sparse_routes:
            return sharded_moe.sparse_routes(routing)
        return sharded_moe.dense_routes(routing)

    def _logits(self, tokens: Tensor) -> Tensor:
        is_double = torch.float64 in (tokens.dtype, self.wg.weight.dtype)
        dtype = torch.float64 if is_double else torch.float32
        tokens = tokens.to(dtype)
        if self.training and self.noisy_gate_policy == "Jitter":
            tokens = tokens * torch.empty_like(tokens).uniform_(1 - JITTER, 1 + JITTER)
        weight = self.wg.weight.to(dtype)
        if not has_autocast(tokens.device):
            return F.linear(tokens, weight)
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens, weight)

    def _choice_scores(self, logits: Tensor) -> Tensor | None:
        if not self.training:
            return None
        if self.noisy_gate_policy == "RSample":
            return logits.detach() + _gumbel_like(logits)
        if self.k == 2 and self.top2_2nd_expert_sampling:
            # The first choice stays what it is: a NaN ranks above all, noise and infinity too.
            first = logits.detach().argmax(dim=-1, keepdim=True)
            return (logits.detach() + _gumbel_like(logits)).scatter(-1, first, math.nan)
        return None

    def _priority(self, choice: Choice) -> Tensor | None:
        if self.drop_policy == "probs":
            return choice.weights.detach().to(torch.float32)
        if self.drop_policy == "random" and self.training:
            uniform = torch.rand(choice.probs.shape, device=choice.probs.device)
            return uniform.gather(-1, choice.experts.long())
        return None

    def _weights(self, choice: Choice, plan: Plan, dtype: torch.dtype) -> Tensor:
        weights = torch.where(plan.slots >= 0, choice.weights, 0)
        if self.k > 1:
            eps = torch.finfo(weights.dtype).eps
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=eps)
        return weights.to(torch.float64 if dtype == torch.float64 else torch.float32)

    def _balance(self, choice: Choice, plan: Plan) -> Tensor:
        counted = 1 if self.k <= 2 else self.k
        load = plan.load
        if counted < self.k:
            # Bin 0 takes the tokens that are not routed.
            bins = plan.experts[:, :counted].flatten().long() + 1
            load = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=bins.device)
            load = load.scatter_add(0, bins, torch.ones_like(bins))[1:]
        return load_balance_loss(choice.importance, load, choice.probs.shape[0], counted)
