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
    """Of the dispatcher, by name."""

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


# Of AVX2, which is what valgrind offers, by GCC 12; with room for other compilers.
INSTRUCTIONS = {
    "gate, E = 64, K = 2": (
        "logits = torch.randn(4096, 64)",
        "torch.ops.moe_ext.gate(logits, None, 2, 'softmax', True, 1.0)",
        1000,
    ),
    "plan, E = 64, K = 2": (
        "experts = torch.rand(4096, 64).argsort(-1)[:, :2].int().contiguous()",
        "torch.ops.moe_ext.plan(experts, None, 64, None, 'token', 1)",
        135,
    ),
}


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="counted for AVX2")
@pytest.mark.parametrize("case", list(INSTRUCTIONS))
def test_instructions_for_a_token(case):
    setup, statement, most = INSTRUCTIONS[case]
    timer = Timer(statement, f"import moe_ext; torch.manual_seed(0); {setup}", num_threads=1)
    counted = timer.collect_callgrind(number=4, collect_baseline=False)
    assert counted.counts(denoise=True) / 4 / 4096 < most
