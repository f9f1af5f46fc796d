"""Exceptions, NaN and lost ranks: no rank hangs, and none takes a message for another one."""

import operator
import os
import re
import time
from contextlib import closing
from datetime import timedelta
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from parallel_faults import E, GivenUp, H, T, error_of, layer_of, run_out_of_step
from processes import Processes, on_processes, on_ranks
from torch import nn

from moe_ext import MOELayer, SharedExperts
from moe_ext.parallel import make_groups


def shorten_timeout(group: dist.ProcessGroup) -> None:
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3), group)


@pytest.mark.parametrize("options", [{}, {"dedup": True}, {"overlap": 2}])
@on_ranks(2)
def test_nan_stays_in_its_token(rank, options):
    layer = layer_of(drop_tokens=False, options=options)
    torch.manual_seed(rank)
    x = torch.randn(T, H)
    is_nan = (torch.arange(T) == 2) & (rank == 0)
    x[is_nan] = torch.nan
    x.requires_grad_()
    out = layer(x)
    # The gradient of tokens: weights' gradients are sums over tokens.
    (grad,) = torch.autograd.grad(out.nan_to_num().square().sum(), x)
    assert torch.equal(out.isnan().all(-1), is_nan)
    assert torch.equal(out.isnan().any(-1), is_nan)
    assert not grad[~is_nan].isnan().any()


def impatient_layer() -> MOELayer:
    """After its first call its group has a short timeout."""
    group = make_groups(2).ep
    layer = layer_of(drop_tokens=False, group=group)
    layer(torch.randn(T, H))
    shorten_timeout(group)
    return layer


def _one_dies(rank: int) -> str:
    layer = impatient_layer()
    if rank == 1:
        time.sleep(1)  # what it has sent arrives
        os._exit(3)
    return error_of(lambda: [layer(torch.randn(T, H)) for _ in range(2)])


def test_a_rank_that_dies_ends_the_others_calls():
    with closing(Processes(2)) as pool:
        for pipe in pool.pipes:
            pipe.send((_one_dies, ()))
        begin = time.monotonic()
        failed, error = pool.pipes[0].recv()
        assert not failed, error
        assert error.startswith("RuntimeError")
        assert time.monotonic() - begin < 30


@on_ranks(2)
def test_a_rank_that_does_not_call_ends_the_others_calls_after_the_timeout(rank):
    layer = impatient_layer()
    begin = time.monotonic()
    if rank == 0:
        error = error_of(lambda: layer(torch.randn(T, H)))
        assert error.startswith("RuntimeError")
        assert 2 < time.monotonic() - begin < 15
    dist.barrier()


def _failing(error, first, second, x):
    """While the other ranks wait for the outputs of its experts."""
    with mock.patch.object(second.experts.local, "routed", side_effect=error), pytest.raises(error):
        second(first(x))
    raise GivenUp


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("options", [{}, {"drop_tokens": False, "options": {"overlap": 2}}])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@on_ranks(2)
def test_experts_that_fail_on_one_rank_fail_on_all_in_the_next_call(rank, error, options, trains):
    """The others get NaN in that call, and an error in the next one."""
    told, has_nan = run_out_of_step(rank, partial(_failing, error), options, E, trains)
    assert has_nan or trains or rank == 1
    assert "experts raised an exception in the last call on rank 1 of the group" in told


def _other_rows(rank: int, rows) -> list[str]:
    layer = layer_of(drop_tokens=False)
    local = layer.experts.local
    routed = local.routed
    if rank == 1:
        local.routed = lambda *args: rows(routed(*args))
    x = torch.ones(T, H)
    expected = layer_of(drop_tokens=False)(x)
    first = error_of(lambda: torch.testing.assert_close(layer(x), expected))
    return [first, error_of(lambda: layer(x))]


def test_rows_are_sent_in_the_dtype_of_the_tokens():
    assert on_processes(2, _other_rows, operator.methodcaller("double")) == [["no error"] * 2] * 2


def nothing(rows) -> None:
    pass


@pytest.mark.parametrize(
    ("rows", "got"), [(operator.itemgetter(slice(1, None)), "[9, 6]"), (nothing, "NoneType")]
)
def test_outputs_of_another_shape_are_named_on_their_rank(rows, got):
    (others, error), (here, same_error) = on_processes(2, _other_rows, rows)
    assert "ExpertParallel: experts must return [R, H]" in here
    assert f"got {got}" in here
    assert "nan at index" in others
    assert error == same_error
    assert "experts raised an exception in the last call on rank 1" in error


@pytest.mark.parametrize(
    ("step", "drops", "trains"),
    [
        ("parallel.permute.dispatch", False, False),
        ("parallel.permute._ids_of_buffers", True, False),
        ("parallel.communicator.check", True, False),
        ("parallel.communicator.check", True, True),
        ("ops.feed_forward.FeedForward.backward", True, True),
    ],
)
@on_ranks(2)
def test_a_rank_that_fails_while_others_wait_refuses_further_calls(rank, step, drops, trains):
    """Otherwise its next message would be taken for rows."""
    # Rows of as many bytes as the opening message, which could pass for it.
    group = make_groups(2).ep
    layer = layer_of(width=2, drop_tokens=drops, capacity_factor=4.0, group=group)
    x = torch.randn(16, 2, requires_grad=trains)
    out = layer(x)

    def call():
        return out.sum().backward() if trains else layer(x)

    if rank == 0:
        shorten_timeout(group)
        assert error_of(call).startswith("RuntimeError")
        return
    with mock.patch(f"moe_ext.{step}", side_effect=MemoryError):
        assert error_of(call).startswith("MemoryError")
    refused = error_of(lambda: layer(x))
    assert re.search("an exception ended a (call|backward) on this rank", refused)


@pytest.mark.parametrize("dedup", [False, True])
@pytest.mark.parametrize("part", ["shared", "experts"])
@on_ranks(4)
def test_a_part_that_fails_on_one_rank_of_a_mesh_of_nodes(rank, part, dedup):
    group, options = make_groups((2, 2)).ep, {"dedup": dedup, "overlap": 2}
    layer = layer_of(drop_tokens=False, group=group, options=options)
    experts, shared = layer.experts, nn.Linear(H, H)
    layer.experts = SharedExperts(experts, shared)
    x = torch.randn(T, H)
    layer(x)
    owner, method = (shared, "forward") if part == "shared" else (experts.local, "routed")
    effect = MemoryError if rank == 1 else getattr(owner, method)
    with mock.patch.object(owner, method, side_effect=effect):
        first = error_of(lambda: layer(x))
    assert first.startswith("MemoryError" if rank == 1 else "no error")
    error = error_of(lambda: layer(x))
    assert "experts raised an exception in the last call on rank 1 of the group" in error
    layer(x)
