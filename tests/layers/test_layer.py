"""TopKGate and MOELayer against plain loops."""

import pytest
import torch
from cases import assert_near, relative_error, weighted_sum
from rules import FFN, Apply, E, H, expert_by_hand, gate_for, gradients_of, layer_for
from torch import nn
from torch.autograd import gradgradcheck
from torch.nn import functional as F

from moe_ext import CosineRouter, Experts, GroupedExperts, ModuleExperts, MoE, MOELayer, TopKGate

pytestmark = pytest.mark.usefixtures("poisoned")


def layer_by_hand(layer: MOELayer, x: torch.Tensor, capacity: int | None):
    """Run every expert on every token, then a loop that drops the last to queue."""
    k = layer.gate.k
    probs = (x @ layer.gate.wg.weight.T).softmax(-1)
    ids = probs.topk(k, dim=-1).indices
    kept = torch.zeros(len(x), k, dtype=torch.bool)
    load = [0] * E
    for choice in range(k):
        for t in range(len(x)):
            e = int(ids[t, choice])
            kept[t, choice] = capacity is None or load[e] < capacity
            load[e] += 1
    weights = probs.gather(-1, ids) * kept
    if k > 1:
        eps = torch.finfo(weights.dtype).eps
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=eps)
    out = weighted_sum([expert_by_hand(layer.experts, e, x) for e in range(E)], ids, weights)
    counted = ids[:, :1] if k <= 2 else ids
    share = F.one_hot(counted, E).double().sum((0, 1)) / len(x)
    l_aux = E / counted.shape[1] * (probs.mean(0) * share).sum()
    return out, l_aux, torch.tensor(load)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("options", "drops"),
    [
        ({"drop_tokens": False}, False),
        ({"capacity_factor": 2.0 * E}, False),  # more than there are tokens
        ({"capacity_factor": 0.6}, True),
    ],
)
def test_a_layer_equals_the_plain_loop(k, options, drops):
    T = 50
    layer = layer_for(k, **options)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    C = layer.gate.capacity(T)
    expected, l_aux, load = layer_by_hand(layer, x, C)
    if C is not None:
        assert (C <= T) == (load.max() > C) == drops
    out = layer(x)
    assert_near((out, layer.l_aux), (expected, l_aux), 1e-12)
    assert layer.exp_counts.dtype == torch.int64
    assert torch.equal(layer.exp_counts, load)
    grads = gradients_of(layer, x, out, layer.l_aux)
    assert_near(grads, gradients_of(layer, x, expected, l_aux), 1e-12)


@pytest.mark.parametrize("options", [{}, {"capacity_factor": 0.5}, {"drop_tokens": False}])
def test_modules_given_one_by_one_are_the_experts(options):
    given = nn.ModuleList(nn.Sequential(nn.Linear(H, 2 + e), nn.Linear(2 + e, H)) for e in range(E))
    experts = ModuleExperts(given.double())
    assert experts.num_experts == ModuleExperts(given, E).num_experts == E
    assert all(mine is its for mine, its in zip(experts.experts, given, strict=True))
    assert set(experts.state_dict()) == {f"experts.{name}" for name in given.state_dict()}
    layer, x = MOELayer(gate_for(2, **options), experts), torch.randn(9, H).double()
    routing = layer.gate.route(x)
    outputs = [expert(x) for expert in given]
    expected = weighted_sum(outputs, routing.plan.expert_ids, routing.weights)
    assert relative_error(layer(x.view(3, 3, H)).view(9, H), expected) < 1e-12
    # Experts without a token have a gradient, which is zero.
    layer(x[:1]).sum().backward()
    assert all(parameter.grad is not None for parameter in experts.parameters())


@pytest.mark.parametrize("router", [nn.Linear(H, E), CosineRouter(H, E), nn.Sequential()])
def test_a_router_in_the_place_of_a_gate_is_refused(router):
    experts = GroupedExperts(E, H, FFN)
    with pytest.raises(ValueError, match=rf"got {type(router).__name__}; .*router=gate"):
        MOELayer(router, experts)
    MOELayer(TopKGate(H, E, router=router), experts)


def test_module_experts_take_the_first_of_a_tuple():
    pair = Apply(lambda rows: (rows + 1, "more"))
    layer = MOELayer(gate_for(2, drop_tokens=False), ModuleExperts(pair, E))
    x = torch.randn(9, H, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x + 1)


def test_shape_dtype_and_device_are_kept():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        layer = layer_for(2, dtype=dtype)
        out = layer(torch.randn(2, 3, 5, H, dtype=dtype))
        assert out.shape == (2, 3, 5, H)
        assert out.dtype == dtype


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"drop_tokens": False}, {"min_capacity": 4}])
def test_zero_tokens(k, options):
    layer = layer_for(k, **options)
    x = torch.empty(0, H, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    assert out.shape == (0, H)
    assert layer.l_aux == 0
    assert torch.equal(layer.exp_counts, torch.zeros(E, dtype=torch.int64))
    (out.sum() + layer.l_aux).backward()
    assert all((p.grad == 0).all() for p in layer.parameters())


def test_zero_width():
    layer = MOELayer(TopKGate(0, E, 2), GroupedExperts(E, 0, FFN))
    assert layer(torch.ones(2, 3, 0)).shape == (2, 3, 0)
    assert layer.exp_counts.sum() == 12


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_unused_tokens_give_zero_and_take_no_room(k, dtype):
    layer = layer_for(k, capacity_factor=0.7)
    x = torch.randn(3, 20, H, dtype=torch.float64)
    used = torch.rand(3, 20) < 0.6
    out = layer(x, used.to(dtype))
    assert (out[~used] == 0).all()
    assert layer.exp_counts.sum() == k * used.sum()
    C = layer.gate.capacity(60)
    layer.gate.capacity = lambda num_tokens: C
    assert relative_error(out[used], layer(x[used])) < 1e-12


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"drop_tokens": False}, {"capacity_factor": 0.5}])
def test_dense_masks_describe_the_layers_output(k, options):
    layer = layer_for(k, **options)
    x = torch.randn(40, H, dtype=torch.float64)
    l_aux, combine_weights, dispatch_mask, exp_counts = layer.gate(x)
    S, C = 40, combine_weights.shape[2]
    assert combine_weights.shape == dispatch_mask.shape == (S, E, C)
    assert dispatch_mask.dtype == torch.bool
    assert exp_counts.dtype == torch.int64
    rows = torch.einsum("sec,sm->ecm", dispatch_mask.double(), x)
    outputs = torch.stack([expert_by_hand(layer.experts, e, rows[e]) for e in range(E)])
    assert relative_error(layer(x), torch.einsum("sec,ecm->sm", combine_weights, outputs)) < 1e-12
    assert torch.equal(layer.exp_counts, exp_counts)
    assert torch.equal(layer.l_aux, l_aux)
    grads, expected = (
        torch.autograd.grad(weights.square().sum(), layer.gate.wg.weight)
        for weights in (combine_weights, layer.gate.route(x).weights)
    )
    assert_near(grads, expected, 1e-12)


def test_layer_under_autocast():
    layer = layer_for(2, dtype=torch.float32)
    x = torch.randn(30, H, requires_grad=True)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.float32
    assert 0 < relative_error(out, layer(x)) < 0.02
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize(("dtype", "advice"), [(torch.float64, True), (torch.int64, False)])
def test_autocast_is_advised_to_floating_tokens_alone(dtype, advice):
    layer = MOELayer(TopKGate(H, E), GroupedExperts(E, H, FFN))
    message = rf"tokens are {dtype}, the weights torch\.float32; convert one of the two with \.to\("
    with pytest.raises(RuntimeError, match=message) as error:
        layer(torch.ones(3, H, dtype=dtype))
    assert ("torch.autocast" in str(error.value)) == advice


def test_gradient_of_a_gradient():
    layer = layer_for(2, capacity_factor=0.7)
    x = torch.randn(10, H, dtype=torch.float64, requires_grad=True)
    assert (layer.gate.route(x).plan.slots < 0).any()

    def out_and_loss(x):
        out, aux = layer.forward_with_aux(x)
        return out, aux.l_aux

    assert gradgradcheck(out_and_loss, x, fast_mode=True)


def test_experts_without_a_forward_are_an_error():
    with pytest.raises(NotImplementedError, match="Experts must define forward"):
        MOELayer(TopKGate(H, E), Experts(E))(torch.randn(30, H))


def test_the_layer_builds_no_mask():
    """Memory grows linearly with tokens: the largest tensor is a row buffer."""
    layer = layer_for(2, dtype=torch.float32)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    T = 3000
    with Largest():
        out, aux = layer.forward_with_aux(torch.randn(T, H))
        (out.sum() + aux.l_aux).backward()
    assert largest <= (2 * T + E) * 2 * FFN


def test_residual_under_autocast():
    moe = MoE(8, nn.Linear(8, 8), 4, use_residual=True)
    hidden = torch.randn(6, 8).bfloat16()
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        assert moe(hidden)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(5, 16), (5, 1, 16)])
def test_experts_that_change_the_width_are_an_error(shape):
    narrow = Experts(4)
    narrow.routed = lambda tokens, plan, weights: tokens[:, :7]
    layer = MOELayer(TopKGate(16, 4, 2), narrow)
    with pytest.raises(RuntimeError, match="shape"):
        layer(torch.randn(shape))
