"""What only a GPU can show: graphs, streams, no waiting, the same bits again and again."""

import pytest
import torch
from cases import masked_experts, random_experts
from torch import Tensor, nn

import moe_ext
from moe_ext import Experts, MOELayer, Plan, TopKGate

T, H, E, K = 512, 64, 16, 4


class BatchedExperts(Experts):
    """One linear map for each expert, over the [E, C, H] view of the rows."""

    def __init__(self) -> None:
        super().__init__(E)
        self.weight = nn.Parameter(torch.randn(E, H, H) / H**0.5)

    def forward(self, rows: Tensor, plan: Plan) -> Tensor:
        return torch.bmm(rows.view(E, -1, H), self.weight).view(rows.shape)


def layer_on(device: torch.device, drop_policy: str = "probs") -> MOELayer:
    gate = TopKGate(
        H, E, k=K, capacity_factor=1.0, drop_policy=drop_policy, top2_2nd_expert_sampling=False
    )
    return MOELayer(gate, BatchedExperts()).to(device)


def step(layer: MOELayer, hidden: Tensor) -> list[Tensor]:
    """Forward and backward; the output, what the layer says, and every gradient."""
    layer.zero_grad()
    hidden.grad = None
    out, aux = layer.forward_with_aux(hidden)
    (out.square().sum() + aux.l_aux).backward()
    return [out.detach(), *aux, hidden.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("drop_policy", ["probs", "position"])
def test_a_graph_holds_forward_and_backward(cuda, drop_policy):
    layer = layer_on(cuda, drop_policy)
    hidden = torch.randn(T, H, device=cuda, requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(layer, hidden)
    torch.cuda.current_stream().wait_stream(stream)

    layer.zero_grad(set_to_none=True)
    hidden.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, aux = layer.forward_with_aux(hidden)
        (out.square().sum() + aux.l_aux).backward()
    for _ in range(3):
        with torch.no_grad():
            hidden.copy_(torch.randn(T, H, device=cuda))
        graph.replay()
        replayed = [out.detach(), *aux, hidden.grad, *(p.grad for p in layer.parameters())]
        replayed = [tensor.clone() for tensor in replayed]
        fresh = hidden.detach().clone().requires_grad_()
        eager = step(copy_of(layer, cuda, drop_policy), fresh)
        assert all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))


def copy_of(layer: MOELayer, device: torch.device, drop_policy: str) -> MOELayer:
    copy = layer_on(device, drop_policy)
    copy.load_state_dict(layer.state_dict())
    return copy


def test_the_same_bits_in_ten_runs(cuda):
    layer = layer_on(cuda)
    hidden = torch.randn(T, H, device=cuda, requires_grad=True)
    first = [tensor.clone() for tensor in step(layer, hidden)]
    for _ in range(9):
        again = step(layer, hidden)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("tokens", [1, 100, 20000])
@pytest.mark.parametrize("routing", [random_experts, masked_experts])
def test_cpu_and_cuda_give_the_same_integers(cuda, tokens, routing):
    """Choices and places do not depend on the machine: only sums of reals do."""
    logits = torch.randn(tokens, E)
    assert torch.equal(moe_ext.gate(logits.to(cuda), K).experts.cpu(), moe_ext.gate(logits, K)[1])
    experts, priority = routing(tokens, K, E), torch.rand(tokens, K).round(decimals=2)
    for options in (
        {},
        {"align": 128},
        {"order": "token"},
        {"capacity": tokens // 4},
        {"capacity": tokens // 4, "priority": priority},
    ):
        here = moe_ext.make_plan(experts, E, **options)
        moved = {k: v.to(cuda) if isinstance(v, Tensor) else v for k, v in options.items()}
        there = moe_ext.make_plan(experts.to(cuda), E, **moved)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here[:4], there[:4], strict=True))


def test_work_goes_to_the_current_stream(cuda):
    """Behind a long wait on a stream of its own, nothing has run when the call returns."""
    plan = moe_ext.make_plan(random_experts(T, K, E, cuda), E)
    tokens = torch.randn(T, H, device=cuda)
    expected = moe_ext.dispatch(tokens, plan)
    torch.cuda.synchronize()
    stream, done = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        rows = moe_ext.dispatch(tokens, plan)
        done.record()
    assert not done.query()
    stream.synchronize()
    assert torch.equal(rows, expected)


def test_nothing_waits_for_the_device(cuda):
    layer = layer_on(cuda)
    hidden = torch.randn(T, H, device=cuda, requires_grad=True)
    step(layer, hidden)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, hidden)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_another_device_than_the_current_one(cuda):
    second = torch.device("cuda", 1)
    experts = random_experts(T, K, E)
    plan = moe_ext.make_plan(experts.to(second), E)
    assert plan.slots.device == second
    assert torch.cuda.current_device() == 0
    assert torch.equal(plan.slots.cpu(), moe_ext.make_plan(experts, E).slots)


def test_large_rows_beyond_two_to_the_31_elements(cuda):
    """Of 4 GiB each."""
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
