"""Models whose experts are frozen in 8 or 4 bits: loaded so, or packed when they are there."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    modeling_utils,
)

from ..formats import replace_parameter
from ..options import WeightFormat
from . import reports
from .experts import NAME, check
from .quantizer import ExpertsConfig, ExpertsQuantizer, weights_of


def from_pretrained(
    path: str | os.PathLike,
    experts: WeightFormat | None = None,
    group_size: int | None = None,
    *,
    zero_points: bool = False,
    activations: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a causal language model whose experts are frozen in 8 or 4 bits.

    They are packed one weight after the other, while the model is loaded. Experts that are packed
    already stay as they are: those of gpt-oss, in MXFP4, and of models that save_pretrained saved.
    The latter are also loaded by
    `AutoModelForCausalLM.from_pretrained(folder, experts_implementation="moe_ext")`, after
    `import moe_ext.hf`.

    Args:
        path: a folder, or a name on the hub
        experts: the format, as of QuantizedWeight.quantize, like the next three. None: that of the
            checkpoint
        group_size: numbers of a row that share a scale
        zero_points: of int4
        activations: "int8" to round tokens too
        **options: of AutoModelForCausalLM.from_pretrained

    Returns:
        the model, which runs its experts by moe_ext

    Raises:
        ValueError: a weight cannot have this format, or has another one in the checkpoint
    """
    options = {"experts_implementation": NAME} | options
    has, unused = PreTrainedConfig.get_config_dict(path, **options)
    packed = has.get("quantization_config", {})
    if packed.get("quant_method") not in (NAME, "mxfp4"):
        if experts is None:
            raise ValueError(f"from_pretrained: {path} is not packed: name a format of its experts")
        config = ExpertsConfig(experts, group_size, zero_points, activations)
        options["quantization_config"] = config
    else:
        asked = {"format": experts, "group_size": group_size, "zero_points": zero_points or None}
        own = {"format": "mxfp4"} | packed
        for name, value in asked.items():
            if None not in (value, own.get(name)) and value != own[name]:
                raise ValueError(
                    f"from_pretrained: the experts of {path} are packed with {name} "
                    f"{own[name]!r}, not {value!r}; leave it out"
                )
        of_hub = {name: value for name, value in options.items() if name not in unused}
        config, options = AutoConfig.from_pretrained(path, return_unused_kwargs=True, **options)
        options |= of_hub | {"config": config}
        if packed["quant_method"] == "mxfp4":
            config.quantization_config = ExpertsConfig("mxfp4").to_dict()
        if activations is not None:
            config.quantization_config["activations"] = activations
    with _files_are_read():
        return AutoModelForCausalLM.from_pretrained(path, **options)


@contextlib.contextmanager
def _files_are_read() -> Iterator[None]:
    """Files that transformers maps stay resident, as far as they were used, until the last tensor
    is loaded. Read, they take the memory of one weight at a time."""
    mapped = modeling_utils.safe_open

    def opened(*args: Any, **options: Any) -> Any:
        return mapped(*args, **options | {"backend": "pread"})

    modeling_utils.safe_open = opened
    try:
        yield
    finally:
        modeling_utils.safe_open = mapped


def quantize(
    model: nn.Module,
    format: WeightFormat,
    group_size: int | None = None,
    *,
    zero_points: bool = False,
    activations: str | None = None,
    report: bool = False,
    inputs: Any = None,
) -> int:
    """Freeze the weights of all experts in 8 or 4 bits, and let moe_ext run them.

    A QuantizedWeight takes the place of each stacked parameter; biases and everything else stay.
    An error leaves the model as it was.

    Args:
        model: a model of transformers, which save_pretrained then saves packed
        format: as of QuantizedWeight.quantize, like the others
        group_size: numbers of a row that share a scale
        zero_points: of int4
        activations: "int8" to round tokens too
        report: print first what it costs, as `moe_ext.hf.report` says with these inputs
        inputs: of the report

    Returns:
        the number of experts modules

    Raises:
        ValueError: as of `check`, or a weight cannot have this format
    """
    count = check(model)
    config = ExpertsConfig(format, group_size, zero_points, activations)
    quantizer = ExpertsQuantizer(config)
    quantizer.validate_environment()
    weights = list(weights_of(model))
    for path, module, name in weights:
        quantizer.check_weight(path, module, name)
    if report:
        print(reports.compared(model, config, inputs))
    cast(PreTrainedModel, model).set_experts_implementation(NAME)
    # One after the other: the packed and the whole model are never beside each other.
    for path, module, name in weights:
        replace_parameter(module, name, config.quantize(path, module, getattr(module, name)))
    quantizer.attach(cast(PreTrainedModel, model))
    return count
