"""DeepSpeed's names without DeepSpeed: layers, helpers and process groups.

test_deepspeed.py compares their results with those of DeepSpeed.
"""

import copy
import pickle
import re

import pytest
import torch
import torch.distributed as dist
from cases import relative_error, weighted_sum
from processes import on_ranks
from torch import nn
from torch.utils import _pytree as pytree

import moe_ext
import moe_ext.deepspeed.experts
from moe_ext import Experts, GroupedExperts, MoE, MOELayer, TopKGate
from moe_ext.deepspeed import sharded_moe, utils
from moe_ext.deepspeed.mappings import drop_tokens, gather_tokens

E, H, S = 6, 10, 40


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(H, 7), nn.ReLU(), nn.Linear(7, H))


@pytest.mark.parametrize("options", [{}, {"drop_tokens": False}, {"capacity_factor": 0.4}])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_moe_is_the_weighted_sum_of_its_experts(k, options):
    moe = MoE(H, expert(), E, k=k, min_capacity=0, sampling_in_eval=False, **options).eval()
    experts = moe.deepspeed_moe.experts.deepspeed_experts
    for e, module in enumerate(experts):
        nn.init.normal_(module[0].weight)
        nn.init.constant_(module[2].bias, e)
    x = torch.randn(4, S // 4, H)
    out, l_aux, exp_counts = moe(x)
    routing = moe.deepspeed_moe.gate.route(x.view(S, H))
    outputs = [module(x.view(S, H)) for module in experts]
    by_hand = weighted_sum(outputs, routing.plan.expert_ids, routing.weights)
    assert relative_error(out.view(S, H), by_hand) < 1e-6
    assert torch.equal(l_aux, routing.l_aux)
    assert torch.equal(exp_counts, routing.plan.load.long())


def test_state_dict_keys_are_those_of_deepspeed():
    moe = MoE(H, nn.Linear(H, H), 2, use_residual=True)
    experts = [f"deepspeed_moe.experts.deepspeed_experts.{e}" for e in range(2)]
    linears = [*experts, "mlp", "coefficient"]
    assert set(moe.state_dict()) == {
        "deepspeed_moe.gate.wg.weight",
        *(f"{linear}.{name}" for linear in linears for name in ("weight", "bias")),
    }


def test_moe_passes_every_option_to_the_gate():
    moe = MoE(H, nn.Linear(H, H), E, k=2, scoring="sigmoid", expert_bias=True, scale=2.5)
    gate = moe.deepspeed_moe.gate
    assert (gate.scoring, gate.scale) == ("sigmoid", 2.5)
    assert gate.expert_bias.shape == (E,)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        MoE(H, nn.Linear(H, H), E, colour="red")


def test_names_and_attributes_are_those_of_deepspeed():
    for name in sharded_moe.__all__:
        assert hasattr(sharded_moe, name)
    assert issubclass(sharded_moe.TopKGate, moe_ext.TopKGate)
    assert issubclass(sharded_moe.MOELayer, moe_ext.MOELayer)
    assert moe_ext.MoE is moe_ext.deepspeed.layer.MoE
    assert not issubclass(moe_ext.deepspeed.experts.Experts, moe_ext.Experts)
    layer = MOELayer(TopKGate(H, E), GroupedExperts(E, H, 4), use_tutel=True)
    for name in ("time_falltoall", "time_salltoall", "time_moe", "wall_clock_breakdown"):
        assert getattr(layer, name) == 0
    assert layer.use_tutel is False
    assert layer.ep_group is None
    moe = MoE(H, nn.Linear(H, H), E)
    moe.set_deepspeed_parallelism()
    assert moe(torch.randn(5, H))[0].shape == (5, H)
    moe.deepspeed_moe._set_ep_group(None)
    assert moe.deepspeed_moe.ep_group is moe.deepspeed_moe.gate.ep_group is None


@pytest.mark.parametrize("name", ["top1gating", "top2gating", "topkgating"])
def test_gating_functions_refuse_wrong_logits(name):
    args = (3, 1.0, 4) if name == "topkgating" else (1.0, 4)
    function = getattr(sharded_moe, name)
    for wrong, message in (
        (torch.randn(5), r"logits must be \[S, E\], got \[5\]"),
        (torch.ones(5, 4, dtype=torch.int64), "logits must be float32, .* got int64"),
        (1.0, "logits must be a tensor, got float"),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: {message}"):
            function(wrong, *args)
    with pytest.raises(RuntimeError, match=r"k must be an integer, got 1\.25"):
        sharded_moe.topkgating(torch.randn(5, 4), 1.25, 2, 4)


def test_timers_print_their_times(capsys):
    moe = MoE(H, nn.Linear(H, H), E)
    moe.deepspeed_moe.wall_clock_breakdown = True
    moe(torch.randn(S, H))
    moe.deepspeed_moe.timers.log(["moe", sharded_moe.FIRST_ALLTOALL_TIMER])
    assert re.fullmatch(
        r"time \(ms\) \| moe: \d+\.\d\d \| 1st_a2a: 0\.00\n", capsys.readouterr().out
    )


def test_a_bool_in_place_of_the_group_is_use_tutel():
    logits = torch.randn(S, E)
    by_position = sharded_moe.top1gating(logits, 1.0, 4, None, None, True, False, True)
    by_name = sharded_moe.top1gating(logits, 1.0, 4, use_rts=False, use_tutel=True)
    assert len(by_position) == 7
    assert isinstance(by_position[3], list)
    for a, b in zip(pytree.tree_leaves(by_position), pytree.tree_leaves(by_name), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert len(sharded_moe.top1gating(logits, 1.0, 4, None, None, True, False, False)) == 4


def test_gating_functions_do_not_change_their_logits():
    logits = torch.randn(S, E, requires_grad=True)
    before = logits.detach().clone()
    sharded_moe.top1gating(logits, 1.0, 4, noisy_gate_policy="RSample")
    sharded_moe.top2gating(logits, 1.0, 4)
    sharded_moe.topkgating(logits, 3, 1.0, 4)
    assert torch.equal(logits, before)


def test_jitter_has_the_epsilon_of_each_call():
    x = torch.ones(2000)
    for epsilon in (0.5, 0.01, 0.2):
        jittered = sharded_moe.multiplicative_jitter(x, x.device, epsilon)
        assert 0.98 * epsilon < (jittered - 1).abs().max() <= epsilon * (1 + 1e-6)
    assert sharded_moe.multiplicative_jitter(x, x.device, 0) is x


def test_capacity_factor_0_gives_min_capacity():
    _, C, *_ = sharded_moe.top1gating(torch.randn(S, E), 0.0, 3, sparse_routes=True)
    assert C == 3


def assigned(moe: MoE) -> MoE:
    """A new layer with the parameters of this one."""
    with torch.device("meta"):
        twin = MoE(H, nn.Linear(H, H), 2)
    twin.load_state_dict(moe.state_dict(), assign=True)
    return twin


@pytest.mark.parametrize(
    "copier",
    [
        copy.deepcopy,
        assigned,
        lambda moe: pickle.loads(pickle.dumps(moe)),
        lambda moe: copy.deepcopy(moe).to("meta").to_empty(device="cpu"),
        lambda moe: copy.deepcopy(moe).bfloat16(),
    ],
)
def test_copies_keep_the_marks_of_expert_parameters(copier):
    twin = copier(MoE(H, nn.Linear(H, H), 2))
    names = [n for n, p in twin.named_parameters() if utils.is_moe_param(p)]
    assert len(names) == 4
    assert all("deepspeed_experts" in name for name in names)
    parameters = list(twin.deepspeed_moe.experts.parameters())
    assert {p.group_name for p in parameters} == {"ep_size_1"}


@pytest.mark.parametrize("options", [{}, {"use_residual": True}])
def test_moe_replays_a_recorded_choice(options):
    moe = MoE(H, nn.Linear(H, H), E, k=2, drop_tokens=False, **options)
    x = torch.randn(S, H)
    out, aux = moe.forward_with_aux(x)
    assert not torch.equal(moe(x)[0], out)
    again, l_aux, exp_counts = moe(x, expert_ids=aux.expert_ids)
    assert torch.equal(again, out)
    assert torch.equal(l_aux, aux.l_aux)
    assert torch.equal(exp_counts, aux.exp_counts)


def test_optimizer_groups_keep_the_order_of_the_callers():
    first, second = (MoE(H, nn.Linear(H, H), 2) for _ in range(2))
    for p in second.deepspeed_moe.experts.parameters():
        p.group_name = "another"
    given = [
        {"params": list(second.parameters()), "name": "b", "lr": 1},
        {"params": list(first.parameters()), "name": "a"},
    ]
    groups = utils.split_params_into_different_moe_groups_for_optimizer(given)
    assert [len(group["params"]) for group in given] == [5, 5]
    assert [group["name"] for group in groups] == ["b", "a", "another", "ep_size_1"]
    assert [group.get("lr") for group in groups] == [1, None, 1, None]
    assert all(utils.is_moe_param_group(group) for group in groups[2:])
    assert sum(len(group["params"]) for group in groups) == 10
    small = utils.split_params_into_different_moe_groups_for_optimizer(given, H * H + 3)
    assert [len(group["params"]) for group in small] == [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    # ZeRO-3 leaves a part of a parameter; ds_numel is its whole size.
    groups[2]["params"][0].ds_numel = 1000
    zero = utils.split_params_into_different_moe_groups_for_optimizer(given, 3 * H * H)
    assert len(zero) == 5
    assert utils.configure_moe_param_groups(groups) is groups
    assert len(utils.configure_moe_param_groups(list(first.parameters()))) == 2
    torch.optim.SGD(groups, lr=0.1)
    for bad in ([{"params": []}], 3):
        with pytest.raises(ValueError, match="param_groups must"):
            utils.split_params_into_different_moe_groups_for_optimizer(bad)
    with pytest.raises(ValueError, match="model_parameters must be a list"):
        utils.configure_moe_param_groups([])
    with pytest.raises(TypeError, match="model_parameters must hold tensors or dicts"):
        utils.configure_moe_param_groups(["weight"])


@on_ranks(2)
def test_all_to_all_and_its_gradients_exchange_parts(rank):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3)
    mine = x[rank].clone().requires_grad_()
    out = sharded_moe._AllToAll.apply(dist.group.WORLD, mine)
    (grad,) = torch.autograd.grad(out.square().sum(), mine, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), mine)
    assert torch.equal(out, torch.cat([x[0].chunk(2)[rank], x[1].chunk(2)[rank]]))
    assert torch.equal(grad, 2 * x[rank])
    assert torch.equal(second, torch.full((4, 3), 2.0))
    with pytest.raises(RuntimeError, match=r"a multiple of the group's size 2, got \[3, 3\]$"):
        sharded_moe._AllToAll.apply(dist.group.WORLD, x[rank, :3])


def test_all_to_all_needs_torch_distributed():
    with pytest.raises(RuntimeError, match=r"_AllToAll: torch\.distributed is not initialised"):
        sharded_moe._AllToAll.apply(None, torch.randn(2, 4, 3))


@pytest.mark.parametrize("dim", [0, 1, -1])
@on_ranks(2)
def test_gather_tokens_is_the_inverse_of_drop_tokens(rank, dim):
    torch.manual_seed(0)
    x, group = torch.randn(4, 6, 2), dist.group.WORLD
    whole = x.clone().requires_grad_()
    part = drop_tokens(whole, dim, group)
    again = gather_tokens(part, dim, group)
    (grad,) = torch.autograd.grad((again * x).sum(), whole)
    assert torch.equal(part, x.chunk(2, dim)[rank])
    assert torch.equal(again, x)
    assert torch.equal(grad, x)


def test_without_a_group_every_token_is_kept():
    x = torch.randn(4, 6, 2)
    assert drop_tokens(x) is x
    assert gather_tokens(x) is x


@on_ranks(2)
def test_gates_of_a_group_share_capacity_and_bias(rank):
    torch.manual_seed(0)
    logits = torch.randn(2, 20, E)
    logits[1, :, 3] += 2
    gate = TopKGate(E, E, drop_tokens=False, router=nn.Identity(), expert_bias=True, use_rts=False)
    gate._set_ep_group(dist.group.WORLD)
    mine = logits[rank]
    _, combine_weights, *_ = gate(mine)
    _, C, *_ = sharded_moe.top2gating(mine, 1.0, 0, False, dist.group.WORLD, False, True)
    load = gate.route(mine).plan.load.long()
    before = load.clone()
    gate.update_bias(load, group=dist.group.WORLD)
    assert torch.equal(load, before)
    with pytest.raises(RuntimeError, match="ep_group has been set already"):
        gate._set_ep_group(None)
    loads = torch.stack([torch.bincount(x.argmax(-1), minlength=E) for x in logits])
    second = [torch.bincount(x.topk(2).indices.flatten(), minlength=E).max() for x in logits]
    bias = 1e-3 * torch.sign(loads.sum() / E - loads.sum(0))
    assert combine_weights.shape == (20, E, loads.max())
    assert max(second) == C
    assert relative_error(gate.expert_bias, bias) < 1e-6


def test_has_moe_layers_counts_the_experts_of_a_layer():
    assert utils.has_moe_layers(nn.Linear(3, 3)) == (False, 0)
    assert utils.has_moe_layers(nn.Sequential(MoE(H, nn.Linear(H, H), 3))) == (True, 3)
    assert issubclass(GroupedExperts, Experts)
