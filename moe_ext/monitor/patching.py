"""The layers of a model, and what of them is replaced while something watches: not for models that
other threads call meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn

from ..layer import Layer as MOELayer
from ..layer import Observer


class Layer(nn.Module):
    """What a MOELayer and an experts module of transformers have; for types alone."""

    num_experts: int
    observer: Observer | None


def named_layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """The layers of a model by name; a model that is one has its type's. Raises TypeError for what
    is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"moe_ext: model must be an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        is_ours = getattr(config, "_experts_implementation", None) == "moe_ext"
        if isinstance(module, MOELayer) or (is_ours and is_of_transformers(module)):
            yield name or type(module).__name__, cast(Layer, module)


def is_of_transformers(module: nn.Module) -> bool:
    """Whether it is experts that transformers lets others compute."""
    has_flags = hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    return has_flags or "_is_expert_parallel" in vars(module)


def entry(layer: Layer) -> str:
    """The method that every call of a layer goes through."""
    return "_forward" if isinstance(layer, MOELayer) else "forward"


@contextmanager
def replaced(attributes: Iterable[tuple[nn.Module, str, object]]) -> Iterator[None]:
    """Modules with other attributes while the context lasts; afterwards they are as they were.

    A method may be an instance's own already, as FSDP's register_fsdp_forward_method leaves it: it
    is that which comes back. Of an attribute named twice, as of a module in two layers, the first
    value counts.
    """
    absent = object()
    before: dict[tuple[nn.Module, str], object] = {}
    try:
        for module, name, value in attributes:
            if (module, name) not in before:
                before[module, name] = vars(module).get(name, absent)
                setattr(module, name, value)
        yield
    finally:
        for (module, name), value in before.items():
            if value is absent:
                delattr(module, name)
            else:
                setattr(module, name, value)
