"""Freeze the experts of a model in 8 or 4 bits, loaded already or while it is loaded.

transformers' loader merges the tensors of a checkpoint into the parameters of a module, one after
the other; a quantizer that is registered with it turns each parameter of experts into a
QuantizedWeight as soon as it is whole. A saved model has values and scales under the names of the
weights, and loads again as it is.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..formats import QuantizedWeight, codes, replace_parameter
from ..formats.weight import why_not
from ..options import WeightFormat
from .experts import NAME, check, experts_modules


@register_quantization_config(NAME)
class ExpertsConfig(QuantizationConfigMixin):
    """The format of a model's experts, in its config.json.

    Args:
        format: as of QuantizedWeight.quantize, like the others
        group_size: numbers of a row that share a scale
        zero_points: of int4
        activations: "int8" to round tokens too
        **others: what a file has beside them
    """

    def __init__(
        self,
        format: WeightFormat,
        group_size: int | None = None,
        zero_points: bool = False,
        activations: str | None = None,
        **others: Any,
    ) -> None:
        self.quant_method = NAME
        self.format, self.group_size = format, group_size
        self.zero_points, self.activations = zero_points, activations

    def quantize(self, path: str, module: nn.Module, weight: Tensor) -> QuantizedWeight:
        """The parameter of that path in a module of experts, in the format."""
        try:
            return QuantizedWeight.quantize(
                weight.transpose(1, 2) if getattr(module, "is_transposed", False) else weight,
                self.format,
                self.group_size,
                zero_points=self.zero_points,
                activations=self.activations,
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def describes(self, weight: Tensor | QuantizedWeight) -> bool:
        """Whether a weight is in this format already."""
        if not isinstance(weight, QuantizedWeight) or weight.format != self.format:
            return False
        group = codes.group_of(weight.format, weight.shape[-1], self.group_size)
        own = weight.group_size, weight.zeros is not None, weight.activations
        return own == (group, self.zero_points, self.activations)


def weight_names(module: nn.Module) -> tuple[str, str]:
    """The parameters of an experts module that are packed."""
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"


def weights_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """All of them: path, module, and name in the module."""
    for path, module in experts_modules(model):
        for name in weight_names(module):
            yield f"{path}.{name}", module, name


class _Quantize(ConversionOps):
    """Puts a QuantizedWeight in the place of a parameter that was read."""

    def __init__(self, config: ExpertsConfig) -> None:
        self.config = config

    def convert(
        self, input_dict: dict, model=None, full_layer_name="", missing_keys=None, **others: Any
    ) -> dict:
        (weight,) = input_dict.values()
        if isinstance(weight, list):
            (weight,) = weight
        path, _, name = full_layer_name.rpartition(".")
        module = cast(nn.Module, model).get_submodule(path)
        expected = getattr(module, name).shape
        if weight.shape != expected:
            raise ValueError(
                f"{full_layer_name} must be {list(expected)}, the checkpoint has "
                f"{list(weight.shape)}"
            )
        quantized = self.config.quantize(full_layer_name, module, weight)
        for loaded in (quantized, *quantized.parameters()):
            # Else the loader initializes it.
            setattr(loaded, "_is_hf_initialized", True)  # noqa: B010
        replace_parameter(module, name, quantized)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


class _Blocks(ConversionOps):
    """Joins the last two dimensions of MXFP4's blocks, or divides them again."""

    def __init__(self, joins: bool = True) -> None:
        self.joins = joins

    def convert(
        self, input_dict: dict, source_patterns: list, target_patterns: list, **others: Any
    ) -> dict:
        (found,) = input_dict.values()
        blocks = found[0] if isinstance(found, list) else found
        joined = blocks.flatten(-2) if self.joins else blocks.unflatten(-1, (-1, 16))
        return {target_patterns[0]: joined}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Blocks(not self.joins)


@register_quantizer(NAME)
class ExpertsQuantizer(HfQuantizer):
    """Quantizes experts while transformers loads a model, or loads packed ones."""

    quantization_config: ExpertsConfig

    def validate_environment(self, *args: Any, **others: Any) -> None:
        # Before, save_pretrained divides values and scales as if they were weights.
        if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23):
            raise ImportError(
                "experts in 8 and 4 bits need transformers >= 5.23, got "
                f"{transformers.__version__}; pip install -U transformers"
            )
        device_map = others.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "experts in 8 and 4 bits stay in memory: a device_map cannot put them on disk"
            )

    def check_weight(self, path: str, module: nn.Module, name: str) -> QuantizedWeight:
        """The weight in its format, without memory. Raises ValueError where it cannot have it."""
        weight = getattr(module, name)
        if isinstance(weight, QuantizedWeight):
            raise ValueError(f"{path} is quantized already")
        if not weight.is_meta and not all(torch.isfinite(expert).all() for expert in weight):
            raise ValueError(f"{path} has infinities or NaN")
        return self.quantization_config.quantize(path, module, weight.to("meta"))

    def attach(self, model: PreTrainedModel) -> None:
        """Let moe_ext run the model's experts, and save it with their format."""
        model.set_experts_implementation(NAME)
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = NAME
        model.config.quantization_config = self.quantization_config

    def _process_model_before_weight_loading(self, model, **others: Any) -> None:
        check(model)
        model.set_experts_implementation(NAME)
        weights = list(weights_of(model))
        self._names = {name for name, _, _ in weights}
        for path, module, name in weights:
            packed = self.check_weight(path, module, name)
            if self.pre_quantized:
                replace_parameter(module, name, packed)

    def param_needs_quantization(self, model, param_name: str, **others: Any) -> bool:
        return param_name in self._names

    def get_weight_conversions(self) -> list[WeightTransform]:
        if not self.pre_quantized or self.quantization_config.format != "mxfp4":
            return []
        found: list[WeightTransform] = []
        for name in ("gate_up_proj", "down_proj"):
            found.append(WeightConverter(f"{name}_blocks", f"{name}.values", [_Blocks()]))
            found.append(WeightRenaming(f"{name}_scales", f"{name}.scales"))
        return found

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.quantization_config)

    def _process_model_after_weight_loading(self, model, **others: Any):
        for path, module, name in weights_of(model):
            weight = getattr(module, name)
            loaded = isinstance(weight, QuantizedWeight) and all(
                getattr(parameter, "_is_hf_initialized", False) for parameter in weight.parameters()
            )
            if not loaded:
                raise ValueError(f"{path}: the checkpoint does not have all of it")
            if why := why_not(weight.codes(), weight.format):
                raise ValueError(f"{path}: {why}")
            weight.requires_grad_(False)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """By adapters and what is not frozen."""
        return True
