"""Arguments for every operator, from the contracts: for the self-test and for the tests."""

import torch
from torch import Tensor

from ..formats import codes
from . import checks, reference
from .contracts import PARSED, Argument

# Flags that samples leave off; all others are on.
OFF = ("score_before_experts", "transposed", "int8_rows")


def arguments(
    op: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    T: int = 61,
    K: int = 2,
    E: int = 8,
    H: int = 24,
    F: int = 16,
    seed: int = 0,
) -> tuple:
    """Arguments that keep the contract of an operator, as one layer with a capacity would give it.

    Integers are of one plan, and equal on every device; other tensors are normal numbers, those of
    a weight [E, N, M] divided by the root of M.
    """
    generator = torch.Generator().manual_seed(seed)
    accumulate = checks.accumulate_dtype(dtype)
    C = max(1, T * K // E)
    sizes = {"T": T, "K": K, "E": E, "R": E * C, "H": H, "M": H, "N": F, "F": F, "G": 2 * F}
    scores = torch.randn(T, E, generator=generator, dtype=accumulate)
    weights, expert_ids, probs, _ = reference.gate(scores, None, K, "softmax", True, 1.0)
    slots, sources, offsets, load = reference.plan(expert_ids, weights.float(), E, C, "choice", 1)
    known = {
        "expert_ids": expert_ids,
        "probs": probs,
        "slots": slots,
        "sources": sources,
        "offsets": offsets,
        "load": load,
        "k": K,
        "choices": K - 1,
        "num_experts": E,
        "capacity": C,
        "align": 1,
        "order": "choice",
        "scoring": "softmax",
        "activation": "swiglu",
        "eps": 1e-9,
        "scale": 1.5,
        "format": "int4",
    }

    if op == "quantized_mm":
        width = 96
        weight = torch.randn(E * F, width, generator=generator, device="cpu")
        parts = codes.encode(weight, "int4", 32, True)._asdict()
        known |= {name: part.unflatten(0, (E, F)) for name, part in parts.items()}
        sizes |= {"I": width, "O": F}

    def value(argument: Argument):
        if argument.dims == ("T", "K") and argument.name == "weights":
            return weights.to(device)
        if argument.kind == "bool":
            return argument.name not in OFF
        if argument.dims is None:
            return known[argument.name]
        if argument.name in known:
            return known[argument.name].to(device)
        shape = [sizes[letter] for letter in argument.dims]
        kind = kinds.get(argument.kind, argument.kind)  # that of another argument, or its own
        numbers = torch.randn(shape, generator=generator, device="cpu")
        if len(shape) == 3:  # a weight: its products are as large as what it multiplies
            numbers /= shape[-1] ** 0.5
        return numbers.to(device, dtypes[kind])

    kinds = {other.name: other.kind for other in PARSED[op].arguments}
    dtypes = {"floating": dtype, "acc": accumulate, "float32": torch.float32}
    return tuple(map(value, PARSED[op].arguments))


def tensors(args: tuple) -> list[Tensor]:
    return [arg for arg in args if isinstance(arg, Tensor)]
