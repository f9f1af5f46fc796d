"""How much a layer asks of the machine, where times would not tell: calls and instructions."""

import platform
import shutil

import pytest
import torch
from torch.utils.benchmark import Timer

from moe_ext import GroupedExperts, MOELayer, TopKGate
from moe_ext.monitor.explain import _Trace


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
    with _Trace() as trace:
        layer(hidden)
    ours = [call.operator for call in trace.calls]
    assert ours.count("grouped_mm") == 2
    # A loss of first choices counts them where there are others.
    assert len(ours) <= 8 + (k == 2 and drop_tokens), ours
    assert sum(trace.others.values()) <= 12, trace.others


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
