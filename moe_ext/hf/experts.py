"""The forward of experts modules of transformers, and which modules it understands."""

from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import activations
from transformers.integrations import moe
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from ..formats import QuantizedWeight
from ..monitor.patching import is_of_transformers
from ..ops import checks, composed
from ..ops.feed_forward import dispatch_mm, feed_forward
from ..ops.functional import combine, dispatch, grouped_mm
from ..ops.plan import Plan, make_plan
from ..options import Activation

NAME = "moe_ext"


class ExpertsModule(Protocol):
    """The members of an experts module that are used; its flags tell which it has."""

    num_experts: int
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor: ...


def experts_forward(
    self: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward of an experts module, as transformers calls it.

    The decorator `use_experts_implementation` sets flags on the module, which tell the layout of
    its parameters.

    Args:
        hidden_states: [T, H]
        top_k_index: [T, K] expert ids; under expert parallelism, `num_experts` for an expert of
            another rank
        top_k_weights: [T, K]

    Returns:
        [T, H] with the dtype of hidden_states

    Raises:
        ValueError: the module is not supported
    """
    layout = Layout(self)
    expert_ids = top_k_index.to(torch.int32)
    if layout.is_expert_parallel:
        expert_ids = expert_ids.masked_fill(expert_ids >= self.num_experts, -1)
    plan = make_plan(expert_ids, self.num_experts, order="token")
    observer = getattr(self, "observer", None)
    if observer is not None:
        observer(plan, None, None, None)
    tokens = hidden_states if layout.dtype is None else hidden_states.to(layout.dtype)
    weights = top_k_weights.to(checks.accumulate_dtype(tokens.dtype))
    return layout.routed(tokens, plan, weights).to(hidden_states.dtype)


class Layout:
    """The parameters of an experts module, and the computation on them.

    module: the experts module
    is_only_checked: accept weights that FSDP has divided; a forward sees them whole

    Raises ValueError for a module that is not supported.
    """

    def __init__(self, module: ExpertsModule, is_only_checked: bool = False) -> None:
        self.module = module
        self.is_only_checked = is_only_checked
        self.has_gate = getattr(module, "has_gate", True)
        self.has_bias = getattr(module, "has_bias", False)
        self.is_transposed = getattr(module, "is_transposed", False)
        self.is_expert_parallel = getattr(module, "_is_expert_parallel", False)
        self.has_post_expert_norm = getattr(module, "has_post_expert_norm", False)
        self.up, self.up_bias = self._product("gate_up_proj" if self.has_gate else "up_proj")
        self.down, self.down_bias = self._product("down_proj")
        self.activation = self._activation()

    @property
    def dtype(self) -> torch.dtype | None:
        """What tokens must have; None where any will do."""
        if isinstance(self.up, QuantizedWeight):
            return None if self.up_bias is None else self.up_bias.dtype
        return self.up.dtype

    def routed(self, tokens: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        if self.activation is not None and not self.has_post_expert_norm:
            return feed_forward(
                *(tokens, plan, weights, self.up, self.down, self.activation),
                *(self.up_bias, self.down_bias),
            )
        if isinstance(self.up, QuantizedWeight):
            pre_activation = grouped_mm(dispatch(tokens, plan), self.up, plan, self.up_bias)
        else:
            pre_activation = dispatch_mm(tokens, self.up, plan, self.up_bias)
        activate = self.module._apply_gate if self.has_gate else self.module.act_fn
        rows = grouped_mm(activate(pre_activation), self.down, plan, self.down_bias)
        if self.has_post_expert_norm:
            rows = self.module.post_expert_norm(rows)
        return combine(rows, plan, weights)

    def _refuse(self, why: str) -> NoReturn:
        raise ValueError(
            f'experts_implementation="{NAME}": {type(self.module).__name__} {why}; '
            'use another implementation, as "grouped_mm" or "eager"'
        )

    def _product(self, name: str) -> tuple[Tensor | QuantizedWeight, Tensor | None]:
        """Return weights [E, N, M] and bias [E, N]."""
        bias = self._tensor(f"{name}_bias", 2) if self.has_bias else None
        quantized = getattr(self.module, name, None)
        if isinstance(quantized, QuantizedWeight):
            return quantized, bias
        weights = self._tensor(name, 3)
        return weights.transpose(1, 2) if self.is_transposed else weights, bias

    def _tensor(self, name: str, dim: int) -> Tensor:
        tensor = getattr(self.module, name, None)
        if not isinstance(tensor, Tensor) or tensor.dim() != dim:
            self._refuse(f"must have {name} of {dim} dimensions, got {checks.shape_of(tensor)}")
        # FSDP gathers its DTensors before a forward, so a DTensor there is not one of FSDP's.
        if isinstance(tensor, DTensor) and not self.is_only_checked:
            self._refuse(f"must have {name} as a plain tensor, got a sharded DTensor")
        if tensor.dtype not in checks.FLOATING:
            self._refuse(f"must have {name} in a floating-point dtype, got {tensor.dtype}")
        if tensor.shape[0] != self.module.num_experts:
            self._refuse(
                f"must have {name} of num_experts = {self.module.num_experts} experts, "
                f"got {tensor.shape[0]}"
            )
        return tensor

    def _activation(self) -> Activation | None:
        """The name of the module's activation; None if the module has to compute it itself."""
        own_gate = type(self.module)._apply_gate if self.has_gate else moe._default_apply_gate
        if "_apply_gate" in vars(self.module):
            return None
        constants = tuple(getattr(self.module, name, None) for name in ("alpha", "limit"))
        if own_gate is GptOssExperts._apply_gate and constants == (composed.SCALE, composed.LIMIT):
            return "swiglu_oai"
        if own_gate is not moe._default_apply_gate:
            return None
        if self.has_gate and not getattr(self.module, "is_concatenated", True):
            self._refuse("must have an _apply_gate for its interleaved gates, got none")
        act_fn = getattr(self.module, "act_fn", None)
        if not callable(act_fn):
            self._refuse("must have a callable act_fn")
        names: dict[Any, Activation] = (
            {F.silu: "swiglu", F.gelu: "geglu"}
            if self.has_gate
            else {F.gelu: "gelu", F.relu: "relu", _squared_relu: "relu2"}
        )
        return names.get(_plain_function(act_fn))


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


# Exactly these classes: a subclass may compute something else.
_FUNCTIONS = {
    nn.SiLU: F.silu,
    activations.SiLUActivation: F.silu,
    activations.GELUActivation: F.gelu,
    activations.ReLUSquaredActivation: _squared_relu,
    nn.ReLU: F.relu,
}


def _plain_function(act_fn):
    if type(act_fn) is nn.GELU and act_fn.approximate == "none":
        return F.gelu
    if type(act_fn) is activations.GELUActivation and act_fn.act is not F.gelu:
        return None
    return _FUNCTIONS.get(type(act_fn), act_fn)


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the experts modules of a model whose implementation transformers can exchange, by name.

    Args:
        model: any module
    """
    for name, module in model.named_modules():
        if is_of_transformers(module):
            yield name, module


def check(model: nn.Module) -> int:
    """Check that moe_ext supports every experts module of a model, whichever implementation is set.

    Args:
        model: a model of transformers

    Returns:
        the number of experts modules

    Raises:
        TypeError: the model is not a module
        ValueError: the model has no experts module, or one that is not supported
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"check: model must be an nn.Module, got {type(model).__name__}")
    found = list(experts_modules(model))
    if not found:
        raise ValueError(
            f'experts_implementation="{NAME}": model must have an experts module whose '
            f"implementation transformers can exchange, got a {type(model).__name__} without. "
            'DeepSpeed\'s AutoEP (config "expert_parallel") replaces such modules: leave it out '
            "to use moe_ext"
        )
    for name, module in found:
        try:
            Layout(cast(ExpertsModule, module), is_only_checked=True)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return len(found)


moe.ExpertsInterface.register(NAME, experts_forward)
