"""Models with divided experts train, save and load like a model on one process."""

import contextlib
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import gathered, on_processes, on_ranks
from test_expert_parallel import Case, E, H, RecordCollectives, layer_of
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moe_ext import ExpertParallel, MoE, MOELayer, parallel
from moe_ext.deepspeed.utils import (
    is_moe_param,
    split_params_into_different_moe_groups_for_optimizer,
)
from moe_ext.parallel import make_groups
from moe_ext.parallel.checkpoint import ExpertRows

T, STEPS = 8, 3
KINDS = ["grouped", "modules"]


def model_of(kind: str, experts: int = E) -> nn.Sequential:
    layer = layer_of(Case(kind=kind, experts=experts))  # sets the seed
    return nn.Sequential(nn.Linear(H, H), layer, nn.Linear(H, 1)).double()


def divided(
    kind: str, ep: int | tuple[int, int] = 2, experts: int = E
) -> tuple[nn.Sequential, parallel.Groups]:
    model, groups = model_of(kind, experts), make_groups(ep)
    model[1].experts = ExpertParallel.of(model[1].experts, groups.ep)
    return model, groups


def wrapped(model: nn.Module, groups: parallel.Groups, is_sharded: bool) -> nn.Module:
    return (parallel.fully_shard if is_sharded else parallel.data_parallel)(model, groups)


def batch(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(T, H, generator=generator, dtype=torch.float64)


def loss_of(model: nn.Module, layer: MOELayer, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean() + 0.1 * layer.l_aux


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def trained_alone(
    kind: str, world: int, steps: int = STEPS, micro: int = 1, experts: int = E
) -> nn.Sequential:
    """Train one process on the batches of all ranks."""
    model = model_of(kind, experts)
    optimizer = optimizer_of(model)
    for step in range(steps):
        optimizer.zero_grad()
        for rank, part in itertools.product(range(world), range(micro)):
            loss = loss_of(model, model[1], batch(rank, step * micro + part))
            (loss / world).backward()
        optimizer.step()
    return model


def train(model, layer, optimizer, rank: int, steps: range, micro: int = 1) -> None:
    for step in steps:
        optimizer.zero_grad()
        for part in range(micro):
            if hasattr(model, "require_backward_grad_sync"):
                model.require_backward_grad_sync = part == micro - 1
            loss_of(model, layer, batch(rank, step * micro + part)).backward()
        optimizer.step()


def whole(value: torch.Tensor) -> torch.Tensor:
    if isinstance(value, ExpertRows):
        result = torch.full(value.shape, torch.nan, dtype=value.dtype)
        for offset, rows in gathered((value.offset, value.local)):
            pairs = zip(offset, rows.shape, strict=True)
            result[tuple(slice(begin, begin + n) for begin, n in pairs)] = rows
        return result
    return value.full_tensor() if isinstance(value, DTensor) else value.detach().clone()


def everyones(model: nn.Module, groups: parallel.Groups) -> dict[str, torch.Tensor]:
    """The state of all experts, gathered from all ranks."""
    state = parallel.global_state(model, groups, model.state_dict())
    states = gathered({name: whole(value) for name, value in state.items()})
    return {name: value for state in states for name, value in state.items()}


@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 2), (2, 1)])
@pytest.mark.parametrize(
    ("wrapper", "micro"), [("ddp", 1), ("ddp", 2), ("fsdp", 1), ("fsdp, block by block", 1)]
)
@pytest.mark.parametrize("kind", KINDS)
@on_ranks(lambda world, **_: world)
def test_wrapped_models_train_like_one_process(rank, kind, wrapper, micro, world, ep):
    """micro: batches per step; all but the last run without synchronisation, as in `no_sync`."""
    model, groups = divided(kind, ep)
    layer, is_sharded = model[1], wrapper != "ddp"
    if wrapper == "fsdp, block by block":
        parallel.fully_shard(layer, groups)
    outer = wrapped(model, groups, is_sharded)
    assert isinstance(layer.experts, FSDPModule) == (is_sharded and ep > 1)
    train(outer, layer, optimizer_of(model), rank, range(STEPS), micro)
    assert all(is_moe_param(p) for p in layer.experts.parameters()) or ep == 1
    expected = dict(trained_alone(kind, world, micro=micro).state_dict())
    torch.testing.assert_close(everyones(model, groups), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize(("world", "ep", "experts"), [(3, 3, 8), (4, 2, 5), (4, 2, 3)])
@pytest.mark.parametrize("kind", KINDS)
@on_ranks(lambda world, **_: world)
def test_uneven_experts_train_like_one_process(rank, kind, world, ep, experts, is_sharded):
    """With 3 experts FSDP2 divides one among two copies, and one copy has no rows."""
    model, groups = divided(kind, ep, experts)
    outer = wrapped(model, groups, is_sharded)
    train(outer, model[1], optimizer_of(model), rank, range(STEPS))
    expected = dict(trained_alone(kind, world, experts=experts).state_dict())
    torch.testing.assert_close(everyones(model, groups), expected, rtol=1e-10, atol=1e-10)


def _reduced(rank: int, kind: str, in_forward: bool, in_backward: bool):
    model, groups = divided(kind)
    ddp = parallel.data_parallel(model, groups)
    with contextlib.nullcontext() if in_forward else ddp.no_sync():
        loss = loss_of(ddp, model[1], batch(rank, 0))
    with (
        contextlib.nullcontext() if in_backward else ddp.no_sync(),
        RecordCollectives() as seen,
    ):
        loss.backward()
    mine = model[0].weight.grad, next(model[1].experts.parameters()).grad
    return sum("allreduce" in name for name in seen.names), mine


@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_outside_no_sync_decides_that_its_backward_reduces(kind, in_forward, in_backward):
    # A rank has half of the experts.
    parameters = len(list(model_of(kind)[1].experts.parameters()))
    number = parameters if kind == "grouped" else parameters // 2
    found = on_processes(4, _reduced, kind, in_forward, in_backward)
    for (count, mine), (_, copies) in zip(found[:2], found[2:], strict=True):
        # Every expert parameter, and the buckets of all others.
        assert count >= number if in_forward else count == 0
        assert list(map(torch.equal, mine, copies)) == [in_forward] * 2


OPTIONS = dcp_state.StateDictOptions(flatten_optimizer_state_dict=True)


def _state(model: nn.Module, groups: parallel.Groups, optimizer) -> dict[str, dict]:
    states = dcp_state.get_state_dict(model, optimizer, options=OPTIONS)
    weights, moments = (parallel.global_state(model, groups, state) for state in states)
    return {"model": weights, "optimizer": moments}


def _load_train_save(
    rank: int,
    kind: str,
    experts: int,
    batches: int,
    before: str,
    after: str,
    ep: int,
    is_sharded: bool,
    step: int,
):
    """Continue the training on so many batches by one step. Returns weights before and after it."""
    model, groups = divided(kind, ep, experts)
    layer = model[1]
    outer = wrapped(model, groups, is_sharded)
    optimizer = optimizer_of(model)
    if step > 0:
        state = _state(model, groups, optimizer)
        dcp.load(state, checkpoint_id=before)
        weights, moments = (parallel.local_state(model, groups, part) for part in state.values())
        dcp_state.set_model_state_dict(model, weights)
        dcp_state.set_optimizer_state_dict(model, optimizer, moments, options=OPTIONS)
    loaded = everyones(model, groups)
    each = batches // dist.get_world_size()
    for part in range(each):
        last = part == each - 1
        if is_sharded:
            model.set_requires_gradient_sync(last)
        else:
            outer.require_backward_grad_sync = last
        (loss_of(outer, layer, batch(rank * each + part, step)) / each).backward()
    optimizer.step()
    dcp.save(_state(model, groups, optimizer), checkpoint_id=after)
    return loaded, everyones(model, groups)


# Ranks, ranks that share the experts, and whether FSDP2 shards the model.
EVEN = [(4, 4, False), (2, 2, True), (4, 2, True), (4, 2, False), (1, 1, False), (2, 2, False)]
EVEN_AND_UNEVEN = [(3, 3, False), (2, 2, True), (3, 3, True), (1, 1, False), (3, 3, False)]
# One of two copies has no rows.
WITHOUT_ROWS = [(4, 2, True), (2, 2, False), (4, 2, True), (4, 2, False)]


@pytest.mark.parametrize(
    ("experts", "batches", "runs"),
    [(E, 4, EVEN), (E, 6, EVEN_AND_UNEVEN), (3, 4, WITHOUT_ROWS)],
    ids=["even", "even and uneven", "without rows"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_training_continues_on_another_number_of_ranks(kind, experts, batches, runs, tmp_path):
    trained = dict(model_of(kind, experts).state_dict())
    for i, (world, ep, is_sharded) in enumerate(runs):
        before, after = (str(tmp_path / str(j)) for j in (i, i + 1))
        arguments = kind, experts, batches, before, after, ep, is_sharded, i
        found = on_processes(world, _load_train_save, *arguments)
        for loaded, _ in found:
            torch.testing.assert_close(loaded, trained, rtol=0, atol=0)
        trained = found[0][1]
    expected = trained_alone(kind, batches, len(runs), experts=experts).state_dict()
    torch.testing.assert_close(trained, dict(expected), rtol=1e-9, atol=1e-9)
    # A process without groups loads the same files.
    alone = {name: torch.zeros_like(value) for name, value in trained.items()}
    dcp.load({"model": alone}, checkpoint_id=after, no_dist=True)
    torch.testing.assert_close(alone, trained, rtol=0, atol=0)


@pytest.mark.parametrize("is_strided", [False, True])
@on_ranks(4)
def test_deepspeeds_layer_divides_its_experts(rank, is_strided):
    torch.manual_seed(1)
    expert = nn.Linear(H, H)
    moe = MoE(H, expert, E, ep_size=2, k=1, drop_tokens=True, use_rts=False, min_capacity=T)
    layer = moe.deepspeed_moe
    names = set(moe.state_dict())
    with pytest.raises(RuntimeError, match="with ep_size = 2 its process group must be set first"):
        moe(torch.randn(T, H))
    moe.set_deepspeed_parallelism(is_strided)
    assert isinstance(layer.experts, ExpertParallel)
    assert layer.ep_group is layer.gate.ep_group is layer.experts.group
    assert set(moe.state_dict()) == names
    assert moe.num_local_experts == layer.num_local_experts == E // 2
    found = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(moe.parameters()), "name": "all"}
    )
    assert [group["name"] for group in found] == ["all", "ep_size_2"]
    first = layer.experts.rank * E // 2
    with torch.no_grad():
        for i, copied in enumerate(layer.experts.deepspeed_experts):
            copied.weight.mul_(1 + first + i)
    x = batch(rank, 0).float()
    out, _, counts = moe(x)
    chosen = layer.gate.wg(x).softmax(-1)
    weight, ids = chosen.max(-1, keepdim=True)
    by_hand = weight * ((1 + ids) * nn.functional.linear(x, expert.weight) + expert.bias)
    assert counts.sum() == T
    torch.testing.assert_close(out, by_hand)
    other = MoE(H, expert, E, ep_size=2)
    groups = make_groups(2, neighbours_share=not is_strided)
    other.set_deepspeed_parallelism(groups=groups)
    assert other.deepspeed_moe.experts.group is groups.ep
    expected = [rank % 2, rank % 2 + 2] if is_strided else [rank // 2 * 2, rank // 2 * 2 + 1]
    assert dist.get_process_group_ranks(layer.ep_group) == expected


@on_ranks(2)
def test_rank_load_counts_the_routes_of_all_ranks(rank):
    load = parallel.rank_load(torch.arange(E) * (rank + 1), dist.group.WORLD)
    assert load.tolist() == [(0 + 1 + 2 + 3) * 3, (4 + 5 + 6 + 7) * 3]
    load = parallel.rank_load(torch.arange(5) * (rank + 1), dist.group.WORLD)
    assert load.tolist() == [(0 + 1 + 2) * 3, (3 + 4) * 3]


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 2), (4, (2, 2))])
@pytest.mark.parametrize("kind", KINDS)
@on_ranks(lambda world, **_: world)
def test_gradients_are_clipped_by_the_norm_of_one_process(rank, kind, world, ep, is_sharded):
    alone = model_of(kind)
    for part in range(world):
        (loss_of(alone, alone[1], batch(part, 0)) / world).backward()
    expected = nn.utils.get_total_norm([p.grad for p in alone.parameters()])
    model, groups = divided(kind, ep)
    outer = wrapped(model, groups, is_sharded)
    loss_of(outer, model[1], batch(rank, 0)).backward()
    norm = parallel.clip_grad_norm_(model, groups, 0.01)
    torch.testing.assert_close(norm, expected, rtol=1e-10, atol=0)
    again = parallel.clip_grad_norm_(model, groups, 1.0)
    torch.testing.assert_close(again, torch.full_like(again, 0.01), rtol=1e-3, atol=0)
