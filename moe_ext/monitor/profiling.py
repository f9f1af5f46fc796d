"""Names for the parts of a layer in profiles:

    with moe_ext.profiling.ranges(model), torch.profiler.profile() as profile:
        model(hidden)

Every operator has its name in torch.profiler anyway, moe_ext::gate and so on; ranges say which
layer called it and what for.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import wraps

import torch
from torch import nn

from ..experts.base import Experts
from ..layer import Layer as MOELayer
from .patching import entry, named_layers, replaced


def ranges(model: nn.Module) -> AbstractContextManager[None]:
    """Mark every call of a layer in the model while the context lasts.

    The ranges are `moe_ext.layer <name>`, and in a MOELayer's `moe_ext.gate` and `moe_ext.experts`,
    for torch.profiler and, with a GPU, as NVTX ranges for Nsight Systems. Elsewhere there is
    nothing of it: no cost, and no graph break. Copy, pickle and save the model outside of it: a
    copy would call this model's parts.

    Args:
        model: a MOELayer, or a module with some in it, or with the experts of transformers' models
            with experts_implementation="moe_ext"

    Raises:
        ValueError: the model has no such layer
    """
    if not any(named_layers(model)):
        raise ValueError(
            f"profiling.ranges: {type(model).__name__} has no MOELayer, nor experts of "
            'transformers with experts_implementation="moe_ext"; the operators have their names in '
            "profiles without it"
        )
    return replaced(
        (module, method, _in_range(getattr(module, method), label))
        for module, method, label in _labelled(model)
    )


def _labelled(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Methods, and what their ranges are called."""
    for name, layer in named_layers(model):
        yield layer, entry(layer), f"moe_ext.layer {name}"
        if isinstance(layer, MOELayer):
            if hasattr(layer.gate, "route"):
                yield layer.gate, "route", "moe_ext.gate"
            method = "routed" if isinstance(layer.experts, Experts) else "forward"
            yield layer.experts, method, "moe_ext.experts"


def _in_range(function: Callable, label: str) -> Callable:
    @wraps(function)
    def in_range(*args, **kwargs):
        if not torch.cuda.is_available():
            with torch.profiler.record_function(label):
                return function(*args, **kwargs)
        with torch.profiler.record_function(label), torch.cuda.nvtx.range(label):
            return function(*args, **kwargs)

    return in_range
