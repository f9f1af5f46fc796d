"""Feed-forward experts with stacked weights."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.types import Device

from .. import options
from ..formats import QuantizedWeight, replace_parameter
from ..ops import checks
from ..ops.feed_forward import feed_forward
from ..ops.functional import activate, grouped_mm, has_autocast
from ..ops.plan import Plan
from ..options import Activation, WeightFormat
from . import convert
from .base import Experts
from .pages import advise


class GroupedExperts(Experts):
    """Feed-forward experts with stacked weights, in Hugging Face's layout.

    The parameters are gate_up_proj [E, 2F, H], gate first (up_proj [E, F, H] without a gate), and
    down_proj [E, H, F]; with bias gate_up_proj_bias [E, 2F] (up_proj_bias [E, F]) and
    down_proj_bias [E, H]. Every expert is initialised like an nn.Linear of its size.
    load_state_dict also takes one tensor per expert, under the names of Mixtral, Qwen, DeepSeek or
    Nemotron (convert.py). For a subclass with a `forward(rows, plan)` of its own a layer runs
    dispatch, forward and combine.

    Args:
        num_experts: E
        hidden_size: H
        ffn_size: F
        activation: "swiglu" (silu(gate) * up), "geglu" (gelu(gate) * up), "swiglu_oai" (gpt-oss's,
            whose gates and ups alternate), "gelu" (exact), "relu" or "relu2"; as of `activate`
        bias: a bias on both products
        score_before_experts: multiply a route's activation by its weight, not the expert's output;
            results differ by rounding only (torchtitan multiplies the input)
        recompute: save only tokens and pre-activations for the backward, which computes dispatch
            and activation again, but no product. False saves all intermediate results.
        device: of the parameters
        dtype: of the parameters

    Raises:
        ValueError: an argument is out of range
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        ffn_size: int,
        activation: Activation = "swiglu",
        bias: bool = False,
        *,
        score_before_experts: bool = False,
        recompute: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_experts)
        options.names(
            "GroupedExperts",
            activation=(activation, checks.ACTIVATIONS),
            bias=(bias, (True, False)),
            score_before_experts=(score_before_experts, (True, False)),
        )
        self.hidden_size = options.integer("GroupedExperts", "hidden_size", hidden_size, 0)
        self.ffn_size = options.integer("GroupedExperts", "ffn_size", ffn_size, 0)
        self.activation = activation
        self.has_gate = activation in checks.GATED
        self.has_bias = bias
        self.score_before_experts = score_before_experts
        self.recompute = recompute
        self._up_name = "gate_up_proj" if self.has_gate else "up_proj"
        up_size = 2 * ffn_size if self.has_gate else ffn_size

        def parameter(*size: int) -> nn.Parameter:
            return nn.Parameter(advise(torch.empty(*size, device=device, dtype=dtype)))

        self.register_parameter(self._up_name, parameter(num_experts, up_size, hidden_size))
        self.down_proj = parameter(num_experts, hidden_size, ffn_size)
        if bias:
            self.register_parameter(f"{self._up_name}_bias", parameter(num_experts, up_size))
            self.down_proj_bias = parameter(num_experts, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Raises RuntimeError for quantized weights, which can only be loaded."""
        if isinstance(self.down_proj, QuantizedWeight):
            raise RuntimeError(
                f"{type(self).__name__}: quantized weights cannot be initialised; load them"
            )
        for name, fan_in in ((self._up_name, self.hidden_size), ("down_proj", self.ffn_size)):
            bound = 1 / math.sqrt(max(fan_in, 1))
            nn.init.uniform_(getattr(self, name), -bound, bound)
            if self.has_bias:
                nn.init.uniform_(getattr(self, f"{name}_bias"), -bound, bound)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"ffn_size={self.ffn_size}, activation={self.activation!r}, bias={self.has_bias}"
        )

    def quantize(
        self,
        format: WeightFormat,
        group_size: int | None = None,
        *,
        zero_points: bool = False,
        activations: str | None = None,
    ) -> "GroupedExperts":
        """Freeze the weights in 8 or 4 bits; biases stay as they are.

        Args:
            format: as of QuantizedWeight.quantize, like the others
            group_size: numbers of a row that share a scale
            zero_points: of int4
            activations: "int8" to round rows too

        Returns:
            these experts

        Raises:
            ValueError: as of QuantizedWeight.quantize
        """
        weights = {name: getattr(self, name) for name in (self._up_name, "down_proj")}
        for name, weight in weights.items():
            if isinstance(weight, QuantizedWeight):
                raise ValueError(f"{type(self).__name__}.{name} is quantized already")
        how: dict[str, Any] = {"zero_points": zero_points, "activations": activations}
        quantized = {
            name: QuantizedWeight.quantize(weight, format, group_size, **how)
            for name, weight in weights.items()
        }
        for name, weight in quantized.items():
            replace_parameter(self, name, weight)
        return self

    def _parameters_of(self, name: str) -> tuple[Tensor | QuantizedWeight, Tensor | None]:
        return getattr(self, name), getattr(self, f"{name}_bias") if self.has_bias else None

    def routed(self, tokens: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        if type(self).forward is not GroupedExperts.forward or "forward" in vars(self):
            return super().routed(tokens, plan, weights)
        # A call of the module, so that hooks, FSDP and offloading see it.
        return self(tokens, plan, weights)

    def forward(self, rows: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
        """Send every row through its expert; with weights, every token through its experts.

        Args:
            rows: [R, H]; with weights tokens [T, H]
            plan: for the same rows or tokens
            weights: [T, K]

        Returns:
            [R, H]; with weights [T, H], the weighted sum of every token's experts
        """
        up, up_bias = self._parameters_of(self._up_name)
        down, down_bias = self._parameters_of("down_proj")
        takes = rows.dtype if isinstance(up, QuantizedWeight) else up.dtype
        if rows.dtype != takes and not has_autocast(rows.device):
            autocast = ", or use torch.autocast" if rows.is_floating_point() else ""
            raise RuntimeError(
                f"GroupedExperts: tokens are {rows.dtype}, the weights {takes}; convert one of "
                f"the two with .to(dtype){autocast}"
            )
        if weights is not None:
            # Data-parallel wrappers may cast their inputs.
            weights = checks.as_dtype(weights, checks.accumulate_dtype(rows.dtype))
            return feed_forward(
                *(rows, plan, weights, up, down, self.activation, up_bias, down_bias),
                score_before_experts=self.score_before_experts,
                recompute=self.recompute,
            )
        pre_activation = grouped_mm(rows, up, plan, up_bias)
        return grouped_mm(activate(pre_activation, plan, self.activation), down, plan, down_bias)

    def _load_from_state_dict(self, state_dict, prefix, *others) -> None:
        *_, error_msgs = others
        layout = convert.detect(state_dict, prefix)
        try:
            if layout == convert.GPT_OSS and self.activation != "swiglu_oai":
                raise ValueError(
                    f"{prefix}gate_up_proj has the layout of gpt-oss, whose clamped, scaled gate "
                    'needs activation="swiglu_oai"; convert.to_grouped gives the weights for others'
                )
            if isinstance(layout, convert.PerExpert) or layout == convert.GPT_OSS:
                grouped = convert.to_grouped(state_dict, layout, prefix)
                if self.activation == "swiglu_oai":
                    grouped = convert.from_grouped(grouped, convert.GROUPED_OAI)
                state_dict = {n: t for n, t in state_dict.items() if not layout.has(n, prefix)}
                state_dict |= {prefix + name: tensor for name, tensor in grouped.items()}
        except ValueError as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(state_dict, prefix, *others)
