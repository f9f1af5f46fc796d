"""What experts in 8 or 4 bits cost: bytes, and errors of weights and outputs."""

import copy
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
from .experts import ExpertsModule, Layout, check, experts_modules
from .quantizer import ExpertsConfig, weight_names

MOST_WORST = 3


@dataclass
class LayerReport:
    """The experts of one layer.

    Args:
        name: the path of the module
        bytes_before: of its weights
        bytes_after: of the packed ones
        weight_errors: [E], the norm of the error of an expert's weights, divided by their norm
        output_errors: [E], the same of its outputs for the tokens that chose it, NaN without any.
            Empty without inputs
        output_error: the same of the layer's outputs
    """

    name: str
    bytes_before: int
    bytes_after: int
    weight_errors: list[float]
    output_errors: list[float] = field(default_factory=list)
    output_error: float = nan

    @property
    def weight_error(self) -> float:
        """The root of the mean of the experts' squares."""
        return float(torch.tensor(self.weight_errors).square().mean().sqrt())

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
        before, after = self._bytes()
        total = (
            f"{before / 1e6:8.2f}  {after / 1e6:8.2f}  {after / max(before, 1):.3f} of the bytes"
        )
        return "\n".join([*lines, f"{'total':{width}}  {total}"])

    def _bytes(self) -> tuple[int, int]:
        return sum(r.bytes_before for r in self), sum(r.bytes_after for r in self)

    def plot(self, path: str | Path) -> None:
        """Draw the error of every expert of every layer. Needs matplotlib.

        Args:
            path: the PNG file
        """
        from ..monitor.plot import plot_errors

        what = "outputs" if any(layer.output_errors for layer in self) else "weights"
        errors = {layer.name: layer.output_errors or layer.weight_errors for layer in self}
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
    return compared(model, ExpertsConfig(format, group_size, zero_points, activations), inputs)


def compared(model: nn.Module, config: ExpertsConfig, inputs: Any) -> Report:
    modules = dict(experts_modules(model))
    layers: dict[str, LayerReport] = {}
    if inputs is None:
        for path, module in modules.items():
            layers[path] = _compare(path, module, config)
    else:
        paths = {module: path for path, module in modules.items()}

        def compare(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            path = paths[module]
            layers[path] = _compare(path, module, config, *args, *kwargs.values())

        hooks = [m.register_forward_pre_hook(compare, with_kwargs=True) for m in paths]
        try:
            with torch.no_grad():
                model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        finally:
            for hook in hooks:
                hook.remove()
    return Report(config.format, (layers[path] for path in modules if path in layers))


@torch.no_grad()
def _compare(path: str, module: nn.Module, config: ExpertsConfig, *routed: Tensor) -> LayerReport:
    """routed: what the module is called with, tokens [T, H], ids and weights [T, K]; or nothing."""
    packed = copy.copy(module)
    packed._parameters, packed._modules = dict(module._parameters), dict(module._modules)
    found = LayerReport(path, 0, 0, [])
    squares = torch.zeros(2, getattr(module, weight_names(module)[0]).shape[0])
    for name in weight_names(module):
        weight = getattr(module, name)
        quantized = config.quantize(f"{path}.{name}", module, weight)
        replace_parameter(packed, name, quantized)
        found.bytes_before += weight.nbytes
        found.bytes_after += quantized.nbytes
        numbers = weight.mT if getattr(module, "is_transposed", False) else weight
        squares += _squares(numbers, quantized).cpu()
    found.weight_errors = _ratios(squares)
    if routed:
        tokens, ids, weights = routed
        exact, rounded = (_of_routes(m, tokens, ids) for m in (module, packed))
        experts = torch.where(ids < len(weight), ids, len(weight)).flatten()
        sums = exact.new_zeros(2, len(weight) + 1)
        for kind, rows in enumerate((rounded - exact, exact)):
            sums[kind].index_add_(0, experts, rows.square().sum(-1))
        found.output_errors = _ratios(sums[:, :-1])
        exact, error = (
            (rows.unflatten(0, ids.shape) * weights.unsqueeze(-1)).sum(1)
            for rows in (exact, rounded - exact)
        )
        found.output_error = float(error.norm() / exact.norm())
    return found


def _ratios(squares: Tensor) -> list[float]:
    return (squares[0] / squares[1]).sqrt().tolist()


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
