"""Models whose experts are frozen in 8 or 4 bits: loaded so, or packed when they are there."""

import contextlib
import copy
import os
import threading
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

from ..formats import codes, replace_parameter
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
    The latter are also loaded by `AutoModelForCausalLM.from_pretrained(folder)`, after
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
    # A configuration would take these options for its own.
    kept = {name: options.pop(name) for name in _LOADERS if name in options}
    has, unused = PreTrainedConfig.get_config_dict(path, **options)
    packed = has.get("quantization_config") or {}
    if "quant_method" not in packed:
        if experts is None:
            raise ValueError(f"from_pretrained: {path} is not packed: name a format of its experts")
        config = ExpertsConfig(experts, group_size, zero_points, activations)
        options |= kept | {"quantization_config": config}
    else:
        own = _format_of(path, packed, experts, group_size, zero_points)
        of_hub = {name: value for name, value in options.items() if name not in unused}
        config = copy.deepcopy(kept.pop("config", None))
        if config is None:
            code = {name: kept[name] for name in ("code_revision",) if name in kept}
            config, options = AutoConfig.from_pretrained(
                path, return_unused_kwargs=True, **options, **code
            )
        config.quantization_config = own | ({"activations": activations} if activations else {})
        options |= of_hub | kept | {"config": config}
    with _files_are_read():
        return AutoModelForCausalLM.from_pretrained(path, **options)


_LOADERS = ("config", "dtype", "torch_dtype", "code_revision")


def _format_of(
    path: str | os.PathLike,
    packed: dict[str, Any],
    experts: WeightFormat | None,
    group_size: int | None,
    zero_points: bool,
) -> dict[str, Any]:
    """The ExpertsConfig of a checkpoint that is packed. Raises ValueError where another is asked
    for."""
    method = packed["quant_method"]
    if method not in (NAME, "mxfp4"):
        raise ValueError(
            f"from_pretrained: {path} is quantised by {method}, which moe_ext cannot read"
        )
    own = ExpertsConfig("mxfp4").to_dict() if method == "mxfp4" else packed
    group = own["group_size"] or codes.DEFAULT_GROUP[own["format"]]
    asked = {
        "format": (experts, own["format"]),
        "group_size": (group_size, group),
        "zero_points": (zero_points or None, own["zero_points"]),
    }
    for name, (value, is_so) in asked.items():
        if value not in (None, is_so):
            raise ValueError(
                f"from_pretrained: the experts of {path} are packed with {name} {is_so!r}, not "
                f"{value!r}; leave it out"
            )
    return own


_READING = threading.RLock()


@contextlib.contextmanager
def _files_are_read() -> Iterator[None]:
    """Let transformers read files meanwhile, in all threads. Mapped, they stay resident as far as
    they were used until the last tensor is loaded; read, they take the memory of one weight."""
    with _READING:
        mapped = getattr(modeling_utils, "safe_open", None)
        if mapped is None:
            yield
            return

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
    A refusal leaves the model as it was; what another error has interrupted, the same call ends.

    Args:
        model: a model of transformers, which save_pretrained then saves packed
        format: as of QuantizedWeight.quantize, like the others
        group_size: numbers of a row that share a scale
        zero_points: of int4
        activations: "int8" to round tokens too
        report: print first what it costs, as `moe_ext.hf.report` says
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
    weights = [w for w in weights_of(model) if not config.describes(getattr(w[1], w[2]))]
    for path, module, name in weights or weights_of(model):
        quantizer.check_weight(path, module, name)
        if getattr(module, name).is_meta:
            raise ValueError(f"{path} is not in memory: load the model without offloading it")
    if report:
        print(reports.compared(model, config, inputs))
    quantizer.attach(cast(PreTrainedModel, model))
    # One after the other: the packed and the whole model are never beside each other.
    for path, module, name in weights:
        replace_parameter(module, name, config.quantize(path, module, getattr(module, name)))
    return count
