"""What goes wrong between processes ends in an error that says what, in every one of them."""

import copy
import os
import re
import time
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import Processes, on_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

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
def test_options_that_differ_are_named_on_all_ranks(mine, theirs, text):
    places = "on rank 0 of the group", "on rank 1"
    for message in on_processes(2, _disagreement, (mine, T), (theirs, T)):
        assert f"all ranks must have the same {text.format(*places)}" in message


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
    expected = "same capacity, got 3 on rank 0 of the group and 5 on rank 1; with uneven"
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
        assert "same k, got 1 on rank 0 of the group and 2 on rank 1" in message


def _deepspeeds_layer_in_two_levels(rank: int) -> str:
    moe = MoE(H, nn.Linear(H, H), E, ep_size=4)
    try:
        moe.set_deepspeed_parallelism(groups=make_groups((2, 2)))
    except ValueError as error:
        return str(error)
    return "no error"


def test_deepspeeds_layer_in_two_levels():
    for message in on_processes(4, _deepspeeds_layer_in_two_levels):
        assert "MoE.set_deepspeed_parallelism: groups must have one level" in message


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
    expected = "same tokens_require_grad, got True on rank 0 of the group and False on"
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
        assert "the same tokens_require_grad, got True on" in message


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


# What rank 1 alone runs in place of `second(first(x))`.


def _swapped(first, second, x):
    return first(second(x))


def _without_second(first, second, x):
    return first(x)


def _given_up(first, second, x):
    first(x)
    raise MemoryError


def _failing(first, second, x):
    """While the other ranks wait for what its experts give."""
    with mock.patch.object(second.experts.local, "routed", side_effect=MemoryError):
        return second(first(x))


def _out_of_step(rank: int, program, options: dict, num_experts: int, trains: bool):
    """The first error of an exchange on this rank; whether rows of a rank that failed are NaN; and
    whether all ranks go on from there like ranks that never failed."""
    first, second = layer_of(**options), layer_of(num_experts=num_experts, **options)

    def step(program):
        x = torch.linspace(-1, 1, T * H).view(T, H).requires_grad_(trains)
        with torch.set_grad_enabled(trains):
            out = program(first, second, x)
        if trains:
            out.sum().backward()
        return out.detach()

    def in_order(first, second, x):
        return second(first(x))

    expected, error, has_nan = step(in_order), "no error", False
    for _ in range(3):
        try:
            has_nan |= bool(step(program if rank == 1 else in_order).isnan().any())
        except MemoryError:
            pass
        except RuntimeError as raised:
            error = str(raised)
            break
    return error, has_nan, torch.equal(step(in_order), expected)


@pytest.mark.parametrize(
    ("program", "trains", "place"),
    [
        (_swapped, False, ("forward of layer", "forward of layer")),
        (_swapped, True, ("forward of layer", "forward of layer")),
        (_without_second, False, ("forward of layer", "forward of layer")),
        (_without_second, True, ("forward of layer", "backward of layer")),
        (_given_up, False, ("forward of layer", "forward of layer")),
        (_given_up, True, ("forward of layer", "forward of layer")),
    ],
)
@pytest.mark.parametrize("num_experts", [E, 80])
@pytest.mark.parametrize("options", [{}, {"drop_tokens": False}], ids=["capacity", "dropless"])
def test_ranks_out_of_step_raise_alike_and_may_go_on(program, trains, place, num_experts, options):
    """Whatever meets, rows and counts of other layers, other sizes, a forward and a backward."""
    arguments = program, options, num_experts, trains
    (first, *_, first_goes_on), (second, *_, goes_on) = on_processes(2, _out_of_step, *arguments)
    assert first == second
    assert first.startswith("ExpertParallel: all ranks must make the same calls in the same order")
    mine, theirs = re.search(
        r"got the (.*) \d+ on rank 0 .* the (.*) \d+ on rank 1", first
    ).groups()
    assert (mine, theirs) == place
    assert first_goes_on
    assert goes_on


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("options", [{}, {"drop_tokens": False, "options": {"overlap": 2}}])
def test_experts_that_fail_on_one_rank_end_all_ranks_calls(options, trains):
    """The others get NaN from them at once, and an error in the next exchange."""
    (first, has_nan, first_goes_on), (second, _, goes_on) = on_processes(
        2, _out_of_step, _failing, options, E, trains
    )
    assert has_nan or trains
    assert first == second
    assert "experts raised an exception in the last call on rank 1 of the group" in first
    assert first_goes_on
    assert goes_on


def _failing_backward(rank: int):
    """Of the experts on rank 1, while rank 0 waits for its gradients."""

    def fail(grad):
        raise MemoryError

    layer = layer_of()
    x = torch.randn(T, H, requires_grad=True)
    if rank == 0:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=4), dist.group.WORLD)
    else:
        layer.experts.local.down_proj.register_hook(fail)
    for _ in range(2):
        try:
            layer(x).sum().backward()
        except MemoryError:
            continue
        except RuntimeError as error:
            return str(error)
    return "no error"


def test_a_backward_that_fails_on_one_rank_is_no_message_to_others():
    pool = Processes(2)
    try:
        waits, failed = pool.run(_failing_backward)
    finally:
        pool.close()
    assert "ExpertParallel: an exception ended a backward on this rank" in failed
    assert waits != "no error"


def _error_of(function) -> str:
    try:
        function()
    except (RuntimeError, AssertionError, KeyboardInterrupt, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _autocast_alone(rank: int) -> list[str]:
    layer, x = layer_of(), torch.randn(T, H)
    with torch.autocast("cpu", torch.bfloat16, enabled=rank == 0):
        first = _error_of(lambda: layer(x))
    return [first, _error_of(lambda: layer(x))]


def test_autocast_on_one_rank_is_named():
    """Its experts would send rows of another width."""
    for first, second in on_processes(2, _autocast_alone):
        assert "same autocast_dtype, got torch.bfloat16 on rank 0 of the group" in first
        assert second == "no error"


def _other_rows(rank: int, rows) -> list[str]:
    layer = layer_of(drop_tokens=False)
    local = layer.experts.local
    experts_give = local.routed
    if rank == 1:
        local.routed = lambda *args: rows(experts_give(*args))
    x = torch.ones(T, H)
    expected = layer_of(drop_tokens=False)(x)
    said = [_error_of(lambda: torch.testing.assert_close(layer(x), expected))]
    return [*said, _error_of(lambda: layer(x))]


def _widened(rows: torch.Tensor) -> torch.Tensor:
    return rows.double()


def _cut(rows: torch.Tensor) -> torch.Tensor:
    return rows[1:]


def _forgotten(rows: torch.Tensor) -> None:
    return None


def test_rows_are_sent_in_the_dtype_of_the_tokens():
    assert on_processes(2, _other_rows, _widened) == [["no error"] * 2] * 2


@pytest.mark.parametrize(("rows", "got"), [(_cut, "["), (_forgotten, "NoneType")])
def test_experts_that_return_no_rows_of_theirs_are_named(rows, got):
    (others, error), (here, same_error) = on_processes(2, _other_rows, rows)
    assert "ExpertParallel: experts must return [R, H]" in here
    assert f"got {got}" in here
    assert "nan at index" in others
    assert error == same_error
    assert "experts raised an exception in the last call on rank 1" in error


def _interrupted(rank: int) -> list[str]:
    layer, x = layer_of(), torch.randn(T, H)
    layer(x)
    with mock.patch.object(layer.experts.local, "routed", side_effect=KeyboardInterrupt) as routed:
        if rank == 0:
            routed.side_effect = layer.experts.local.__class__.routed.__get__(layer.experts.local)
        first = _error_of(lambda: layer(x))
    return [first, _error_of(lambda: layer(x)), _error_of(lambda: layer(x))]


def test_an_interrupt_on_one_rank_is_no_message_to_others():
    (_, *first), (interrupted, *second) = on_processes(2, _interrupted)
    assert interrupted.startswith("KeyboardInterrupt")
    for error, after in (first, second):
        assert "experts raised an exception in the last call on rank 1 of the group" in error
        assert after == "no error"


def _step_fails(rank: int, step: str, drops: bool, trains: bool) -> list[str]:
    # Rows of as many bytes as the opening message, which could pass for it.
    layer = layer_of(width=2, drop_tokens=drops, capacity_factor=4.0)
    x = torch.randn(16, 2, requires_grad=trains)
    out = layer(x)

    def call():
        return out.sum().backward() if trains else layer(x)

    if rank == 0:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=4), dist.group.WORLD)
        return [_error_of(call)]
    with mock.patch(f"moe_ext.parallel.{step}", side_effect=MemoryError):
        first = _error_of(call)
    return [first, _error_of(lambda: layer(x))]


@pytest.mark.parametrize(
    ("step", "drops", "trains"),
    [
        ("permute.dispatch", False, False),
        ("permute._ids_of_buffers", True, False),
        ("communicator.check", True, False),
        ("communicator.check", True, True),
    ],
)
def test_a_rank_that_fails_while_others_wait_refuses_further_calls(step, drops, trains):
    """Its next message would be taken for rows."""
    pool = Processes(2)
    try:
        (waits,), (failed, refused) = pool.run(_step_fails, step, drops, trains)
    finally:
        pool.close()
    assert waits.startswith("RuntimeError")
    assert failed.startswith("MemoryError")
    assert re.search("an exception ended a (call|backward) on this rank", refused)


def _shared_fail_in_two_levels(rank: int, dedup: bool) -> list[str]:
    layer = layer_of(drop_tokens=False)
    group = make_groups((2, 2)).ep
    experts = ExpertParallel.of(GroupedExperts(E, H, 3), group, dedup=dedup, overlap=2)
    shared = nn.Linear(H, H)
    layer.experts = SharedExperts(experts, shared)
    x = torch.randn(T, H)
    layer(x)
    with mock.patch.object(shared, "forward", side_effect=MemoryError if rank == 1 else None) as f:
        if rank != 1:
            f.side_effect = lambda x: x
        first = _error_of(lambda: layer(x))
    return [first, _error_of(lambda: layer(x)), _error_of(lambda: layer(x))]


@pytest.mark.parametrize("dedup", [False, True])
def test_shared_experts_that_fail_on_one_rank_of_two_levels(dedup):
    found = on_processes(4, _shared_fail_in_two_levels, dedup)
    for rank, (first, error, after) in enumerate(found):
        assert first.startswith("MemoryError" if rank == 1 else "no error")
        assert "experts raised an exception in the last call on rank 1 of the group" in error
        assert after == "no error"


def _one_has_a_copy(rank: int) -> list[str]:
    layer = layer_of()
    if rank == 0:
        copy.deepcopy(layer)
    other, x = layer_of(), torch.randn(T, H)
    return [_error_of(lambda: other(layer(x)))]


def test_one_rank_may_have_a_copy_of_a_layer():
    assert on_processes(2, _one_has_a_copy) == [["no error"]] * 2


def _leaves_tokens_out(rank: int) -> list[str]:
    layer = layer_of()

    def step(leaves_out: bool):
        out = layer(torch.randn(T, H, requires_grad=True)).sum()
        out.backward(inputs=list(layer.parameters()) if leaves_out else None)

    return [_error_of(lambda: step(rank == 1)), _error_of(lambda: step(False))]


def test_a_backward_of_other_inputs_on_one_rank_is_named():
    for error, after in on_processes(2, _leaves_tokens_out):
        assert "the same tokens_require_grad, got True on rank 0 of the group and False" in error
        assert after == "no error"


def _share_tokens(rank: int, fault: str, drops: bool) -> list[str]:
    """Ranks 0 and 1 have the same tokens, as 2 and 3. Rank 1 alone is at fault, once."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
    layer = layer_of(drop_tokens=drops)
    layer.experts = ExpertParallel.of(
        GroupedExperts(E, H, 3), mesh.get_group("ep"), tensor_group=mesh.get_group("tp")
    )
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

    errors = [_error_of(lambda: call(rank == 1))]
    if fault == "experts":  # the others hear of it in the next call
        errors.append(_error_of(lambda: call(False)))
    assert torch.equal(layer(x), expected)
    return errors


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("fault", ["autocast", "tokens", "experts"])
def test_a_fault_among_ranks_that_share_tokens_is_raised_on_all(fault, drops):
    for *_, error in on_processes(4, _share_tokens, fault, drops):
        assert (
            "all ranks must have the same" in error
            or "ranks of a tensor_group" in error
            or (fault == "experts" and "experts raised an exception in the last call" in error)
        )


def _in_processes_again(rank: int, file: str) -> list[str]:
    before, x = layer_of(), torch.randn(T, H)
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    after = layer_of()
    first, second = (before, after) if rank == 0 else (after, before)
    swapped = _error_of(lambda: second(first(x)))
    return [swapped, _error_of(lambda: after(before(x)))]


def test_layers_of_a_group_before_are_told_from_new_ones(tmp_path):
    pool = Processes(2)
    try:
        found = pool.run(_in_processes_again, str(tmp_path / "meeting"))
    finally:
        pool.close()
    for swapped, after in found:
        assert "all ranks must make the same calls in the same order" in swapped
        assert after == "no error"
