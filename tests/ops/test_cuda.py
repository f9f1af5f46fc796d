"""On a GPU alone: graphs, streams, no waiting, the same bits again and again."""

from collections.abc import Callable

import pytest
import torch
from cases import all_equal, assert_near, call_operator, random_experts, relative_error
from torch import Tensor

import moe_ext
from moe_ext import GroupedExperts, MOELayer, TopKGate
from moe_ext.ops import registry, samples, torch_grouped_mm
from moe_ext.routing.routers import is_wide_product

T, H, E, K = 512, 64, 16, 4


def layer_on(device: torch.device, k: int = K, dtype=torch.float32, **options) -> MOELayer:
    experts = GroupedExperts(E, H, 2 * H, activation="swiglu", bias=False)
    return MOELayer(TopKGate(H, E, k=k, **options), experts).to(device, dtype)


def waits(layer: MOELayer, hidden: Tensor) -> bool:
    """Whether torch's products read the experts' bounds back, which no capacity gives."""
    widths = tuple(layer.experts.gate_up_proj.shape[1:])
    path, _ = torch_grouped_mm.choose(hidden, widths, E, 1 if layer.gate.drop_tokens else None)
    return path in ("loop", "reference")


def step(layer: MOELayer, hidden: Tensor, used_token: Tensor | None = None) -> list[Tensor]:
    """Forward and backward: the output, the rest of the aux, and every gradient."""
    layer.zero_grad()
    hidden.grad = None
    out, aux = layer.forward_with_aux(hidden, used_token)
    (out.square().sum() + aux.l_aux).backward()
    return [out.detach(), *aux, hidden.grad, *(p.grad for p in layer.parameters())]


def warm_up(function: Callable, *args) -> None:
    """The first calls, on another stream: PyTorch asks for it before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*args)
    torch.cuda.current_stream().wait_stream(stream)


OPTIONS = [{"drop_policy": "probs"}, {"drop_policy": "position"}, {"drop_tokens": False}]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_graph_holds_forward_and_backward(cuda, dtype, options):
    layer, twin = (layer_on(cuda, dtype=dtype, **options) for _ in range(2))
    twin.load_state_dict(layer.state_dict())
    hidden = torch.randn(T, H, device=cuda, dtype=dtype, requires_grad=True)
    if waits(layer, hidden):
        pytest.skip("torch's products read bounds back here")
    warm_up(step, layer, hidden)
    layer.zero_grad(set_to_none=True)
    hidden.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer, hidden)
    for _ in range(3):
        with torch.no_grad():
            hidden.copy_(torch.randn(T, H, device=cuda, dtype=dtype))
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        fresh = hidden.detach().clone().requires_grad_()
        eager = step(twin, fresh)
        assert all_equal(replayed, eager)


@pytest.mark.parametrize(
    "options", [{"k": 1}, {"k": 2}, {"k": 1, "noisy_gate_policy": "RSample"}], ids=str
)
def test_a_graph_draws_anew_at_every_replay(cuda, options):
    """Random token selection, the sampled second choice and noise."""
    gate = TopKGate(H, E, capacity_factor=0.5, min_capacity=0, **options).to(cuda)
    hidden = torch.randn(T, H, device=cuda)
    warm_up(gate.route, hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = gate.route(hidden).plan
    drawn = []
    for _ in range(4):
        graph.replay()
        drawn.append(plan.slots.clone())
        assert torch.equal((plan.slots >= 0).sum(), plan.kept().sum())
        assert plan.load.sum() == T * gate.k
    assert not all(torch.equal(drawn[0], other) for other in drawn[1:])


def test_the_same_bits_in_ten_runs(cuda):
    layer = layer_on(cuda)
    hidden = torch.randn(T, H, device=cuda, requires_grad=True)
    first = [tensor.clone() for tensor in step(layer, hidden)]
    for _ in range(9):
        assert all_equal(first, step(layer, hidden))


@pytest.mark.parametrize("op", registry.NAMES)
def test_work_goes_to_the_current_stream_and_is_not_awaited(cuda, op):
    """Operands come late to a stream of its own: only what runs behind them there sees them."""
    if registry.backend(op, "cuda") != "compiled":
        pytest.skip("runs as torch's operators")
    args = samples.arguments(op, cuda, T=T, H=H, E=E, K=K)
    expected = call_operator(op, args)
    late = tuple(torch.zeros_like(arg) if isinstance(arg, Tensor) else arg for arg in args)
    stream, done = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call_operator(op, late)  # from now on there is memory for this stream
        stream.synchronize()
        torch.cuda._sleep(1_000_000_000)
        for to, operand in zip(samples.tensors(late), samples.tensors(args), strict=True):
            to.copy_(operand)
        out = call_operator(op, late)
        done.record()
    assert not done.query()
    stream.synchronize()
    assert all_equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [*OPTIONS, {"k": 1}, {"k": 2}, {"k": 1, "noisy_gate_policy": "Jitter"}], ids=str
)
def test_a_layer_waits_for_nothing(cuda, dtype, options):
    layer = layer_on(cuda, dtype=dtype, **options)
    hidden = torch.randn(T, H, device=cuda, dtype=dtype, requires_grad=True)
    if waits(layer, hidden):
        pytest.skip("torch's products read bounds back here")
    used_token = torch.ones(T, device=cuda)
    step(layer, hidden, used_token)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, hidden, used_token)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_are_not_at_a_multiple_of_16_bytes(cuda, dtype):
    plan = moe_ext.make_plan(random_experts(T, K, E, cuda), E)
    shifted = torch.randn(T * H + 1, device=cuda).to(dtype)[1:].view(T, H)
    assert shifted.data_ptr() % 16 > 0
    aligned = shifted.clone()
    rows = moe_ext.dispatch(aligned, plan)
    assert torch.equal(moe_ext.dispatch(shifted, plan), rows)
    dots = [moe_ext.route_dot(tokens, rows, plan) for tokens in (shifted, aligned)]
    assert torch.allclose(*dots, rtol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_another_device_than_the_current_one(cuda):
    second = torch.device("cuda", 1)
    experts = random_experts(T, K, E)
    plan = moe_ext.make_plan(experts.to(second), E)
    assert plan.slots.device == second
    assert torch.cuda.current_device() == 0
    assert torch.equal(plan.slots.cpu(), moe_ext.make_plan(experts, E).slots)


def test_large_rows_beyond_two_to_the_31_elements(cuda):
    """Two matrices of 4 GiB each."""
    if torch.cuda.get_device_properties(cuda).total_memory < 14 << 30:
        pytest.skip("needs 14 GiB of device memory")
    tokens, hidden = 2**18 + 1, 2**13
    plan = moe_ext.make_plan(torch.zeros(tokens, 1, dtype=torch.int32, device=cuda), 1)
    x = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=cuda)
    x[:] = torch.arange(tokens, device=cuda).remainder(251)[:, None].to(x.dtype)
    rows = moe_ext.dispatch(x, plan)
    assert torch.equal(rows, x)
    del x
    assert torch.equal(moe_ext.combine(rows, plan), rows)


def test_a_router_of_16_bit_is_one_product_on_cuda(cuda):
    """The logits are those of float32 copies to float32's rounding, and so are the gradients."""
    gate = TopKGate(H, E, k=K).to(cuda, torch.bfloat16)
    hidden = torch.randn(T, H, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    assert is_wide_product(gate.wg, hidden)
    logits = gate.route(hidden).logits
    exact = hidden.double() @ gate.wg.weight.double().t()
    assert logits.dtype == torch.float32
    assert relative_error(logits, exact) < 1e-6
    inputs = [hidden, gate.wg.weight]
    grads = torch.autograd.grad(logits.square().sum(), inputs)
    rights = torch.autograd.grad(exact.square().sum(), inputs)
    assert_near(grads, rights, 2 * torch.finfo(torch.bfloat16).eps)
