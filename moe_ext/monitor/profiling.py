"""Name the layers and their parts in profiles.

Profiles show every operator by name without this; ranges add which layer called it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import wraps

import torch
from torch import nn

from ..experts.base import Experts
from ..layer import Layer
from .patching import entry, named_layers, refuse_no_layers, replaced


def ranges(model: nn.Module) -> AbstractContextManager[None]:
    """Mark every call of a layer while the context lasts.

        with moe_ext.profiling.ranges(model), torch.profiler.profile() as profile:
            model(hidden)

    The ranges are `moe_ext.layer <name>` and, inside of it, `moe_ext.gate` and `moe_ext.experts`.
    torch.profiler shows them; with a GPU they are NVTX ranges too, for Nsight Systems. Outside of
    the context the model is unchanged: no cost, no graph break.

    Do not copy, pickle or save the model inside of the context: a copy would call the parts of this
    model. Other threads must not call the model meanwhile.

    Args:
        model: a MOELayer, a module that has some, or a model of transformers with
            experts_implementation="moe_ext"

    Raises:
        ValueError: the model has no such layer
    """
    refuse_no_layers("profiling.ranges", model)
    return replaced(_in_ranges(model))


def _in_ranges(model: nn.Module) -> Iterator[tuple[nn.Module, str, Callable]]:
    for name, layer in named_layers(model):
        yield _in_range(layer, entry(layer), f"moe_ext.layer {name}")
        if isinstance(layer, Layer):
            if hasattr(layer.gate, "route"):
                yield _in_range(layer.gate, "route", "moe_ext.gate")
            method = "routed" if isinstance(layer.experts, Experts) else "forward"
            yield _in_range(layer.experts, method, "moe_ext.experts")


def _in_range(module: nn.Module, method: str, label: str) -> tuple[nn.Module, str, Callable]:
    function = getattr(module, method)

    @wraps(function)
    def in_range(*args, **kwargs):
        nvtx = torch.cuda.nvtx.range(label) if torch.cuda.is_available() else nullcontext()
        with torch.profiler.record_function(label), nvtx:
            return function(*args, **kwargs)

    return module, method, in_range
