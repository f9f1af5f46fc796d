"""Find MoE layers; temporarily patch them (not thread-safe)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn

from ..layer import Layer, Observer


class Observed(nn.Module):
    """A layer, or an experts module of transformers. For type annotations only."""

    num_experts: int
    observer: Observer | None


def named_layers(model: nn.Module) -> Iterator[tuple[str, Observed]]:
    """Find the layers of a model, with their names; a model that is a layer has its type's name.

    Raises:
        TypeError: the model is not an nn.Module
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"moe_ext: model must be an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        is_ours = getattr(config, "_experts_implementation", None) == "moe_ext"
        if isinstance(module, Layer) or (is_ours and is_of_transformers(module)):
            yield name or type(module).__name__, cast(Observed, module)


def refuse_no_layers(caller: str, model: nn.Module) -> None:
    """Raise ValueError for a model without layers."""
    if not any(named_layers(model)):
        raise ValueError(
            f"{caller}: model must have a MOELayer, or experts of transformers with "
            f'experts_implementation="moe_ext", got a {type(model).__name__} without; for '
            'transformers call model.set_experts_implementation("moe_ext") first'
        )


def is_of_transformers(module: nn.Module) -> bool:
    """Whether this is an experts module whose implementation transformers can exchange."""
    has_flags = hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    return has_flags or "_is_expert_parallel" in vars(module)


def entry(layer: nn.Module) -> str:
    """The name of the method that every call of a layer goes through."""
    return "_forward" if isinstance(layer, Layer) else "forward"


@contextmanager
def replaced(attributes: Iterable[tuple[nn.Module, str, object]]) -> Iterator[None]:
    """Give modules other attributes while the context lasts, then restore them.

    An attribute that the instance had of its own comes back, as a method that FSDP's
    register_fsdp_forward_method set. For an attribute that is given twice, as that of a module in
    two layers, the first value counts.

    attributes: (module, name, value) each
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
