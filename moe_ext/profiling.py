"""Names for the parts of a layer in profiles:

    with moe_ext.profiling.ranges(model), torch.profiler.profile() as profile:
        model(hidden)

Every operator has its name in torch.profiler anyway, moe_ext::gate and so on; ranges say which
layer called it and what for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch
from torch import nn

from .experts import Experts
from .layer import MOELayer


@contextmanager
def ranges(model: nn.Module) -> Iterator[None]:
    """Mark every call of a MOELayer in the model while the context lasts: "moe_ext.layer <name>",
    and in it "moe_ext.gate" and "moe_ext.experts", for torch.profiler and, with a GPU, as NVTX
    ranges for Nsight Systems. Elsewhere there is nothing of it: no cost, and no graph break.

    Raises ValueError for a model without MOELayer.
    """
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, MOELayer)]
    if not layers:
        raise ValueError(
            f"profiling.ranges: {type(model).__name__} has no MOELayer; the operators have their "
            "names in profiles without it"
        )
    marked: dict[tuple[nn.Module, str], object] = {}
    try:
        for name, layer in layers:
            _mark(marked, layer, "_forward", f"moe_ext.layer {name}".rstrip())
            if hasattr(layer.gate, "route"):
                _mark(marked, layer.gate, "route", "moe_ext.gate")
            if isinstance(layer.experts, Experts):
                _mark(marked, layer.experts, "routed", "moe_ext.experts")
        yield
    finally:
        for (module, method), before in marked.items():
            vars(module).pop(method)
            if before is not None:
                setattr(module, method, before)


def _mark(marked: dict, module: nn.Module, method: str, label: str) -> None:
    """Put a marked method before the module's own, which may be one of the instance: FSDP's
    register_fsdp_forward_method leaves such. A module in two layers is marked once."""
    if (module, method) not in marked:
        marked[module, method] = vars(module).get(method)
        setattr(module, method, _in_range(getattr(module, method), label))


def _in_range(function: Callable, label: str) -> Callable:
    @wraps(function)
    def in_range(*args, **kwargs):
        if not torch.cuda.is_available():
            with torch.profiler.record_function(label):
                return function(*args, **kwargs)
        with torch.profiler.record_function(label), torch.cuda.nvtx.range(label):
            return function(*args, **kwargs)

    return in_range
