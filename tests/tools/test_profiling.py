"""Ranges name the layers and their parts in profiles."""

import pytest
import torch
from torch import nn
from torch.profiler import profile

from moe_ext import GroupedExperts, MoE, MOELayer, TopKGate, profiling


def model_of() -> nn.Sequential:
    return nn.Sequential(*(MOELayer(TopKGate(16, 4, 2), GroupedExperts(4, 16, 8)) for _ in "ab"))


def names_in(profiled) -> list[str]:
    return [event.name for event in profiled.events()]


def test_ranges_name_the_layers_and_their_parts():
    model, x = model_of(), torch.randn(6, 16)
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
    moe = MoE(16, nn.Linear(16, 16), 4)
    with profile() as profiled, profiling.ranges(moe):
        moe(torch.randn(6, 16))
    inside = [e.cpu_parent.name for e in profiled.events() if e.name == "aten::linear"]
    assert inside.count("moe_ext.experts") == 4


def test_ranges_leave_no_trace():
    model, x = model_of(), torch.randn(6, 16)
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
    first = MOELayer(TopKGate(16, 4, 2), GroupedExperts(4, 16, 8))
    model = nn.Sequential(first, MOELayer(first.gate, first.experts))
    with profile() as profiled, profiling.ranges(model):
        model(torch.randn(6, 16))
    assert names_in(profiled).count("moe_ext.gate") == 2
    assert "route" not in vars(first.gate)


def test_methods_of_an_instance_are_restored():
    """FSDP's register_fsdp_forward_method sets such a method; so does an outer context."""
    model = model_of()
    gate, x = model[0].gate, torch.randn(6, 16)
    calls = []
    plain = gate.route

    def own(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    gate.route = own
    with profiling.ranges(model):
        with profiling.ranges(model):
            model(x)
        with profile() as profiled:
            model(x)
    assert names_in(profiled).count("moe_ext.layer 0") == 1
    assert vars(gate)["route"] is own
    assert len(calls) == 2
