"""Routers: modules that compute logits."""

import itertools
import math

import pytest
import torch
from cases import relative_error
from rules import E, H, T, gate_for, tokens
from torch import nn

from moe_ext import CosineRouter, GroupedExperts, MOELayer, TopKGate
from moe_ext.routing import routers

pytestmark = pytest.mark.usefixtures("poisoned")


def test_cosine_router_is_its_formula():
    router = CosineRouter(H, E, proj_dim=7, dtype=torch.float64)
    gate = gate_for(2, router=router)
    x = tokens()
    logits = gate.route(x).logits
    by_hand = torch.empty(T, E, dtype=torch.float64)
    for t, e in itertools.product(range(T), range(E)):
        token = router.proj.weight @ x[t]
        cosine = token @ router.directions[e] / token.norm() / router.directions[e].norm()
        by_hand[t, e] = cosine / 0.5
    assert relative_error(logits, by_hand) < 1e-12
    assert relative_error(gate.route(3 * x).logits, logits) < 1e-12
    routing = gate.route(x)
    (routing.weights.square().sum() + routing.l_aux).backward()
    assert all(p.grad.abs().sum() > 0 for p in gate.parameters())
    assert set(gate.state_dict()) == {"wg.proj.weight", "wg.directions", "wg.log_scale"}
    nn.init.constant_(router.log_scale, math.log(1e6))
    assert gate.route(x).logits.abs().max() <= 100
    nn.init.constant_(router.log_scale, math.log(0.1))
    assert relative_error(gate.route(x).logits, by_hand * 0.05) < 1e-12
    gate.bfloat16()
    assert gate.route(x.float()).probs.dtype == torch.float32


def test_any_module_is_a_router():
    router = nn.Sequential(nn.Linear(H, 5), nn.Tanh(), nn.Linear(5, E))
    gate = TopKGate(H, E, 2, router=router)
    x = torch.randn(T, H)
    assert torch.equal(gate.route(x).logits, router(x))
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert torch.equal(gate.route(x).logits, router(x).float()) is False
        assert gate.route(x).logits.dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [{}, {"noisy_gate_policy": "RSample"}, {"expert_bias": True}, {"balancing": "sinkhorn"}],
)
def test_routers_of_other_dtypes_compute_in_float32(options):
    x = torch.randn(T, H)
    reopens = nn.Linear(H, E)
    reopens.forward = torch.autocast(x.device.type, dtype=torch.bfloat16)(reopens.forward)
    routing = TopKGate(H, E, 2, router=reopens, **options).route(x)
    assert torch.equal(routing.logits, reopens(x).float())
    linear = nn.Linear(H, E)
    gate = TopKGate(H, E, 2, router=linear, **options).bfloat16()
    gate.route(x.bfloat16()).l_aux.backward()
    assert linear.weight.grad.dtype == linear.weight.dtype == torch.bfloat16
    assert linear.weight.grad.abs().sum() > 0
    logits = gate.route(x.bfloat16()).logits
    exact = x.bfloat16().float() @ linear.weight.float().T + linear.bias.float()
    assert relative_error(logits, exact) < 1e-6


@pytest.mark.parametrize("router", [None, CosineRouter(H, E)])
def test_weights_may_be_plain_attributes(router):
    """As FSDP1 has them in a forward."""
    gate = TopKGate(H, E, 2, router=router).bfloat16()
    x = torch.randn(T, H).bfloat16()
    expected = gate.route(x).logits
    for module in gate.wg.modules():
        for name, weight in [*module._parameters.items()]:
            del module._parameters[name]
            setattr(module, name, None if weight is None else weight.detach().requires_grad_())
    assert torch.equal(gate.route(x).logits, expected)


def test_other_attributes_of_a_router_are_no_weights():
    router = nn.Linear(H, E)
    router.constant = torch.ones((), dtype=torch.float64)
    assert TopKGate(H, E, 2, router=router).route(torch.randn(T, H)).logits.dtype == torch.float32


def test_a_router_may_be_scripted():
    linear, x = nn.Linear(H, E), torch.randn(T, H)
    gate = TopKGate(H, E, 2, router=torch.jit.trace(linear, x))
    torch.testing.assert_close(gate.route(x).logits, linear(x))


def test_a_bias_may_be_given_to_the_router_of_a_gate():
    gate, x = TopKGate(H, E, 2).bfloat16(), torch.randn(T, H).bfloat16()
    before = gate.route(x).logits
    gate.wg.bias = nn.Parameter(torch.randn(E).bfloat16())
    torch.testing.assert_close(gate.route(x).logits, before + gate.wg.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_router_of_16_bit_is_one_product(monkeypatch, dtype):
    """As on CUDA, where torch.mm takes the dtype of the result."""
    products, mm = [], torch.mm

    def wide_mm(left, right, out_dtype=None):
        products.append((left.dtype, out_dtype))
        wide = (left, right) if out_dtype is None else (left.to(out_dtype), right.to(out_dtype))
        return mm(*wide)

    gate = TopKGate(H, E, 2, router=nn.Linear(H, E, bias=False)).to(dtype)
    x = torch.randn(T, H, dtype=dtype, requires_grad=True)
    results = []
    for is_wide in (False, True):
        if is_wide:
            monkeypatch.setattr("moe_ext.routing.gate.is_wide_product", lambda *args: True)
            monkeypatch.setattr("torch.mm", wide_mm)
        logits = gate.route(x).logits
        grads = torch.autograd.grad(logits.square().sum(), [x, gate.wg.weight], create_graph=True)
        (second,) = torch.autograd.grad(sum(g.float().sum() for g in grads), [x])
        results.append((logits, *grads, second))
    assert products[0] == (dtype, torch.float32)
    for wide, right in zip(*reversed(results), strict=True):
        assert wide.dtype == right.dtype
        assert relative_error(wide, right) < 2 * torch.finfo(right.dtype).eps


def test_what_is_not_one_wide_product(monkeypatch):
    """A hook, a bias, another dtype, a class of its own or another device runs as a module."""
    capability = [8]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (*capability, 0))

    class Tokens(torch.Tensor):
        is_cuda = True

    class Own(nn.Linear):
        pass

    tokens = torch.randn(3, H).bfloat16().as_subclass(Tokens)
    plain = nn.Linear(H, E, bias=False).bfloat16()
    assert routers.is_wide_product(plain, tokens)
    for name in ("forward_pre", "forward", "full_backward_pre", "full_backward"):
        hook = getattr(plain, f"register_{name}_hook")(lambda *args: None)
        assert not routers.is_wide_product(plain, tokens)
        hook.remove()
    hook = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert not routers.is_wide_product(plain, tokens)
    hook.remove()
    replaced, away = (nn.Linear(H, E, bias=False).bfloat16() for _ in range(2))
    replaced.forward = lambda tokens: tokens
    away.to("meta")
    biased, own, wide = nn.Linear(H, E), Own(H, E, bias=False), nn.Linear(H, E, bias=False)
    others = biased.bfloat16(), own.bfloat16(), wide, CosineRouter(H, E).bfloat16()
    for router in (replaced, away, *others):
        assert not routers.is_wide_product(router, tokens)
    assert not routers.is_wide_product(plain, tokens.as_subclass(torch.Tensor))
    assert routers.is_wide_product(plain, tokens)
    capability[0] = 7
    assert not routers.is_wide_product(plain, tokens)


@pytest.mark.parametrize(
    ("make_router", "got"),
    [
        (lambda: nn.Linear(H, E + 1), r"\[60, 13\]"),
        (lambda: nn.LSTM(H, E), "tuple"),
        (lambda: nn.Flatten(0), r"\[600\]"),
    ],
)
def test_a_router_that_returns_another_shape_is_an_error(make_router, got):
    gate = TopKGate(H, E, router=make_router())
    with pytest.raises(RuntimeError, match=rf"router must return \[T, E\] = \[60, 12\], got {got}"):
        gate.route(torch.randn(T, H))


def test_a_zero_token_has_no_large_gradient():
    gate = TopKGate(H, E, 2, router=CosineRouter(H, E), drop_tokens=False)
    layer = MOELayer(gate, GroupedExperts(E, H, 7))
    x = torch.randn(T, H)
    x[5] = 0
    x.requires_grad_()
    (layer(x).sum() + layer.l_aux).backward()
    assert x.grad[5].norm() < 1e3
    assert x.grad[4].norm() > 0


def test_buffers_of_a_router_in_16_bit_change():
    """A BatchNorm updates its buffers, which are computed in float32."""
    norm = nn.BatchNorm1d(H)
    gate = TopKGate(H, E, 2, router=nn.Sequential(norm, nn.Linear(H, E))).bfloat16()
    x = 3 + torch.randn(T, H).bfloat16()
    gate.route(x)
    expected = 0.1 * x.float().mean(0)
    assert norm.running_mean.dtype == torch.bfloat16
    assert relative_error(norm.running_mean, expected) < 0.01
    before = norm.running_mean.clone()
    gate.eval().route(x)
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_is_float32_under_autocast_and_for_16_bit(dtype):
    gate = gate_for(2, dtype=torch.float32)
    x = torch.randn(30, H).to(dtype)
    expected = gate.route(x.float())
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        under = gate.route(x)
    for routing in (under, gate.route(x)):
        assert routing.weights.dtype == torch.float32
        assert torch.equal(routing.weights, expected.weights)
        assert torch.equal(routing.l_aux, expected.l_aux)
    gate.to(dtype)
    assert gate.route(x).probs.dtype == torch.float32
    assert gate.wg.weight.dtype == dtype


def test_gate_is_float64_where_its_weight_is():
    gate = gate_for(2)
    routing = gate.route(torch.randn(30, H))
    assert routing.probs.dtype == torch.float64
    assert routing.weights.dtype == torch.float32


def test_a_parameter_of_two_names_is_cast_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Parameter(torch.randn(E, H).bfloat16())

        def forward(self, tokens):
            return tokens @ (self.a + self.b).T

    router, tokens = Tied(), torch.randn(5, H)
    gate = TopKGate(H, E, 2, router=router)
    expected = tokens @ (2 * router.a.float()).T
    torch.testing.assert_close(gate.route(tokens).logits, expected)
