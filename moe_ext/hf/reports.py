"""The costs of experts in 8 or 4 bits: bytes, and errors of weights and outputs."""

import copy
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..formats import QuantizedWeight, replace_parameter
from ..formats.codes import Codes, decode
from ..ops.checks import accumulate_dtype
from ..ops.plan import make_plan
from ..options import WeightFormat
from .experts import ExpertsModule, Layout, check, experts_forward, experts_modules
from .quantizer import ExpertsConfig, ExpertsQuantizer, weight_names, weights_of

MOST_WORST = 3


@dataclass
class LayerReport:
    """The experts of one layer.

    Args:
        name: the path of the module
        bytes_before: of its weights
        bytes_after: of the packed ones
        weight_errors: [E], the norm of the error of an expert's weights, divided by their norm
        weight_error: the same of all experts' weights
        output_errors: [E], the same of its outputs for the tokens that chose it, NaN without any.
            Empty without inputs
        output_error: the same of the layer's outputs
    """

    name: str
    bytes_before: int
    bytes_after: int
    weight_errors: list[float]
    weight_error: float
    output_errors: list[float] = field(default_factory=list)
    output_error: float = nan

    def worst(self, most: int = MOST_WORST) -> list[tuple[int, float]]:
        """The experts that lose most, and their errors: of outputs, or of weights without inputs.

        Args:
            most: how many
        """
        errors = enumerate(self.output_errors or self.weight_errors)
        known = [(e, error) for e, error in errors if error == error]
        return sorted(known, key=lambda one: -one[1])[:most]


class Report(list[LayerReport]):
    """The layers of a model whose experts get a format. `str` gives a table.

    Args:
        format: its name
        layers: in their order
    """

    def __init__(self, format: str, layers: Iterable[LayerReport]) -> None:
        super().__init__(layers)
        self.format = format

    def __str__(self) -> str:
        width = max([5, *(len(layer.name) for layer in self)])
        heads = f"{'layer':{width}}  {'MB':>8}  {'packed':>8}  {'weights':>8}  {'outputs':>8}"
        lines = [
            f"experts in {self.format}: bytes, and errors relative to the norms of the numbers",
            f"{heads}  experts that lose most",
        ]
        for layer in self:
            sizes = (f"{size / 1e6:8.2f}" for size in (layer.bytes_before, layer.bytes_after))
            errors = [f"{layer.weight_error:8.2%}", f"{'':8}"]
            if layer.output_errors:
                errors[1] = f"{layer.output_error:8.2%}"
            worst = ", ".join(f"{e}: {error:.2%}" for e, error in layer.worst())
            lines.append("  ".join([f"{layer.name:{width}}", *sizes, *errors, worst]))
        before, after = sum(r.bytes_before for r in self), sum(r.bytes_after for r in self)
        total = (
            f"{before / 1e6:8.2f}  {after / 1e6:8.2f}  {after / max(before, 1):.3f} of the bytes"
        )
        return "\n".join([*lines, f"{'total':{width}}  {total}"])

    def plot(self, path: str | Path) -> None:
        """Draw the error of every expert of every layer. Needs matplotlib.

        Args:
            path: the PNG file
        """
        from ..monitor.plot import plot_errors

        by_outputs = any(layer.output_errors for layer in self)
        what = "outputs" if by_outputs else "weights"
        errors = {
            layer.name: (layer.output_errors if by_outputs else layer.weight_errors) or [nan]
            for layer in self
        }
        plot_errors(errors, Path(path), f"Error of each expert's {what} in {self.format}, %")


def report(
    model: nn.Module,
    format: WeightFormat,
    group_size: int | None = None,
    *,
    zero_points: bool = False,
    activations: str | None = None,
    inputs: Any = None,
) -> Report:
    """Say what `moe_ext.hf.quantize` with these arguments costs. The model stays as it is.

    Args:
        model: a model of transformers
        format: as of QuantizedWeight.quantize, like the next three
        group_size: numbers of a row that share a scale
        zero_points: of int4
        activations: "int8" to round tokens too
        inputs: what the model takes: token ids [B, S], or a dict of its arguments. With them
            outputs are compared too, for the tokens that reach an expert

    Returns:
        the costs of every layer with experts

    Raises:
        ValueError: as of `check`, or a weight cannot have this format
    """
    check(model)
    config = ExpertsConfig(format, group_size, zero_points, activations)
    for path, module, name in weights_of(model):
        ExpertsQuantizer(config).check_weight(path, module, name)
    return compared(model, config, inputs)


def compared(model: nn.Module, config: ExpertsConfig, inputs: Any) -> Report:
    comparisons = {m: _Comparison(path, m, config) for path, m in experts_modules(model)}

    def compare(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = inspect.signature(experts_forward).bind(module, *args, **kwargs).arguments
        tokens, ids, weights = list(call.values())[1:]
        comparisons[module].add(tokens, ids, weights)

    hooks = [m.register_forward_pre_hook(compare, with_kwargs=True) for m in comparisons]
    try:
        with torch.no_grad():
            if isinstance(inputs, Mapping):
                model(**inputs)
            elif inputs is not None:
                model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return Report(config.format, (comparison.row() for comparison in comparisons.values()))


class _Comparison:
    """One module beside itself with packed weights, which live as long as a method runs."""

    def __init__(self, path: str, module: nn.Module, config: ExpertsConfig) -> None:
        self.path, self.module, self.config = path, module, config
        self.num_experts = getattr(module, weight_names(module)[0]).shape[0]
        self.of_experts = _no_squares(self.num_experts)  # of errors, and of outputs
        self.of_layer = _no_squares()
        self.is_chosen = torch.zeros(self.num_experts, dtype=torch.bool, device="cpu")

    def _packed(self) -> nn.Module:
        packed = copy.copy(self.module)
        packed._parameters = dict(self.module._parameters)
        packed._modules = dict(self.module._modules)
        for name in weight_names(self.module):
            path = f"{self.path}.{name}"
            weight = self.config.quantize(path, self.module, getattr(self.module, name))
            replace_parameter(packed, name, weight)
        return packed

    @torch.no_grad()
    def add(self, tokens: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Compare the outputs of a call, tokens [T, H], ids and weights [T, K]."""
        exact, rounded = (_of_routes(m, tokens, ids) for m in (self.module, self._packed()))
        E = self.num_experts
        experts = torch.where(ids < E, ids, E).flatten()
        for kind, rows in enumerate((rounded - exact, exact)):
            squares = exact.new_zeros(E + 1).index_add_(0, experts, rows.square().sum(-1))
            self.of_experts[kind] += squares[:E].cpu()
            outputs = (rows.unflatten(0, ids.shape) * weights.unsqueeze(-1)).sum(1)
            self.of_layer[kind] += outputs.square().sum().cpu()
        self.is_chosen |= (experts.bincount(minlength=E + 1)[:E] > 0).cpu()

    @torch.no_grad()
    def row(self) -> LayerReport:
        module, packed = self.module, self._packed()
        before = after = 0
        squares = _no_squares(self.num_experts)
        for name in weight_names(module):
            weight, quantized = getattr(module, name), getattr(packed, name)
            before, after = before + weight.nbytes, after + quantized.nbytes
            numbers = weight.mT if getattr(module, "is_transposed", False) else weight
            squares += _squares(numbers, quantized).cpu()
        row = LayerReport(
            self.path, before, after, _ratio(squares).tolist(), float(_ratio(squares.sum(1)))
        )
        if self.is_chosen.any():
            errors = _ratio(self.of_experts)
            row.output_errors = errors.masked_fill(~self.is_chosen, nan).tolist()
            row.output_error = float(_ratio(self.of_layer))
        return row


def _no_squares(*shape: int) -> Tensor:
    return torch.zeros(2, *shape, dtype=torch.float64, device="cpu")


def _ratio(squares: Tensor) -> Tensor:
    """Errors by norms, of squares [2, ...]; no error is none of nothing too."""
    return torch.where(squares[0] == 0, 0, squares[0] / squares[1]).sqrt()


def _squares(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    """[2, E]: the sums of the squares of the errors, and of the numbers."""
    codes = quantized.codes()
    sums = []
    for e, exact in enumerate(weight.float().unbind()):
        zeros = None if codes.zeros is None else codes.zeros[e]
        one = Codes(codes.values[e], codes.scales[e], zeros)
        error = decode(one, quantized.format) - exact
        sums.append(torch.stack([error.square().sum(), exact.square().sum()]))
    return torch.stack(sums, dim=1)


def _of_routes(module: nn.Module, tokens: Tensor, ids: Tensor) -> Tensor:
    """The output of an expert for each token that chose it, [T * K, H] in float32."""
    layout = Layout(cast(ExpertsModule, module))
    E, K = cast(ExpertsModule, module).num_experts, ids.shape[1]
    own = ids.reshape(-1, 1).to(torch.int32)
    plan = make_plan(own.masked_fill(own >= E, -1), E, order="token")
    rows = tokens.repeat_interleave(K, dim=0).to(layout.dtype or tokens.dtype)
    weights = rows.new_ones(own.shape, dtype=accumulate_dtype(rows.dtype))
    return layout.routed(rows, plan, weights).float()
