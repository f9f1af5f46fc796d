"""Errors that name their cause: invalid arguments, and ranks that make different calls."""

import copy
import re
from contextlib import closing
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from parallel_faults import E, GivenUp, H, T, error_of, layer_of, run_out_of_step
from processes import Processes, on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

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


@pytest.mark.parametrize(
    ("mine", "theirs", "text"),
    [
        ({"num_experts": 4}, {"num_experts": 6}, "num_experts, got 4 {0} and 6 {1}"),
        # Ranks have as many places for these.
        ({"num_experts": 5}, {"num_experts": 6}, "num_experts, got 5 {0} and 6 {1}"),
        ({"width": 6}, {"width": 8}, "hidden_size, got 6 {0} and 8 {1}"),
        (
            {"dtype": torch.bfloat16},
            {"dtype": torch.float32},
            "dtype, got torch.bfloat16 {0} and torch.float32 {1}",
        ),
        ({"k": 1}, {"k": 3}, "k, got 1 {0} and 3 {1}"),
        (
            {"capacity_factor": 1.0},
            {"capacity_factor": 2.0},
            "capacity, got 3 {0} and 5 {1}; with uneven_tokens=True it may differ",
        ),
        ({"drop_tokens": False}, {}, "drops_tokens, got False {0} and True {1}"),
        ({"options": {"uneven_tokens": True}}, {}, "uneven_tokens, got True {0} and False {1}"),
        ({"options": {"dedup": True}}, {}, "dedup, got True {0} and False {1}"),
        ({"options": {"overlap": 2}}, {"options": {"overlap": 3}}, "overlap, got 2 {0} and 3 {1}"),
        ({"options": {"average": True}}, {}, "average, got True {0} and False {1}"),
        # As many calls before, and a longer batch.
        ({"before": [True]}, {"before": [True], "tokens": 2 * T}, "capacity, got 3 {0} and 5 {1}"),
        ({"requires_grad": True}, {}, "tokens_require_grad, got True {0} and False {1}"),
        (
            {"before": [False], "requires_grad": True},
            {"before": [False]},
            "tokens_require_grad, got True {0} and False {1}",
        ),
        # Its experts would send rows of another width.
        ({"autocast": True}, {}, "autocast_dtype, got torch.bfloat16 {0} and torch.float32 {1}"),
    ],
)
@on_ranks(2)
def test_options_that_differ_are_named_on_all_ranks(rank, mine, theirs, text):
    """before: grad modes of earlier calls; other names are options of `layer_of`"""
    call = {"tokens": T, "requires_grad": False, "autocast": False, "before": ()}
    side = theirs if rank else mine
    options = {name: value for name, value in side.items() if name not in call}
    call |= side
    layer = layer_of(**options)
    x = torch.randn(
        *(call["tokens"], layer.gate.model_dim),
        dtype=options.get("dtype", torch.float32),
        requires_grad=call["requires_grad"],
    )
    for grad_mode in call["before"]:
        with torch.set_grad_enabled(grad_mode):
            layer(x[:T].detach())
    with torch.autocast("cpu", torch.bfloat16, enabled=call["autocast"]):
        error = error_of(lambda: layer(x))
    where = "on rank 0 of the group", "on rank 1"
    assert f"all ranks must have the same {text.format(*where)}" in error


@pytest.mark.parametrize("options", [{}, {"dedup": True}])
@on_ranks(4)
def test_a_difference_on_a_mesh_of_nodes_is_named(rank, options):
    layer = layer_of(k=1 if rank == 0 else 2, group=make_groups((2, 2)).ep, options=options)
    error = error_of(lambda: layer(torch.randn(T, H)))
    assert "same k, got 1 on rank 0 of the group and 2 on rank 1" in error


@on_ranks(2)
def test_a_backward_of_other_inputs_on_one_rank_is_named(rank):
    layer = layer_of()

    def step(leaves_out: bool):
        out = layer(torch.randn(T, H, requires_grad=True)).sum()
        out.backward(inputs=list(layer.parameters()) if leaves_out else None)

    error = error_of(lambda: step(rank == 1))
    assert "the same tokens_require_grad, got True on rank 0 of the group and False" in error
    step(False)


# Rank 1 alone runs one of these in place of `second(first(x))`.


def _swapped(first, second, x):
    return first(second(x))


def _without_second(first, second, x):
    return first(x)


def _given_up(first, second, x):
    first(x)
    raise GivenUp


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("program", [_swapped, _without_second, _given_up])
@pytest.mark.parametrize("num_experts", [E, 80])
@pytest.mark.parametrize("options", [{}, {"drop_tokens": False}], ids=["capacity", "dropless"])
@on_ranks(2)
def test_ranks_out_of_step_raise_one_error_and_go_on(rank, program, trains, num_experts, options):
    """Rows or counts of another layer, of another size, or a forward and a backward."""
    error, _ = run_out_of_step(rank, program, options, num_experts, trains)
    assert error.startswith("ExpertParallel: all ranks must make the same calls in the same order")
    found = re.search(r"got the (\w+) of layer \d+ on rank 0 .* the (\w+) of layer \d+ on", error)
    second = "backward" if program is _without_second and trains else "forward"
    assert found.groups() == ("forward", second)


@on_ranks(2)
def test_one_rank_may_have_a_copy_of_a_layer(rank):
    layer = layer_of()
    if rank == 0:
        copy.deepcopy(layer)
    other = layer_of()
    other(layer(torch.randn(T, H)))


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("fault", ["autocast", "tokens", "experts"])
@on_ranks(4)
def test_a_fault_in_a_tensor_group_is_raised_on_all_ranks(rank, fault, drops):
    """Ranks 0 and 1 share tokens, and ranks 2 and 3. Rank 1 alone is at fault, once."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
    options = {"tensor_group": mesh.get_group("tp")}
    layer = layer_of(drop_tokens=drops, group=mesh.get_group("ep"), options=options)
    torch.manual_seed(rank // 2)
    x = torch.randn(T, H)
    expected = layer(x)

    def call(is_at_fault: bool):
        if not is_at_fault:
            return layer(x)
        if fault == "experts":
            with mock.patch.object(layer.experts.local, "routed", side_effect=MemoryError):
                return layer(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=fault == "autocast"):
            return layer(torch.cat([x, x]) if fault == "tokens" else x)

    error = error_of(lambda: call(rank == 1))
    if fault == "experts":  # the others are told in the next call
        error = error_of(lambda: call(False))
    assert (
        "all ranks must have the same" in error
        or "ranks of a tensor_group" in error
        or (fault == "experts" and "experts raised an exception in the last call" in error)
    )
    assert torch.equal(layer(x), expected)


def _in_a_second_world(rank: int, file: str) -> list[str]:
    before, x = layer_of(), torch.randn(T, H)
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    after = layer_of()
    first, second = (before, after) if rank == 0 else (after, before)
    swapped = error_of(lambda: second(first(x)))
    return [swapped, error_of(lambda: after(before(x)))]


def test_layers_of_a_destroyed_group_are_told_from_new_ones(tmp_path):
    with closing(Processes(2)) as pool:
        found = pool.run(_in_a_second_world, str(tmp_path / "rendezvous"))
    for swapped, after in found:
        assert "all ranks must make the same calls in the same order" in swapped
        assert after == "no error"


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
        lambda: ExpertParallel.of(GroupedExperts(1, H, 3), world),
        lambda: ExpertParallel(experts, world, num_experts=5),
        lambda: ExpertParallel(experts, world, num_experts=4.5),
        lambda: ExpertParallel(
            *(nn.Linear(H, H), world), num_local_experts=3 - rank, num_experts=5
        ),
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
        lambda: MOELayer(TopKGate(H, 5), nn.Linear(H, H), "", 2, 3 - rank),
        lambda: ExpertParallel(SharedExperts(experts, nn.Identity()), world),
        lambda: ExpertParallel(experts, world, deepep=object(), overlap=2),
        lambda: data_parallel(experts_alone, make_groups(2)),
        lambda: make_groups(3),
        lambda: make_groups((1, 2, 1)),
        lambda: make_groups(2, 2),
        lambda: SharedExperts(parallel, nn.Identity()).routed(*of_six),
    ]
    expected = [
        "ValueError: ExpertParallel: every rank needs an expert, got num_experts = 1 for 2 ranks",
        f"ValueError: ExpertParallel: rank {rank} of 2 must hold {3 - rank} of num_experts = 5",
        "ValueError: ExpertParallel: num_experts must be",
        "ValueError: ExpertParallel: experts that take capacity buffers must divide evenly, got",
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
        "ValueError: MOELayer: the gate's num_experts must be a multiple of ep_size, got 5 and 2",
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
