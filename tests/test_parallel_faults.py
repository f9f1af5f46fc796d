"""What goes wrong between processes ends in an error that says what, in every one of them."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from processes import Processes, on_processes
from torch import nn

from moe_ext import (
    ExpertParallel,
    GroupedExperts,
    ModuleExperts,
    MoE,
    MOELayer,
    Plan,
    SharedExperts,
    TopKGate,
    make_plan,
)
from moe_ext.parallel import data_parallel, make_groups

H, E, T = 6, 4, 5


def layer_of(
    *, num_experts: int = E, width: int = H, k: int = 2, dtype=torch.float32, options=None, **gate
) -> MOELayer:
    torch.manual_seed(0)
    gate = TopKGate(width, num_experts, k, top2_2nd_expert_sampling=False, min_capacity=0, **gate)
    experts = GroupedExperts(num_experts, width, 3)
    experts = ExpertParallel.of(experts, dist.group.WORLD, **(options or {}))
    return MOELayer(gate, experts).to(dtype)


def _disagreement(rank: int, *sides: tuple[dict, int]) -> str:
    options, tokens = sides[rank]
    layer = layer_of(**options)
    x = torch.randn(tokens, layer.gate.model_dim, dtype=options.get("dtype", torch.float32))
    try:
        layer(x)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("mine", "theirs", "text"),
    [
        ({"num_experts": 4}, {"num_experts": 6}, "num_experts, got 4 {0} and 6 {1}"),
        ({"width": 6}, {"width": 8}, "hidden_size, got 6 {0} and 8 {1}"),
        (
            {"dtype": torch.bfloat16},
            {"dtype": torch.float32},
            "dtype, got torch.bfloat16 {0} and torch.float32 {1}",
        ),
        ({"k": 1}, {"k": 3}, "k, got 1 {0} and 3 {1}"),
        ({"capacity_factor": 1.0}, {"capacity_factor": 2.0}, "capacity, got 3 {0} and 5 {1}; with"),
        ({"drop_tokens": False}, {}, "drops_tokens, got False {0} and True {1}"),
        ({"options": {"uneven_tokens": True}}, {}, "uneven_tokens, got True {0} and False {1}"),
        (
            {"options": {"dedup": True}},
            {"options": {"dedup": False}},
            "dedup, got True {0} and False {1}",
        ),
        (
            {"options": {"overlap": 2}},
            {"options": {"overlap": 3}},
            "overlap, got 2 {0} and 3 {1}",
        ),
        (
            {"options": {"average": True}},
            {},
            "average, got True {0} and False {1}",
        ),
    ],
)
def test_disagreement(mine, theirs, text):
    places = "in the group's process 0", "in its process 1"
    for message in on_processes(2, _disagreement, (mine, T), (theirs, T)):
        assert f"all processes must have the same {text.format(*places)}" in message


def test_different_numbers_of_tokens_and_a_capacity():
    messages = on_processes(2, _disagreement, ({}, 5), ({}, 9))
    assert all("capacity, got 3 " in m and "with uneven_tokens=True" in m for m in messages)


def _later(rank: int) -> str:
    layer = layer_of()
    layer(torch.randn(T, H))
    try:
        layer(torch.randn(T if rank == 0 else 2 * T, H))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_capacity_that_differs_later():
    expected = "same capacity, got 3 in the group's process 0 and 5 in its process 1; with uneven"
    for message in on_processes(2, _later):
        assert expected in message


def _of_four(rank: int, options: dict) -> str:
    layer = layer_of(k=1 if rank == 0 else 2)
    group = make_groups((2, 2)).ep
    layer.experts = ExpertParallel.of(GroupedExperts(E, H, 3), group, **options)
    try:
        layer(torch.randn(T, H))
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("options", [{}, {"dedup": True}])
def test_disagreement_in_two_levels(options):
    for message in on_processes(4, _of_four, options):
        assert "same k, got 1 in the group's process 0 and 2 in its process 1" in message


def _deepspeeds_layer_in_two_levels(rank: int) -> str:
    moe = MoE(H, nn.Linear(H, H), E, ep_size=4)
    try:
        moe.set_deepspeed_parallelism(groups=make_groups((2, 2)))
    except ValueError as error:
        return str(error)
    return "no error"


def test_deepspeeds_layer_in_two_levels():
    for message in on_processes(4, _deepspeeds_layer_in_two_levels):
        assert "MoE.set_deepspeed_parallelism: groups must be of one level" in message


def _differs_after_evaluation(rank: int) -> str:
    layer = layer_of()
    with torch.no_grad():
        layer(torch.randn(T, H))
    try:
        layer(torch.randn(T, H, requires_grad=rank == 0))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_what_needs_gradients_is_compared_after_an_evaluation_too():
    expected = "same tokens_require_grad, got True in the group's process 0 and False in its"
    for message in on_processes(2, _differs_after_evaluation):
        assert expected in message


def _one_has_no_gradient(rank: int) -> str:
    layer = layer_of()
    try:
        layer(torch.randn(T, H, requires_grad=rank == 0))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_gradients_in_some_processes_only():
    for message in on_processes(2, _one_has_no_gradient):
        assert "the same tokens_require_grad, got True in" in message


def _nan(rank: int, options: dict):
    layer = layer_of(drop_tokens=False, options=options)
    torch.manual_seed(rank)
    x = torch.randn(T, H)
    x[2] = torch.nan if rank == 0 else x[2]
    x.requires_grad_()
    out = layer(x)
    # The gradient of tokens: weights' gradients are sums over tokens.
    (grad,) = torch.autograd.grad(out.nan_to_num().square().sum(), x)
    return out.isnan().all(-1), out.isnan().any(-1), grad.isnan().any(-1)


@pytest.mark.parametrize("options", [{}, {"dedup": True}, {"overlap": 2}])
def test_nan_stays_in_its_token(options):
    first, second = on_processes(2, _nan, options)
    only = [False, False, True, False, False]
    assert first[0].tolist() == first[1].tolist() == only
    assert not first[2][torch.tensor(only).logical_not()].any()
    assert not any(found.any() for found in second)


def _met() -> MOELayer:
    """A layer whose processes have met; from now on nobody waits long."""
    layer = layer_of(drop_tokens=False)
    layer(torch.randn(T, H))
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=4), dist.group.WORLD)
    return layer


def _one_dies(rank: int):
    layer = _met()
    if rank == 1:
        time.sleep(1)  # what it has sent arrives
        os._exit(3)
    begin = time.monotonic()
    try:
        for _ in range(2):
            layer(torch.randn(T, H))
    except RuntimeError as error:
        return type(error).__name__, time.monotonic() - begin
    return "no error", 0.0


def _one_stays_away(rank: int):
    layer = _met()
    begin = time.monotonic()
    if rank == 1:
        time.sleep(30)
        return "away", 0.0
    try:
        layer(torch.randn(T, H))
    except RuntimeError as error:
        return str(error), time.monotonic() - begin
    return "no error", 0.0


@pytest.mark.parametrize("function", [_one_dies, _one_stays_away])
def test_a_lost_process_is_no_hang(function):
    """One that is gone, or does not call, ends the others' calls within the group's timeout."""
    pool = Processes(2)
    try:
        for pipe in pool.pipes:
            pipe.send((function, ()))
        failed, answer = pool.pipes[0].recv()
        assert not failed, answer
        message, seconds = answer
        assert message != "no error"
        assert seconds < 15
    finally:
        pool.close()


def _messages(rank: int) -> list[str]:
    world = dist.group.WORLD
    experts = GroupedExperts(E, H, 3)
    parallel = ExpertParallel.of(experts, world)
    gate = TopKGate(H, E)
    with_scale = ModuleExperts(nn.Linear(H, H), E)
    with_scale.scale = nn.Parameter(torch.ones(1))
    experts_alone = MOELayer(gate.requires_grad_(False), ExpertParallel.of(experts, world))
    messages = []
    for make in (
        lambda: ExpertParallel.of(GroupedExperts(5, H, 3), world),
        lambda: ExpertParallel.of(nn.Linear(H, H), world),
        lambda: ExpertParallel.of(with_scale, world),
        lambda: ExpertParallel(experts, None),
        lambda: ExpertParallel(experts, "world"),
        lambda: ExpertParallel(experts, world, overlap=0),
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
    ):
        try:
            make()
        except (ValueError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
        else:
            messages.append("no error")
    return messages


def test_messages():
    expected = [
        "ValueError: ExpertParallel: experts must divide evenly, got num_experts = 5 for 2",
        "ValueError: ExpertParallel: experts must have num_experts, got Linear",
        "ValueError: ExpertParallel: parameters and buffers must be of experts, [E, ...] with E = ",
        "ValueError: ExpertParallel: group must be a process group of which this process",
        "ValueError: ExpertParallel: group must be a process group of which this process",
        "ValueError: ExpertParallel: overlap must be at least 1, got 0",
        "ValueError: ExpertParallel: dedup must be one of (True, False), got 1.5",
        "ValueError: ExpertParallel: num_local_experts must be",
        "ValueError: MOELayer: experts must have the gate's num_experts = 4, got 8",
        "ValueError: MOELayer: ep_size must be 1 with experts that are ExpertParallel, got 2",
        "RuntimeError: MOELayer: ep_group must have ep_size = 2 processes, got 1",
        "ValueError: ExpertParallel: experts must be the routed ones alone, got SharedExperts",
        "ValueError: ExpertParallel: deepep goes with a process group, without the other options",
        "ValueError: data_parallel: DistributedDataParallel needs a parameter to reduce, but only",
        "ValueError: make_groups: ep * dp must be the 2 processes, got 3 * 1",
        "ValueError: make_groups: ep must be a number or (nodes, places), got (1, 2, 1)",
        "ValueError: make_groups: ep * dp must be the 2 processes, got 2 * 2",
    ]
    for found in on_processes(2, _messages):
        for message, start in zip(found, expected, strict=True):
            assert message.startswith(start)


def test_without_processes():
    with pytest.raises(ValueError, match=r"make_groups: torch\.distributed is not initialised"):
        make_groups(1)


def _foreign(rank: int) -> str:
    """A plan of other experts than there are."""
    parallel = ExpertParallel.of(GroupedExperts(E, H, 3), dist.group.WORLD)
    plan: Plan = make_plan(torch.zeros(T, 1, dtype=torch.int32), E + 2)
    try:
        SharedExperts(parallel, nn.Identity()).routed(torch.randn(T, H), plan, torch.ones(T, 1))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_plan_of_other_experts():
    for message in on_processes(2, _foreign):
        assert message == "ExpertParallel: plan must be of E = 4 experts, got 6"
