"""explain shows the operators of a call, ranges name them in profiles; both leave no trace."""

import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from scripts import output_of
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.profiler import profile

import moe_ext
from moe_ext import GroupedExperts, MOELayer, TopKGate, profiling, stats
from moe_ext.ops import composed, registry, torch_grouped_mm

E, H = 4, 16


def layer_of(experts=None, **options) -> MOELayer:
    gate = TopKGate(H, E, 2, top2_2nd_expert_sampling=False, **options)
    return MOELayer(gate, experts or GroupedExperts(E, H, 8))


def test_explain_names_every_operator_in_order():
    found = moe_ext.explain(layer_of(drop_tokens=False), torch.randn(3, 5, H))
    assert [call.operator for call in found.calls] == [*("gate", "plan", "balance", "feed_forward")]
    assert all(call.backend == "compiled" for call in found.calls)
    assert found.synchronisations == 0
    text = str(found)
    assert "feed_forward  float32 [15, 16] [15, 2] [30] [5] [4] [15, 2] [4, 16, 16]" in text
    assert "MOELayer:\n" in text
    assert text.endswith("the host waits for the device: never, all ran on the CPU")


@pytest.fixture
def run_by(monkeypatch):
    """run_by(backend, operators): say that this runs these operators."""
    real = registry.backend

    def run_by(backend: str, operators) -> None:
        def found(name, device):
            return backend if name in operators else real(name, device)

        monkeypatch.setattr(registry, "backend", found)

    return run_by


def test_explain_shows_what_an_operator_is_made_of(run_by):
    """Where a device has no kernel for it, as CUDA for the experts."""
    run_by("operators", composed.OPERATORS)
    found = moe_ext.explain(layer_of(drop_tokens=False), torch.randn(3, 5, H))
    assert [call.operator for call in found.calls] == [
        *("gate", "plan", "plan", "dispatch", "grouped_mm", "activate", "grouped_mm", "combine")
    ]


def test_explain_shows_equal_layers_once():
    model = nn.Sequential(*(layer_of() for _ in range(3)), layer_of(drop_tokens=False))
    found = moe_ext.explain(model, torch.randn(5, H))
    names = list(dict.fromkeys(call.layer for call in found.calls))
    assert names == ["0", "1", "2", "3"]
    lines = str(found).splitlines()
    assert [line for line in lines if line.endswith(":")] == ["0 to 2, 3 alike:", "3:"]


def test_explain_notes_experts_that_run_one_after_the_other():
    one = moe_ext.ModuleExperts(nn.Linear(H, H), E)
    shared = moe_ext.SharedExperts(one, nn.Linear(H, H))
    found = moe_ext.explain(layer_of(shared), torch.randn(5, H))
    expected = "MOELayer: ModuleExperts runs 4 experts one after the other"
    assert [note.split(";")[0] for note in found.notes] == [expected]
    assert found.notes[0] in str(found).splitlines()
    assert moe_ext.explain(layer_of(), torch.randn(5, H)).notes == []


def test_explain_runs_a_compiled_model_eagerly():
    """It is compiled afterwards, once, as if explain had not run."""
    compiled, layer, x = CompileCounter(), layer_of().eval(), torch.randn(5, H)
    model = torch.compile(layer, backend=compiled, fullgraph=True)
    assert moe_ext.explain(model, x).calls
    assert compiled.frame_count == 0
    expected = layer(x)
    torch.testing.assert_close(model(x), expected)
    assert compiled.frame_count == 1
    moe_ext.explain(model, x)
    model(x)
    assert compiled.frame_count == 1


def test_explain_counts_higher_order_operators():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer_of()

        def forward(self, layer):  # explain has an argument of this name
            return self.layer(torch.cond(layer.sum() > 0, torch.exp, torch.neg, (layer,)))

    found = moe_ext.explain(Model(), layer=torch.randn(5, H))
    assert found.calls[0].layer == "layer"
    assert found.others["cond"] == 1


def test_explain_takes_any_module():
    experts = GroupedExperts(E, H, 8)
    plan = moe_ext.make_plan(torch.zeros(5, 1, dtype=torch.int32), E)
    text = str(moe_ext.explain(experts, torch.randn(5, H), plan))
    assert "outside of layers:" in text
    found = moe_ext.explain(nn.Linear(H, H), torch.randn(5, H))
    assert found.notes == ["Linear has no MOELayer, nor experts of transformers"]


def test_monitoring_refuses_what_has_no_layers():
    for watch in (moe_ext.explain, stats.track, profiling.ranges):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
            watch(lambda x: x)
    for name, watch in (("stats.track", stats.track), ("profiling.ranges", profiling.ranges)):
        with pytest.raises(ValueError, match=f"{name}: model must have a MOELayer.* got a Linear"):
            watch(nn.Linear(2, 2))


def test_explain_shows_where_16_bit_products_run_in_float32():
    layer = layer_of().bfloat16()
    x = torch.randn(5, H).bfloat16()
    (how,) = (c.how for c in moe_ext.explain(layer, x).calls if c.operator == "feed_forward")
    assert how == torch.ops.moe_ext.products(x)
    in_float32 = "own loops in float32, without fast instructions for bfloat16"
    assert re.search(f"^own loops( on AMX tiles)?$|torch's GEMM|{in_float32}", how)


on_x86 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="limits x86 alone"
)


@on_x86
def test_explain_shows_missing_bfloat16_instructions():
    """In a process where oneDNN may use AVX2 only."""
    code = """
import torch, moe_ext
layer = moe_ext.GroupedExperts(2, 8, 8, dtype=torch.bfloat16)
plan = moe_ext.make_plan(torch.zeros(3, 1, dtype=torch.int32), 2)
class Model(torch.nn.Module):
    def forward(self, x): return layer.routed(x, plan, torch.ones(3, 1))
print(moe_ext.explain(Model(), torch.randn(3, 8).bfloat16()))
"""
    printed = output_of("-c", code, ONEDNN_MAX_CPU_ISA="AVX2")
    assert printed.count("own loops in float32, without fast instructions for bfloat16") == 1


def test_bfloat16_has_own_loops_in_registers():
    """GCC on Linux builds them."""
    cpu = Path("/proc/cpuinfo")
    said = cpu.read_text() if cpu.exists() else ""
    if "AuthenticAMD" not in said or " avx512_bf16 " not in said:
        pytest.skip("needs a CPU with AVX512-BF16 that is not Intel's")
    assert torch.ops.moe_ext.products(torch.empty(0, dtype=torch.bfloat16)) == "own loops"


@on_x86
def test_torchs_limit_of_cpu_capability_limits_us():
    code = "import torch, moe_ext; print(torch.ops.moe_ext.products(torch.empty(0, dtype={})))"

    def said(dtype: str, limit: str) -> str:
        return output_of("-c", code.format(dtype), ATEN_CPU_CAPABILITY=limit)

    assert said("torch.float32", "default") == "torch's GEMM\n"
    assert "own loops" in said("torch.float32", "avx2")
    if torch.cpu._is_avx512_bf16_supported():  # whose instructions take more rows
        assert said("torch.bfloat16", "avx2") != said("torch.bfloat16", "")


def test_explain_restores_the_layer_and_random_state():
    class Timed(GroupedExperts):
        """Experts of others, with attributes of these names."""

        unobserved = wall_clock_breakdown = True
        seen = None

        def routed(self, *args):
            self.seen = self.wall_clock_breakdown
            return super().routed(*args)

    layer = layer_of(Timed(E, H, 8))
    layer(torch.randn(5, H))
    kept = layer.outcome
    assert kept[0].requires_grad
    told = []
    layer.observer = observer = lambda *call: told.append(call)
    layer.wall_clock_breakdown = layer.gate.wall_clock_breakdown = True
    attributes, x = set(vars(layer)), torch.randn(5, H)
    drawn = torch.random.get_rng_state()
    moe_ext.explain(layer, x)
    assert layer.outcome is kept
    assert layer.observer is observer
    assert not told
    assert layer.time_moe == layer.gate.gate_time == 0
    assert layer.experts.seen is False
    assert layer.experts.wall_clock_breakdown is True
    assert set(vars(layer)) == attributes
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_explain_restores_buffers():
    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.mean()
            return x - self.mean

    first = torch.nn.Sequential(torch.nn.BatchNorm1d(H), Mean())
    layer = torch.nn.Sequential(first, layer_of(GroupedExperts(E, H, 8)))
    kept = dict(first.named_buffers())
    before = {name: buffer.clone() for name, buffer in kept.items()}
    moe_ext.explain(layer, torch.randn(5, H))
    assert all(buffer is kept[name] for name, buffer in first.named_buffers())
    assert all(torch.equal(buffer, before[name]) for name, buffer in first.named_buffers())


def test_explain_counts_synchronisations(monkeypatch):
    """The CPU plays the part of another device."""
    layer = moe_ext.MoE(H, nn.Linear(H, H), E, k=2, drop_tokens=False)
    assert moe_ext.explain(layer, torch.randn(5, H)).synchronisations == 0
    monkeypatch.setattr("moe_ext.monitor.explain._HOST", "elsewhere")
    found = moe_ext.explain(layer, torch.randn(5, H))
    assert found.synchronisations == 1  # the largest load
    assert "the host waits for the device: 1 times" in str(found)
    assert "Experts runs 4 experts one after the other" in str(found)
    assert found.is_away
    assert found.others["addmm"] == E


def test_explain_names_operators_whose_first_argument_is_none(run_by):
    run_by("reference", registry.NAMES)

    class Gradient(nn.Module):
        def forward(self, logits):
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(moe_ext.gate(logits, 2).importance.sum(), logits)
            return grad

    found = moe_ext.explain(Gradient(), torch.randn(5, E, requires_grad=True))
    assert [call.operator for call in found.calls] == ["gate", "gate_backward"]


def test_explain_tells_the_path_of_a_product(monkeypatch, run_by):
    class Product(nn.Module):
        def forward(self):
            plan = moe_ext.make_plan(torch.zeros(8, 1, dtype=torch.int32), 2)
            return moe_ext.grouped_mm(torch.randn(8, 4), torch.randn(2, 3, 4), plan)

    run_by("torch", torch_grouped_mm.OPERATORS)
    monkeypatch.setattr(
        torch_grouped_mm, "choose", lambda rows, widths, *_: ("reference", f"{widths}")
    )
    monkeypatch.setattr("moe_ext.monitor.explain._HOST", "elsewhere")
    call = moe_ext.explain(Product()).calls[-1]
    assert (call.operator, call.backend) == ("grouped_mm", "torch")
    assert call.how == "reference, as (3, 4)"

    monkeypatch.setattr(torch_grouped_mm, "choose", lambda *_: ("own", "others loop"))
    call = moe_ext.explain(Product()).calls[-1]
    assert (call.backend, call.how) == ("compiled", "on tensor cores")


# Ranges name the layers and their parts in profiles.


def names_in(profiled) -> list[str]:
    return [event.name for event in profiled.events()]


def test_ranges_name_the_layers_and_their_parts():
    model, x = nn.Sequential(layer_of(), layer_of()), torch.randn(6, H)
    with profile() as profiled, profiling.ranges(model):
        model(x)
    names = names_in(profiled)
    assert names.count("moe_ext.layer 0") == names.count("moe_ext.layer 1") == 1
    assert names.count("moe_ext.gate") == names.count("moe_ext.experts") == 2
    assert names.index("moe_ext.layer 0") < names.index("moe_ext.gate")
    inside = {event.name: event.cpu_parent for event in profiled.events()}
    assert inside["moe_ext.gate"].name.startswith("moe_ext.layer")
    assert inside["moe_ext::feed_forward"] is not None


def test_experts_of_deepspeed_are_named():
    moe = moe_ext.MoE(H, nn.Linear(H, H), E)
    with profile() as profiled, profiling.ranges(moe):
        moe(torch.randn(6, H))
    inside = [e.cpu_parent.name for e in profiled.events() if e.name == "aten::linear"]
    assert inside.count("moe_ext.experts") == E


def test_ranges_leave_no_trace():
    model, x = nn.Sequential(layer_of(), layer_of()), torch.randn(6, H)
    before = [set(vars(module)) for module in model.modules()]
    with pytest.raises(ZeroDivisionError), profiling.ranges(model):
        raise ZeroDivisionError
    assert [set(vars(module)) for module in model.modules()] == before
    with profile() as profiled:
        model(x)
    names = names_in(profiled)
    assert "moe_ext::gate" in names
    assert not [name for name in names if name.startswith("moe_ext.")]
    torch.compile(model, backend="eager", fullgraph=True)(x)


def test_a_shared_part_is_marked_once():
    first = layer_of()
    model = nn.Sequential(first, MOELayer(first.gate, first.experts))
    with profile() as profiled, profiling.ranges(model):
        model(torch.randn(6, H))
    assert names_in(profiled).count("moe_ext.gate") == 2
    assert "route" not in vars(first.gate)


def test_methods_of_an_instance_are_restored():
    """FSDP's register_fsdp_forward_method sets such a method; so does an outer context."""
    model = nn.Sequential(layer_of(), layer_of())
    gate, x = model[0].gate, torch.randn(6, H)
    gate.route = own = Mock(wraps=gate.route)
    with profiling.ranges(model):
        with profiling.ranges(model):
            model(x)
        with profile() as profiled:
            model(x)
    assert names_in(profiled).count("moe_ext.layer 0") == 1
    assert vars(gate)["route"] is own
    assert own.call_count == 2
