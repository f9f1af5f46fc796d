"""The names that options take, and argument validation helpers."""

import operator
from numbers import Real
from typing import Any, Literal

from torch import Tensor

# Checks at run time read the names with typing.get_args: a name is written here and nowhere else.

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus"]
"""How a gate makes scores of logits."""

Normalize = Literal["never", "before", "after"]
"""When a token's weights are divided by their sum: relative to dropping."""

DropPolicy = Literal["random", "position", "probs"]
"""Who is dropped where an expert has no room."""

Order = Literal["choice", "token"]
"""How routes queue for an expert."""

GroupScore = Literal["max", "top2_sum"]
"""How much a group of experts is worth to a token."""

Balancing = Literal["sinkhorn", "forced"]
"""How a choice is balanced without a loss."""

NoisePolicy = Literal["None", "Jitter", "RSample", "Gaussian"]
"""Where a gate adds noise. "None" is DeepSpeed's name for None."""

GatedActivation = Literal["swiglu", "geglu"]
"""Activations that multiply a gate and an input, each of width F."""

Activation = Literal[GatedActivation, "gelu", "relu"]
"""What an expert does between its two products."""


def names(owner: str, **options: tuple) -> None:
    """Options of a constructor that must be one of some names: name=(value, allowed)."""
    for name, (value, allowed) in options.items():
        if not isinstance(value, str | int | None) or value not in allowed:
            raise ValueError(f"{owner}: {name} must be one of {allowed}, got {value!r}")


def numbers(owner: str, **options: tuple) -> None:
    """Options of a constructor that must be in a range: name=(value, low, high)."""
    for name, (value, low, high) in options.items():
        if not isinstance(value, Real) or not low <= value <= high:
            raise ValueError(f"{owner}: {name} must be in {low}..{high}, got {value!r}")


def used_token(owner: str, mask: Tensor, num_tokens: int) -> None:
    if not isinstance(mask, Tensor):
        raise RuntimeError(f"{owner}: used_token must be a tensor, got {type(mask).__name__}")
    if mask.numel() != num_tokens:
        raise RuntimeError(
            f"{owner}: used_token must have T = {num_tokens} values, got {list(mask.shape)}"
        )


def integer(owner: str, name: str, value: Any, minimum: int) -> int:
    """An argument of a constructor as an int. Raises ValueError where it is none, or too small."""
    try:
        value = operator.index(value)
    except TypeError:
        raise ValueError(f"{owner}: {name} must be an integer, got {value!r}") from None
    if value < minimum:
        raise ValueError(f"{owner}: {name} must be at least {minimum}, got {value}")
    return value
