"""Hugging Face's transformers with the experts of moe_ext:

    import moe_ext.hf
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moe_ext")

or `model.set_experts_implementation("moe_ext")`. The import registers the name for the process, as
transformers has it for experts of its own; `check(model)` says at once whether every experts module
can be computed, which a forward would say when it comes to it. Needs transformers >= 5.7.
"""

from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from .monitor.patching import is_of_transformers
from .monitor.sinks import Sink
from .monitor.stats import Stats, track
from .ops import checks
from .ops.feed_forward import dispatch_mm, feed_forward
from .ops.functional import combine, grouped_mm
from .ops.plan import Plan, make_plan
from .options import Activation

NAME = "moe_ext"
MINIMUM = (5, 7)

try:
    import transformers
    from transformers import activations
    from transformers.integrations import moe
except ImportError as error:
    raise ImportError(f"moe_ext.hf needs transformers >= 5.7: {error}") from error

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < MINIMUM:
    raise ImportError(f"moe_ext.hf needs transformers >= 5.7, found {transformers.__version__}")


class ExpertsModule(Protocol):
    """What is used of an experts module; all but num_experts only where its flags say so."""

    num_experts: int
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor: ...


def experts_forward(
    self: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """An experts module's forward, as transformers calls it on a module under
    `use_experts_implementation`, whose flags say how its parameters lie.

    Args:
        hidden_states: [T, H]
        top_k_index: [T, K] ids; under expert parallelism `num_experts` marks another process's
        top_k_weights: [T, K]

    Returns:
        [T, H] in hidden_states' dtype

    Raises:
        ValueError: the module is not understood
    """
    layout = Layout(self)
    experts = top_k_index.to(torch.int32)
    if layout.is_expert_parallel:
        experts = experts.masked_fill(experts >= self.num_experts, -1)
    plan = make_plan(experts, self.num_experts, order="token")
    observer = getattr(self, "observer", None)
    if observer is not None:
        observer(plan, None, None, None)
    tokens = hidden_states.to(layout.up.dtype)
    weights = top_k_weights.to(checks.accumulate_dtype(tokens.dtype))
    return layout.routed(tokens, plan, weights).to(hidden_states.dtype)


class Layout:
    """How an experts module keeps its parameters and what it computes with them.

    Raises ValueError where the module asks for something that is not understood.
    """

    def __init__(self, module: ExpertsModule, is_only_checked: bool = False) -> None:
        self.module = module
        self.is_only_checked = is_only_checked
        self.has_gate = self._flag("has_gate", True)
        self.has_bias = self._flag("has_bias", False)
        self.is_transposed = self._flag("is_transposed", False)
        self.is_expert_parallel = self._flag("_is_expert_parallel", False)
        self.has_post_expert_norm = self._flag("has_post_expert_norm", False)
        self.up, self.up_bias = self._product("gate_up_proj" if self.has_gate else "up_proj")
        self.down, self.down_bias = self._product("down_proj")
        self.activation = self._activation()

    def routed(self, tokens: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        if self.activation is not None and not self.has_post_expert_norm:
            return feed_forward(
                *(tokens, plan, weights, self.up, self.down, self.activation),
                *(self.up_bias, self.down_bias),
            )
        pre_activation = dispatch_mm(tokens, self.up, plan, self.up_bias)
        active = (
            self.module._apply_gate(pre_activation)
            if self.has_gate
            else self.module.act_fn(pre_activation)
        )
        rows = grouped_mm(active, self.down, plan, self.down_bias)
        if self.has_post_expert_norm:
            rows = self.module.post_expert_norm(rows)
        return combine(rows, plan, weights)

    def _refuse(self, why: str) -> NoReturn:
        raise ValueError(
            f'experts_implementation="{NAME}": {type(self.module).__name__} {why}; '
            'use another, as "eager"'
        )

    def _flag(self, name: str, default: bool) -> bool:
        return getattr(self.module, name, default)

    def _product(self, name: str) -> tuple[Tensor, Tensor | None]:
        """[E, N, M] and [E, N]."""
        weights = self._tensor(name, 3)
        bias = self._tensor(f"{name}_bias", 2) if self.has_bias else None
        return weights.transpose(1, 2) if self.is_transposed else weights, bias

    def _tensor(self, name: str, dim: int) -> Tensor:
        tensor = getattr(self.module, name, None)
        if not isinstance(tensor, Tensor) or tensor.dim() != dim:
            got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            self._refuse(f"must have {name} of {dim} dimensions, has {got}")
        # FSDP's are gathered before a forward: what is one then, is one for other reasons.
        if isinstance(tensor, DTensor) and not self.is_only_checked:
            self._refuse(f"has {name} as a DTensor, whose parts are not computed with")
        if tensor.dtype not in checks.FLOATING:
            self._refuse(f"has {name} in {tensor.dtype}, which is not computed in")
        if tensor.shape[0] != self.module.num_experts:
            self._refuse(
                f"must have {name} of num_experts = {self.module.num_experts} experts, "
                f"has {tensor.shape[0]}"
            )
        return tensor

    def _activation(self) -> Activation | None:
        """The name of what the module does between its products; None where only it can do that."""
        own_gate = type(self.module)._apply_gate if self.has_gate else moe._default_apply_gate
        if own_gate is not moe._default_apply_gate or "_apply_gate" in vars(self.module):
            return None
        if self.has_gate and not self._flag("is_concatenated", True):
            self._refuse("has interleaved gates and no _apply_gate that would take them apart")
        function = _plain_function(getattr(self.module, "act_fn", None))
        if function is None and not callable(getattr(self.module, "act_fn", None)):
            self._refuse("must have act_fn")
        names: dict[Any, Activation] = (
            {F.silu: "swiglu", F.gelu: "geglu"}
            if self.has_gate
            else {F.gelu: "gelu", F.relu: "relu"}
        )
        return names.get(function)


# Only these very classes: a subclass may compute something else.
_FUNCTIONS = {
    nn.SiLU: F.silu,
    activations.SiLUActivation: F.silu,
    activations.GELUActivation: F.gelu,
    nn.ReLU: F.relu,
}


def _plain_function(act_fn):
    if type(act_fn) is nn.GELU and act_fn.approximate == "none":
        return F.gelu
    if type(act_fn) is activations.GELUActivation and act_fn.act is not F.gelu:
        return None
    return _FUNCTIONS.get(type(act_fn), act_fn)


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model whose experts transformers lets others compute, with their names.

    Args:
        model: any module
    """
    for name, module in model.named_modules():
        if is_of_transformers(module):
            yield name, module


def check(model: nn.Module) -> int:
    """How many experts modules a model has, all of which moe_ext can compute, whichever
    implementation is set.

    Args:
        model: a model of transformers

    Raises:
        TypeError: the model is not a module
        ValueError: the model has no experts module, or one that is not understood
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"check: model must be an nn.Module, got {type(model).__name__}")
    found = list(experts_modules(model))
    if not found:
        raise ValueError(
            f'experts_implementation="{NAME}": {type(model).__name__} has no experts module '
            "that transformers lets others compute. DeepSpeed's AutoEP (config "
            '"expert_parallel") replaces them by its own: leave it out to use moe_ext'
        )
    for name, module in found:
        try:
            Layout(cast(ExpertsModule, module), is_only_checked=True)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return len(found)


class StatsCallback(transformers.TrainerCallback):
    """Counts a model's experts while a Trainer trains it (moe_ext.stats), and says so at every log:

        Trainer(model, ..., callbacks=[moe_ext.hf.StatsCallback(JsonLines("run.jsonl"))])

    The numbers are added to the Trainer's logs and its log history. What logs them itself, as
    TensorBoard's callback, comes before this one in a Trainer: for those there are sinks.

    Args:
        *sinks: called with every reading and its step, in the main process alone
        per_layer: log the numbers of every layer, not only their mean and the worst
        detailed: as of stats.track
        group: the processes to sum over; the default is all that torch.distributed knows of, and
            none where transformers divides the experts: then every process counts those that it has

    Raises:
        ValueError: a sink is not a function
    """

    def __init__(
        self,
        *sinks: Sink,
        per_layer: bool = False,
        detailed: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        for sink in sinks:
            if not callable(sink):
                raise ValueError(
                    "StatsCallback: a sink must be a function of a reading and a step, as "
                    f"JsonLines(path), got {sink!r}"
                )
        self.sinks = sinks
        self.per_layer = per_layer
        self.detailed = detailed
        self.group = group
        self.stats: Stats | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.stats = track(model, detailed=self.detailed)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.stats is None:
            return
        group = self.group
        if group is None and torch.distributed.is_initialized() and not self.stats.is_divided:
            group = torch.distributed.group.WORLD
        reading = self.stats.read(group=group)
        numbers = reading.scalars(per_layer=self.per_layer)
        if logs is not None:
            logs.update(numbers)
        if state.log_history:
            state.log_history[-1].update(numbers)
        if state.is_world_process_zero:
            for sink in self.sinks:
                sink(reading, state.global_step)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        assert self.stats is not None
        self.stats.stop()


moe.ExpertsInterface.register(NAME, experts_forward)
