"""torch's wrappers, savers and loaders: they treat divided experts as such, or are refused."""

from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from parallel_faults import error_of
from processes import on_ranks
from test_expert_parallel import E, H, RecordCollectives
from test_training import T, batch, divided, everyones, loss_of, model_of
from torch import nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from moe_ext import (
    CosineRouter,
    ExpertParallel,
    GroupedExperts,
    MoE,
    MOELayer,
    TopKGate,
    parallel,
    total_l_aux,
)
from moe_ext.parallel import make_groups
from moe_ext.parallel.checkpoint import ExpertRows


def by_columns(parameter: nn.Parameter) -> Shard | None:
    return Shard(2) if parameter.dim() == 3 else None


@pytest.mark.parametrize("experts", [E, 5])
@on_ranks(4)
def test_experts_may_be_sharded_along_another_dimension(rank, experts):
    model, groups = divided("grouped", 2, experts)
    parallel.fully_shard(model, groups, shard_placement_fn=by_columns)
    expected = dict(model_of("grouped", experts).state_dict())
    state = parallel.global_state(model, groups, model.state_dict())
    torch.testing.assert_close(everyones(model, groups), expected, rtol=0, atol=0)
    model.load_state_dict(parallel.local_state(model, groups, state))
    torch.testing.assert_close(everyones(model, groups), expected, rtol=0, atol=0)


@on_ranks(2)
def test_a_sharded_layer_may_be_called_by_forward_with_aux(rank):
    (_, layer, _), groups = divided("grouped")
    x = batch(rank, 0)
    expected = layer.forward_with_aux(x)[0].detach()
    parallel.fully_shard(layer, groups)
    assert torch.equal(layer.forward_with_aux(x)[0].detach(), expected)


@pytest.mark.parametrize("reshard", [False, True])
@on_ranks(2)
def test_a_sharded_layer_is_gathered_again_for_the_backward_if_it_reshards(rank, reshard):
    (_, layer, _), groups = divided("grouped")
    parallel.fully_shard(layer, groups, reshard_after_forward=reshard)
    with RecordCollectives() as seen:
        layer(batch(rank, 0)).sum().backward()
    assert sum("allgather" in name for name in seen.names) == 1 + reshard


@on_ranks(2)
def test_experts_that_are_not_divided_are_reduced_by_ddp(rank):
    moe = MoE(H, nn.Linear(H, H), E)
    moe.deepspeed_moe.gate.requires_grad_(False)
    groups = make_groups(2)
    ddp = parallel.data_parallel(moe, groups)
    ddp(torch.randn(T, H) * (1 + rank))[0].sum().backward()
    (grad, *_) = (p.grad for p in moe.deepspeed_moe.experts.parameters())
    total = grad.clone()
    dist.all_reduce(total)
    assert torch.allclose(total, 2 * grad)


@on_ranks(2)
def test_an_overflow_on_one_rank_skips_the_step_on_all(rank):
    """The gradients overflow in the experts of one rank."""
    model, groups = divided("grouped")
    parallel.data_parallel(model, groups)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert dist.get_world_size(groups.dp) == 1
    scaler = ShardedGradScaler(device="cpu", init_scale=8.0)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(loss_of(model, model[1], batch(rank, 0))).backward()
    if rank == 0:
        model[1].experts.down_proj.grad[0, 0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize(
    ("wrap", "instead"),
    [
        ("ddp", "parallel.data_parallel"),
        ("fsdp", "parallel.fully_shard"),
        ("fsdp of experts, then of all", "parallel.fully_shard"),
    ],
)
# torch.compile does not trace the forward of experts that are modules.
@pytest.mark.parametrize(
    ("kind", "compiles"), [("grouped", False), ("grouped", True), ("modules", False)]
)
@on_ranks(2)
def test_plain_wrappers_are_refused(rank, kind, compiles, wrap, instead):
    """They would mix the experts of different ranks."""
    torch._dynamo.reset()
    model, _ = divided(kind)
    if not compiles:
        model(batch(rank, 0))  # a layer that was called before is refused too
    else:
        gate = TopKGate(H, E, 2, use_rts=False, top2_2nd_expert_sampling=False)
        model[1] = MOELayer(gate, model[1].experts).double()
        model[1].compile(backend="eager")
    if wrap == "fsdp of experts, then of all":
        fsdp.fully_shard(model[1].experts)
    wrapped = DistributedDataParallel(model) if wrap == "ddp" else fsdp.fully_shard(model)
    error = error_of(lambda: wrapped(batch(rank, 0)))
    assert f"wrap it by moe_ext.{instead}(model, groups)" in error


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "NO_SHARD"])
@pytest.mark.parametrize("kind", ["grouped", "modules"])
@on_ranks(2)
def test_fully_sharded_data_parallel_is_refused(rank, kind, strategy, use_orig_params, trains):
    model = fsdp.FullyShardedDataParallel(
        divided(kind)[0],
        use_orig_params=use_orig_params,
        sharding_strategy=fsdp.ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
    )
    with torch.set_grad_enabled(trains):
        error = error_of(lambda: model(batch(rank, 0)))
    assert "ExpertParallel: FullyShardedDataParallel treats" in error
    assert "wrap it by moe_ext.parallel.fully_shard(model, groups)" in error


class Padded(nn.Linear):
    """Experts on [ep, E, C, H]."""

    num_experts = E


@pytest.mark.parametrize("use_orig_params", [False, True])
@on_ranks(2)
def test_fully_sharded_data_parallel_in_mixed_precision(rank, use_orig_params):
    """Whole layers, and experts that a layer calls; parts that it would bypass are refused."""
    wrap = partial(
        fsdp.FullyShardedDataParallel,
        use_orig_params=use_orig_params,
        mixed_precision=fsdp.MixedPrecision(param_dtype=torch.bfloat16),
        device_id=torch.device("cpu"),
    )
    for router in (None, CosineRouter(H, E)):
        experts = GroupedExperts(E, H, 8) if router is None else wrap(Padded(H, H))
        gate = TopKGate(H, E, 2, drop_tokens=False, router=router)
        model = wrap(MOELayer(gate, experts, num_local_experts=E))
        out = model(batch(rank, 0).bfloat16())
        (out.square().sum() + total_l_aux(model)).backward()
        assert out.dtype == torch.bfloat16
        assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.numel())
    for part in ("gate", "experts"):
        layer = MOELayer(TopKGate(H, E, 2, drop_tokens=False), GroupedExperts(E, H, 8))
        layer._modules[part] = wrap(getattr(layer, part))
        error = error_of(partial(layer, batch(rank, 0).bfloat16()))
        assert f"{part} must not be wrapped alone, got FullyShardedDataParallel" in error


@on_ranks(2)
def test_replaced_parameters_are_refused_until_they_are_marked(rank):
    (_, layer, _), _ = divided("grouped")
    layer.experts.gate_up_proj = nn.Parameter(layer.experts.gate_up_proj.detach().clone())
    assert "call experts.mark()" in error_of(lambda: layer(batch(rank, 0)))
    layer.experts.mark()
    layer(batch(rank, 0))


@on_ranks(2)
def test_functional_calls_and_adapters_are_accepted(rank):
    model, _ = divided("modules")
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.func.functional_call(model, parameters, (batch(rank, 0),))
    for expert in model[1].experts.experts:
        expert[0].adapter = nn.Parameter(torch.zeros(1))
    model(batch(rank, 0))


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("kind", ["grouped", "modules"])
@on_ranks(lambda is_sharded, **_: 4 if is_sharded else 2)
def test_plain_checkpoints_of_divided_experts_are_refused(rank, kind, is_sharded, tmp_path):
    """torch.distributed.checkpoint would save one rank's experts as those of all ranks."""
    model, groups = divided(kind)
    if is_sharded:
        parallel.fully_shard(model, groups)
    dcp.save(parallel.global_state(model, groups, model.state_dict()), checkpoint_id=tmp_path)
    for state_of in (nn.Module.state_dict, get_model_state_dict):
        save = partial(dcp.save, state_of(model), checkpoint_id=tmp_path / "plain")
        assert "moe_ext.parallel.global_state(model, groups, state)" in error_of(save)
    error = error_of(lambda: dcp.load(model.state_dict(), checkpoint_id=tmp_path))
    assert "moe_ext.parallel.global_state" in error or "Size mismatch between saved" in error


@pytest.mark.parametrize("experts", [E, 5])
@on_ranks(2)
def test_checkpoints_may_be_saved_in_the_background(rank, experts, tmp_path):
    model, groups = divided("grouped", 2, experts)
    state = parallel.global_state(model, groups, model.state_dict())
    saved = dcp.async_save(state, checkpoint_id=tmp_path)
    saved.result()
    expected = dict(model_of("grouped", experts).state_dict())
    found = {name: torch.zeros_like(value) for name, value in expected.items()}
    dcp.load(found, checkpoint_id=tmp_path)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@on_ranks(2)
def test_the_state_of_uneven_experts_is_for_checkpoints_alone(rank):
    model, groups = divided("grouped", 2, 5)
    state = parallel.global_state(model, groups, model.state_dict())
    value = state["1.experts.down_proj"]
    assert len(value) == 5
    assert f"offset=[{rank * 3}, 0, 0]" in repr(value)
    assert "is not supported for a value of global_state" in error_of(lambda: value + 1)


def test_rows_that_a_rank_does_not_have_are_not_written():
    """Their offset is that of the next rank's rows."""
    rows = ExpertRows(torch.empty(0, 2), torch.Size((3, 2)), torch.Size((2, 0)), Shard(0))
    assert rows.__create_write_items__("name", rows) == rows.__create_chunk_list__() == []


@on_ranks(2)
def test_a_state_dict_saved_per_rank_loads_on_that_rank_alone(rank, tmp_path):
    model, _ = divided("modules")
    torch.save(model.state_dict(), tmp_path / f"{rank}.pt")
    dist.barrier()
    mine, others = (
        torch.load(tmp_path / f"{file}.pt", weights_only=True) for file in (rank, 1 - rank)
    )
    model.load_state_dict(mine)
    assert all(map(torch.equal, mine.values(), model.state_dict().values()))
    error = error_of(lambda: model.load_state_dict(others))
    assert f"holds the experts of rank {1 - rank} of 2, and this is rank {rank} of 2" in error
    assert all(type(value) is torch.Tensor and not vars(value) for value in mine.values())


@on_ranks(2)
def test_a_model_saved_on_another_rank_is_refused(rank, tmp_path):
    model, _ = divided("grouped")
    torch.save(model, tmp_path / f"{rank}.pt")
    dist.barrier()
    torch.load(tmp_path / f"{rank}.pt", weights_only=False)(batch(rank, 0))
    if rank == 1:
        model = torch.load(tmp_path / "0.pt", weights_only=False)
        error = error_of(lambda: model(batch(rank, 0)))
        assert "holds the experts of rank 0 of 2, and was loaded on another rank" in error


def _timeout_of(group: dist.ProcessGroup) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout


@pytest.mark.parametrize("ep", [4, (2, 2)])
@on_ranks(4)
def test_make_groups_creates_new_groups(rank, ep):
    """A fault in one, and its timeout, must not affect another."""
    world, short = dist.group.WORLD, timedelta(seconds=3)
    before = _timeout_of(world)
    made = [make_groups(ep, timeout=timeout).mesh.get_all_groups() for timeout in (short, None)]
    for groups, timeout in zip(made, (short, before), strict=True):
        assert [_timeout_of(group) for group in groups] == [timeout] * len(groups)
    names = {group.group_name for group in (world, *made[0], *made[1])}
    assert len(names) == 1 + 2 * len(made[0])
    assert _timeout_of(world) == before


@on_ranks(4)
def test_plain_ddp_over_copies_is_accepted(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    model = model_of("grouped")
    model[1].experts = ExpertParallel.of(model[1].experts, mesh.get_group("ep"))
    parallel = DistributedDataParallel(model, process_group=mesh.get_group("dp"))
    parallel(batch(rank, 0)).sum().backward()
