"""ExpertParallel as a module: names, buffers, copies, state dicts and wrappers."""

import copy
import itertools
import pickle
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from cases import mixtral_experts, relative_error
from processes import on_processes, on_ranks
from test_expert_parallel import Case, E, H, divided_layer, inputs_of, layer_of
from test_training import batch, divided, loss_of, model_of
from torch import nn
from torch.distributed import fsdp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from moe_ext import (
    ExpertParallel,
    Experts,
    GroupedExperts,
    ModuleExperts,
    MOELayer,
    TopKGate,
    explain,
    parallel,
)
from moe_ext.parallel import make_groups

WORLD = 2


class Scaled(Experts):
    """Stacked parameters, and buffers of every kind."""

    def __init__(self) -> None:
        super().__init__(E)
        self.weight = nn.Parameter(torch.arange(1.0, E + 1)[:, None, None] * torch.eye(H))
        self.register_buffer("scale", 10.0 ** torch.arange(E))
        self.register_buffer("seen", torch.zeros(E), persistent=False)

    def forward(self, rows, plan):
        e = torch.bucketize(torch.arange(len(rows)), plan.offsets[1:], right=True)
        e = e.clamp(max=self.num_experts - 1)
        return (self.weight[e] @ rows[..., None])[..., 0] * self.scale[e][:, None]


def test_importing_the_package_does_not_import_dtensor():
    """It would take most of a second."""
    code = "import sys, torch, moe_ext; print('torch.distributed.tensor' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


@on_ranks(WORLD)
def test_copies_and_pickles_are_layers_of_their_own_with_the_same_names(rank):
    layer = divided_layer(Case(), tensor_group=make_groups(1).ep)
    layer.gate._set_ep_group(dist.group.WORLD)
    x = inputs_of(Case(), rank)[0]
    expected = layer(x)
    again = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.train().to("cpu")]
    for other in again[:2]:
        assert other.experts.down_proj is other.experts.local.down_proj
        assert other.experts.down_proj is not layer.experts.down_proj
        assert other.gate.ep_group is dist.group.WORLD
    for parameter in itertools.chain(*(other.experts.parameters() for other in again)):
        assert parameter.group_name == "ep_size_2"
        assert parameter.allreduce is False
    assert all(torch.equal(other(x), expected) for other in again)
    assert set(layer.state_dict()) == set(layer_of(Case()).state_dict())
    assert layer.eval().experts.local.training is False
    assert "ExpertParallel(" in repr(layer)
    assert MOELayer(layer.gate, layer.experts).num_local_experts == E // WORLD


@on_ranks(WORLD)
def test_buffers_are_divided_and_not_broadcast_by_ddp(rank):
    layer = MOELayer(TopKGate(H, E, drop_tokens=False, use_rts=False), Scaled())
    layer.gate.wg.weight.data.copy_(torch.eye(E, H))
    alone = copy.deepcopy(layer)
    groups = make_groups(WORLD)
    layer.experts = ExpertParallel.of(layer.experts, groups.ep)
    assert "experts.seen" not in layer.state_dict()
    ddp = parallel.data_parallel(layer, groups)
    x = torch.randn(20, H, generator=torch.Generator().manual_seed(rank))
    torch.testing.assert_close(ddp(x), alone(x))
    assert torch.equal(layer.experts.scale, 10.0 ** torch.arange(E).chunk(WORLD)[rank])


@on_ranks(WORLD)
def test_weights_of_single_experts_load(rank):
    part = ExpertParallel.of(GroupedExperts(E, H, 4), dist.group.WORLD)
    theirs, grouped = mixtral_experts(E // WORLD, H, 4)
    part.load_state_dict(theirs)
    torch.testing.assert_close(dict(part.state_dict()), grouped, rtol=0, atol=0)


@on_ranks(WORLD)
def test_experts_on_the_meta_device_can_be_initialised(rank):
    part = ExpertParallel.of(GroupedExperts(E, H, 4, device="meta"), dist.group.WORLD)
    part.to_empty(device="cpu")
    for module in part.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert 0 < max(float(p.detach().abs().max()) for p in part.parameters()) <= 0.5


class Twice(nn.Module):
    """Names with equal ends: only `ffn.experts` are divided."""

    def __init__(self, group) -> None:
        super().__init__()
        self.ffn = MOELayer(TopKGate(H, E), GroupedExperts(E, H, 4))
        self.ffn.experts = ExpertParallel.of(self.ffn.experts, group)
        self.mtp = nn.ModuleDict({"ffn": MOELayer(TopKGate(H, E), GroupedExperts(E, H, 4))})
        self.aux = nn.ModuleDict({"experts": nn.Linear(E // WORLD, 3)})


@on_ranks(WORLD)
def test_only_divided_experts_are_converted(rank):
    groups = make_groups(WORLD)
    model = Twice(groups.ep)
    state = model.state_dict()
    everywhere = parallel.global_state(model, groups, state)
    again = parallel.local_state(model, groups, everywhere)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    converted = [name for name in everywhere if everywhere[name] is not state[name]]
    assert converted == ["ffn.experts.gate_up_proj", "ffn.experts.down_proj"]


@pytest.mark.parametrize("kind", ["grouped", "modules"])
@on_ranks(WORLD)
def test_state_dicts_of_wrapped_models_keep_their_names(rank, kind):
    model, groups = divided(kind)
    plain = parallel.global_state(model, groups, model.state_dict())
    inner = copy.deepcopy(model)  # its experts are wrapped, where they are modules
    apply_activation_checkpointing(inner, check_fn=lambda m: isinstance(m, nn.Sequential))
    ddp = parallel.data_parallel(model, groups)
    compiled = torch.compile(model)
    checkpointed = nn.Sequential(model[0], checkpoint_wrapper(model[1]), model[2])
    for wrapped, state in (
        (ddp, get_model_state_dict(ddp)),
        (ddp, ddp.state_dict()),
        (compiled, get_model_state_dict(compiled)),
        (compiled, compiled.state_dict()),
        (checkpointed, checkpointed.state_dict()),
        (inner, inner.state_dict()),
    ):
        found = parallel.global_state(wrapped, groups, state)
        again = parallel.local_state(wrapped, groups, found)
        assert list(again) == list(state)
        names = [name.removeprefix("module.").removeprefix("_orig_mod.") for name in found]
        same = [type(x) is type(y) for x, y in zip(found.values(), plain.values(), strict=True)]
        assert names == list(plain)
        assert all(same)
    with pytest.raises(
        ValueError, match=r"state must have the experts' names, such as '1\.experts"
    ):
        parallel.global_state(ddp, groups, {"other": torch.ones(1)})


def _mixed(rank: int):
    model, groups = divided("grouped")
    model.float()
    policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    parallel.fully_shard(model, groups, mp_policy=policy)
    loss = loss_of(model, model[1], batch(rank, 0).float())
    loss.backward()
    return float(loss), model[1].experts.down_proj.grad.to_local()


def test_a_model_sharded_in_mixed_precision_has_the_gradients_of_one_process():
    model = model_of("grouped").float()
    losses = [loss_of(model, model[1], batch(rank, 0).float()) for rank in range(WORLD)]
    (sum(losses) / WORLD).backward()
    found = on_processes(WORLD, _mixed)
    for (loss, _), expected in zip(found, losses, strict=True):
        assert loss == pytest.approx(expected.item(), rel=0.05)
    grad = torch.cat([grad for _, grad in found])
    assert relative_error(grad, model[1].experts.down_proj.grad) < 0.05


@on_ranks(4)
def test_average_counts_the_tokens_of_a_tensor_group_once(rank):
    """Ranks 0 and 1 hold the same tokens, and ranks 2 and 3: there are two losses."""
    groups = make_groups(4)
    model = model_of("grouped")
    layer = model[1]
    tensor_group = make_groups(2).ep
    layer.experts = ExpertParallel.of(layer.experts, groups.ep, tensor_group=tensor_group)
    ddp = parallel.data_parallel(model, groups)
    loss_of(ddp, layer, batch(rank // 2, 0)).backward()
    alone = model_of("grouped")
    for part in range(2):
        (loss_of(alone, alone[1], batch(part, 0)) / 2).backward()
    for grad, expected in (
        (layer.experts.down_proj.grad, alone[1].experts.down_proj.grad.chunk(4)[rank]),
        (model[0].weight.grad, alone[0].weight.grad),
    ):
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)


def _frozen(rank: int) -> float:
    model, groups = divided("grouped")
    model.bfloat16()
    if rank == 1:
        model[1].experts.requires_grad_(False)
    loss_of(model, model[1], batch(rank, 0).bfloat16()).backward()
    for p in (*model[0].parameters(), *model[2].parameters(), *model[1].gate.parameters()):
        dist.all_reduce(p.grad)
    return float(parallel.clip_grad_norm_(model, groups, 1.0))


def test_clipping_works_where_a_rank_has_no_gradient():
    norms = on_processes(2, _frozen)
    assert norms[0] == norms[1] > 0


@on_ranks(2)
def test_explain_sees_the_local_experts_and_restores_the_layer(rank):
    gate = TopKGate(H, E, 2, top2_2nd_expert_sampling=False)
    layer = MOELayer(gate, ExpertParallel.of(ModuleExperts(nn.Linear(H, H), E), dist.group.WORLD))
    found = explain(layer, torch.randn(3, H))
    expected = f"MOELayer: ModuleExperts runs {E // 2} experts one after the other"
    assert [note.split(";")[0] for note in found.notes] == [expected]
    assert layer.experts._compared_modes == set()
