"""How much a layer asks of the machine, where times would not tell: calls and instructions."""

import platform
import shutil
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

from moe_ext import GroupedExperts, MOELayer, TopKGate


class Calls(TorchDispatchMode):
    """Count the dispatcher's calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.of[function.name()] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("drop_tokens", [False, True])
@pytest.mark.parametrize("num_experts", [4, 64])
def test_a_forward_is_few_calls(k, drop_tokens, num_experts):
    """Whatever K and the number of experts."""
    options = {"use_rts": False, "top2_2nd_expert_sampling": False}
    gate = TopKGate(16, num_experts, k=k, drop_tokens=drop_tokens, **options)
    layer = MOELayer(gate, GroupedExperts(num_experts, 16, 8))
    hidden = torch.randn(4, 10, 16, requires_grad=True)
    layer(hidden)
    with Calls() as calls:
        layer(hidden)
    products = {"moe_ext::grouped_mm": 2}
    assert {name: calls.of[name] for name in products} == products
    ours = sum(n for name, n in calls.of.items() if name.startswith("moe_ext::")) - 2
    # A loss of first choices counts them where there are others.
    assert ours <= 6 + (k == 2 and drop_tokens), calls.of
    others = sum(calls.of.values()) - 2 - ours
    assert others <= 12, calls.of


# Limits of AVX2, which is what valgrind offers, by GCC 12; with room for other compilers.
MOST_INSTRUCTIONS = {"gate": 1000, "plan": 135}
SETUP = """
import moe_ext
torch.manual_seed(0)
logits = torch.randn(4096, 64)
expert_ids = torch.rand(4096, 64).argsort(-1)[:, :2].int().contiguous()
gate = lambda: torch.ops.moe_ext.gate(logits, None, 2, "softmax", True, 1.0)
plan = lambda: torch.ops.moe_ext.plan(expert_ids, None, 64, None, "token", 1)
calls = iter([gate, plan] * 2 + [gate] * 4 + [plan] * 4)  # four are not counted
"""


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="counted for AVX2")
def test_instructions_for_a_token():
    """One process counts both operators: under valgrind, importing torch takes most of the time."""
    timer = Timer("next(calls)()", SETUP, num_threads=1)
    counted = timer.collect_callgrind(number=4, repeats=2, collect_baseline=False)
    for (name, most), one in zip(MOST_INSTRUCTIONS.items(), counted, strict=True):
        instructions = one.counts(denoise=True) / 4 / 4096
        assert 0.2 * most < instructions < most, name
