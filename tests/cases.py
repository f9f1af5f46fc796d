"""Sizes, routings and comparisons that the tests share."""

import contextlib
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moe_ext import Plan, QuantizedWeight, make_plan
from moe_ext.ops import checks, reference

# Who checks an operator's arguments.
WHERE = ["compiled", "reference", "fake"]

# Operators that are made of others where kernels for CUDA are compiled.
COMPOSED_ON_CUDA = ("feed_forward", "feed_forward_backward")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# T, K, E, H: no token, no column, one of everything, K = E, rows that end in a scalar tail, rows
# longer than any tile, in elements and in vectors, more tokens than a block, more choices than are
# read at a time.
SIZES = [
    (0, 2, 4, 8),
    (4, 2, 3, 0),
    (1, 1, 1, 1),
    (33, 2, 8, 7),
    (127, 8, 8, 13),
    (5, 3, 64, 16),
    (9, 2, 4, 1501),
    (7, 3, 4, 2064),
    (300, 4, 5, 40),
    (20, 11, 12, 8),
]


def random_experts(T: int, K: int, E: int, device: torch.device | None = None) -> Tensor:
    """Distinct ids per token. [T, K] int32."""
    return torch.rand(T, E, device=device).argsort(dim=-1)[:, :K].to(torch.int32)


def skewed_experts(T: int, K: int, E: int, device: torch.device | None = None) -> Tensor:
    """Every token's first choice is expert 0, and experts from K on have none."""
    return torch.arange(K, dtype=torch.int32, device=device).repeat(T, 1)


def masked_experts(T: int, K: int, E: int, device: torch.device | None = None) -> Tensor:
    """A third of the choices are -1."""
    experts = random_experts(T, K, E, device)
    return torch.where(torch.rand(T, K, device=device) < 1 / 3, -1, experts)


ROUTINGS = [random_experts, skewed_experts, masked_experts]


def plans(T: int, K: int, E: int, device: torch.device | None = None) -> list[Plan]:
    """Dropless, aligned, and with a capacity of nothing, of half of what comes, and of more."""
    half = max(1, T * K // (2 * E))
    made = []
    for routing in ROUTINGS:
        experts = routing(T, K, E, device)
        made += [make_plan(experts, E), make_plan(experts, E, align=8)]
        made += [make_plan(experts, E, capacity) for capacity in (0, half, T + 3)]
    return made


def values(*size: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Normal numbers of size 1."""
    return torch.randn(*size, device=device, dtype=torch.float64).to(dtype)


def weights_for(dtype: torch.dtype, *size: int, device: torch.device | None = None) -> Tensor:
    """Weights as they stand beside rows of this dtype."""
    return torch.rand(*size, device=device, dtype=checks.accumulate_dtype(dtype))


def assert_within(actual: Tensor, exact: Tensor, terms: Tensor, additions: int) -> None:
    """`actual` is `exact` but for rounding.

    exact: float64. terms: the sum of the absolute terms of every sum. additions: how many roundings
    the accumulation may have; the result is then rounded once to its own dtype.
    """
    assert actual.shape == exact.shape
    accumulate = torch.finfo(checks.accumulate_dtype(actual.dtype)).eps
    info = torch.finfo(actual.dtype)
    bound = info.eps * exact.abs() + (additions + 2) * accumulate * terms + info.smallest_normal
    error = (actual.double() - exact).abs()
    assert (error <= bound).all(), f"largest error {(error / bound).max():.3g} times the bound"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference by the norm of what is expected; 0 where both are empty."""
    expected = expected.detach().double()
    difference = (actual.detach().double() - expected).norm()
    return 0.0 if difference == 0 else float(difference / expected.norm())


def assert_near(found: Iterable[Tensor], expected: Iterable[Tensor], bound: float) -> None:
    """Every tensor has a relative error below the bound."""
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < bound


def all_equal(found: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    """Whether the tensors of both are the same, in the same order."""
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def same(actual: dict, expected: dict) -> bool:
    """Compare names, dtypes, devices and bits."""
    return actual.keys() == expected.keys() and all(
        actual[name].dtype == tensor.dtype
        and actual[name].device == tensor.device
        and torch.equal(actual[name], tensor)
        for name, tensor in expected.items()
    )


def weighted_sum(outputs: list[Tensor], expert_ids: Tensor, weights: Tensor) -> Tensor:
    """The sum of every token's experts by their weights; outputs[e]: of expert e for all tokens."""
    tokens = torch.arange(len(weights)).unsqueeze(-1)
    chosen = torch.stack(outputs, dim=1)[tokens, expert_ids.clamp(min=0).long()]
    return (weights.unsqueeze(-1) * chosen).sum(1)


def with_seed(function, *args):
    """The result of a call that draws the same numbers in every such call."""
    torch.manual_seed(1)
    return function(*args)


def mixtral_experts(
    E: int, H: int, F: int, bias: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Experts as a checkpoint of Mixtral names them, and as GroupedExperts does.

    Written by hand: w1 is the gate, w3 is up and w2 is down.
    """
    w1, w3, w2 = torch.randn(E, F, H), torch.randn(E, F, H), torch.randn(E, H, F)
    layers = {"w1.weight": w1, "w3.weight": w3, "w2.weight": w2}
    grouped = {"gate_up_proj": torch.cat([w1, w3], dim=1), "down_proj": w2}
    if bias:
        b1, b3, b2 = torch.randn(E, F), torch.randn(E, F), torch.randn(E, H)
        layers |= {"w1.bias": b1, "w3.bias": b3, "w2.bias": b2}
        grouped |= {"gate_up_proj_bias": torch.cat([b1, b3], dim=1), "down_proj_bias": b2}
    return {f"{e}.{name}": x[e] for name, x in layers.items() for e in range(E)}, grouped


def call_operator(op: str, args: tuple, where: str = "compiled") -> tuple[Tensor, ...]:
    """The results of an operator as a tuple."""
    mode = contextlib.nullcontext()
    if where == "fake":
        mode = torch._subclasses.FakeTensorMode()
        args = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
    with mode:
        results = getattr(reference if where == "reference" else torch.ops.moe_ext, op)(*args)
    return (results,) if isinstance(results, Tensor) else tuple(results)


def operator_error(op: str, args: tuple, where: str) -> str:
    """The message of the RuntimeError that a call raises, after "operator: "."""
    with pytest.raises(RuntimeError) as raised:
        call_operator(op, args, where)
    # torch adds lines of its own after the message.
    text = str(raised.value).split("\n")[0].rstrip()
    assert text.startswith(f"{op}: ")
    return text.removeprefix(f"{op}: ")


# The functions of activations; those with a gate take it alone.
FUNCTIONS = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "swiglu_oai": lambda x: x.clamp(max=7) * torch.sigmoid(1.702 * x.clamp(max=7)),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
}

# Weights in 8 and 4 bits: options of QuantizedWeight.quantize.
KINDS = [
    {"format": "int8"},
    {"format": "int4", "group_size": 32},
    {"format": "int4", "group_size": 64, "zero_points": True},
    {"format": "int4", "group_size": 128},
    {"format": "int4", "group_size": 128, "zero_points": True},
    {"format": "int4", "group_size": 32, "zero_points": True},
    {"format": "mxfp4"},
    {"format": "nf4"},
]


def quantized(kind: dict, E, N, M, device="cpu") -> QuantizedWeight:
    weight = values(E, N, M, dtype=torch.float32, device=device) / M**0.5
    return QuantizedWeight.quantize(weight, **kind)
