"""How much a layer asks of the machine, where times would not tell: calls and instructions."""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.benchmark.utils.valgrind_wrapper import timer_interface

from moe_ext import GroupedExperts, MOELayer, TopKGate, toolkit
from moe_ext.monitor.explain import _Trace

# Operators that only look at memory another way.
VIEWS = {"view", "_unsafe_view", "t", "transpose", "unsqueeze"}
VIEWS |= {"detach", "slice", "alias", "expand"}


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("drop_tokens", [False, True])
@pytest.mark.parametrize("num_experts", [4, 64])
def test_a_layer_is_few_calls(k, drop_tokens, num_experts):
    """Whatever K and the number of experts."""
    options = {"use_rts": False, "top2_2nd_expert_sampling": False}
    gate = TopKGate(16, num_experts, k=k, drop_tokens=drop_tokens, **options)
    layer = MOELayer(gate, GroupedExperts(num_experts, 16, 8))
    hidden = torch.randn(4, 10, 16, requires_grad=True)

    def operators(function) -> list[str]:
        with _Trace() as trace:
            function()
        others = [name for name in trace.others.elements() if name not in VIEWS]
        return [call.operator for call in trace.calls] + others

    with torch.no_grad():
        forward = operators(lambda: layer.eval()(hidden))
    assert forward.count("feed_forward") == 1
    assert len(forward) <= 8, forward
    both = operators(lambda: layer.train()(hidden).sum().backward())
    assert both.count("feed_forward_backward") == 1
    assert len(both) <= 16, both


# Limits of AVX2, which is what valgrind offers, by GCC 12; with room for other compilers.
MOST_INSTRUCTIONS = {"gate": 1000, "plan": 135}
SWITCH = """
#include "callgrind.h"
extern "C" void start() { CALLGRIND_START_INSTRUMENTATION; }
extern "C" void write_counts() { CALLGRIND_DUMP_STATS; }
"""
CALLS = """
import ctypes
import torch, moe_ext
switch = ctypes.CDLL({switch!r})
torch.manual_seed(0)
logits = torch.randn(4096, 64)
expert_ids = torch.rand(4096, 64).argsort(-1)[:, :2].int().contiguous()
gate = lambda: torch.ops.moe_ext.gate(logits, None, 2, "softmax", True, 1.0)
plan = lambda: torch.ops.moe_ext.plan(expert_ids, None, 64, None, "token", 1)
gate(), plan()
switch.start()
for operator in (gate, plan):
    for _ in range(4):
        operator()
    switch.write_counts()
"""


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="counted for AVX2")
@pytest.mark.skipif(toolkit.find_compiler() is None, reason="needs a C++ compiler")
def test_instructions_for_a_token(tmp_path):
    """One process counts both operators. Counting begins after the imports, which take longest."""
    source, switch = tmp_path / "switch.cpp", tmp_path / "switch.so"
    source.write_text(SWITCH)
    header = Path(timer_interface.__file__).parent  # torch has callgrind.h
    compiler = [toolkit.find_compiler(), "-shared", "-fPIC", f"-I{header}"]
    subprocess.run([*compiler, source, "-o", switch], check=True)
    out = f"--callgrind-out-file={tmp_path / 'counts'}"
    command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", out, sys.executable, "-c"]
    subprocess.run([*command, CALLS.format(switch=str(switch))], check=True, capture_output=True)
    for part, (name, most) in enumerate(MOST_INSTRUCTIONS.items(), start=1):
        counts = (tmp_path / f"counts.{part}").read_text()
        (total,) = re.findall(r"^totals: (\d+)$", counts, re.MULTILINE)
        instructions = int(total) / 4 / 4096
        assert 0.2 * most < instructions < most, name
