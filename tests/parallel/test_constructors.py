"""Invalid arguments: errors of constructors and of `make_groups`."""

import pytest
import torch
import torch.distributed as dist
from parallel_faults import E, H, T, error_of
from processes import on_ranks
from torch import nn

from moe_ext import (
    ExpertParallel,
    GroupedExperts,
    ModuleExperts,
    MoE,
    MOELayer,
    SharedExperts,
    TopKGate,
    make_plan,
)
from moe_ext.parallel import data_parallel, make_groups


@on_ranks(2)
def test_invalid_arguments_are_named(rank):
    world = dist.group.WORLD
    experts = GroupedExperts(E, H, 3)
    parallel = ExpertParallel.of(experts, world)
    plan = make_plan(torch.zeros(T, 1, dtype=torch.int32), E + 2)
    of_six = torch.randn(T, H), plan, torch.ones(T, 1)
    gate = TopKGate(H, E)
    with_scale = ModuleExperts(nn.Linear(H, H), E)
    with_scale.scale = nn.Parameter(torch.ones(1))
    experts_alone = MOELayer(gate.requires_grad_(False), ExpertParallel.of(experts, world))
    calls = [
        lambda: ExpertParallel.of(GroupedExperts(5, H, 3), world),
        lambda: ExpertParallel.of(nn.Linear(H, H), world),
        lambda: ExpertParallel.of(with_scale, world),
        lambda: ExpertParallel(experts, None),
        lambda: ExpertParallel(experts, "world"),
        lambda: ExpertParallel(experts, world, overlap=0),
        lambda: ExpertParallel(experts, world, overlap=256),
        lambda: ExpertParallel(experts, world, dedup=1.5),
        lambda: ExpertParallel(nn.Linear(H, H), world),
        lambda: MOELayer(gate, ExpertParallel(experts, world)),
        lambda: MOELayer(gate, parallel, ep_size=2),
        lambda: MOELayer(TopKGate(H, E), nn.Linear(H, H), "", 2, 2)._set_ep_group(None),
        lambda: ExpertParallel(SharedExperts(experts, nn.Identity()), world),
        lambda: ExpertParallel(experts, world, deepep=object(), overlap=2),
        lambda: data_parallel(experts_alone, make_groups(2)),
        lambda: make_groups(3),
        lambda: make_groups((1, 2, 1)),
        lambda: make_groups(2, 2),
        lambda: SharedExperts(parallel, nn.Identity()).routed(*of_six),
    ]
    expected = [
        "ValueError: ExpertParallel: experts must divide evenly, got num_experts = 5 for 2",
        "ValueError: ExpertParallel: experts must have num_experts, got Linear",
        "ValueError: ExpertParallel: parameters and buffers must be stacked [E, ...] with E = ",
        "ValueError: ExpertParallel: group must be a mesh, or a process group that this",
        "ValueError: ExpertParallel: group must be a mesh, or a process group that this",
        "ValueError: ExpertParallel: overlap must be at least 1, got 0",
        "ValueError: ExpertParallel: overlap must be in 1..255, got 256",
        "ValueError: ExpertParallel: dedup must be one of (True, False), got 1.5",
        "ValueError: ExpertParallel: num_local_experts must be",
        "ValueError: MOELayer: experts must have the gate's num_experts = 4, got 8",
        "ValueError: MOELayer: ep_size must be 1 with experts that are ExpertParallel, got 2",
        "RuntimeError: MOELayer: ep_group must have ep_size = 2 processes, got 1",
        "ValueError: ExpertParallel: experts must be routed experts, got SharedExperts",
        "ValueError: ExpertParallel: deepep needs a process group, and neither tensor_group nor",
        "ValueError: data_parallel: DistributedDataParallel needs a parameter to reduce, but only",
        "ValueError: make_groups: ep * dp must be the 2 ranks, got 3 * 1",
        "ValueError: make_groups: ep must be a number or (nodes, local ranks), got (1, 2, 1)",
        "ValueError: make_groups: ep * dp must be the 2 ranks, got 2 * 2",
        "RuntimeError: ExpertParallel: plan must be of E = 4 experts, got 6",
    ]
    for call, start in zip(calls, expected, strict=True):
        assert error_of(call).startswith(start)


def test_make_groups_needs_an_initialised_process_group():
    with pytest.raises(ValueError, match=r"make_groups: torch\.distributed is not initialised"):
        make_groups(1)


@on_ranks(4)
def test_a_mesh_of_nodes_is_refused_by_deepspeeds_layer(rank):
    moe = MoE(H, nn.Linear(H, H), E, ep_size=4)
    error = error_of(lambda: moe.set_deepspeed_parallelism(groups=make_groups((2, 2))))
    assert "MoE.set_deepspeed_parallelism: groups must have one level" in error
