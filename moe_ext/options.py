"""The names that options take, and argument validation helpers."""

import operator
from numbers import Real
from typing import Any, Literal

from torch import Tensor

# Checks at run time read the names by typing.get_args, so each name is written once, here.

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus"]
"""How a gate scores logits."""

Normalize = Literal["never", "before", "after"]
"""When a token's weights are divided by their sum, relative to dropping."""

DropPolicy = Literal["random", "position", "probs"]
"""Which routes an expert without room drops."""

Order = Literal["choice", "token"]
"""How routes queue for an expert."""

GroupScore = Literal["max", "top2_sum"]
"""How the groups of a token compare."""

Balancing = Literal["sinkhorn", "forced"]
"""How the choice is balanced without a loss."""

Noise = Literal["Jitter", "RSample", "Gaussian"]
"""Where a gate adds noise."""

NoisePolicy = Literal["None", Noise]
"""The noise of a TopKGate; "None" means None."""

GatedActivation = Literal["swiglu", "geglu", "swiglu_oai"]
"""Activations that multiply a gate and a factor, each of width F."""

Activation = Literal[GatedActivation, "gelu", "relu", "relu2"]
"""The function between an expert's two products."""

WeightFormat = Literal["int8", "int4", "mxfp4", "nf4"]
"""How a frozen weight is stored."""


def names(owner: str, **options: tuple) -> None:
    """Check options that take names: name=(value, allowed)."""
    for name, (value, allowed) in options.items():
        if not isinstance(value, str | int | None) or value not in allowed:
            raise ValueError(f"{owner}: {name} must be one of {allowed}, got {value!r}")


def numbers(owner: str, **options: tuple) -> None:
    """Check options that take a range of numbers: name=(value, low, high)."""
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
    """Return an argument as an int. Raises ValueError if it is not an integer or too small."""
    try:
        value = operator.index(value)
    except TypeError:
        raise ValueError(f"{owner}: {name} must be an integer, got {value!r}") from None
    if value < minimum:
        raise ValueError(f"{owner}: {name} must be at least {minimum}, got {value}")
    return value
