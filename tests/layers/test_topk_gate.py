"""TopKGate: destinations, weights and dropping."""

import math

import pytest
import torch
from cases import gate_for
from torch.nn import functional as F

from moe_ext import TopKGate
from moe_ext.routing.capacity import expert_capacity

pytestmark = pytest.mark.usefixtures("poisoned")

E, H = 6, 10


@pytest.mark.parametrize("k", [1, 2, 3])
def test_sparse_and_tutel_routes_say_the_same(k):
    gate = gate_for(k, capacity_factor=0.5)
    x = torch.randn(40, H, dtype=torch.float64)
    _, combine_weights, _, exp_counts = gate(x)
    for sevenfold in (gate(x, sparse_routes=True), gate(x, use_tutel=True)):
        _, C, num_experts, indices, locations, gates, counts = sevenfold
        assert num_experts == E
        assert int(C) == combine_weights.shape[2]
        assert torch.equal(counts, exp_counts)
        rebuilt = torch.zeros_like(combine_weights)
        for ids, places, weights in zip(indices, locations, gates, strict=True):
            for s in range(40):
                if ids[s] >= 0:
                    rebuilt[s, ids[s], places[s]] += weights[s]
                else:
                    assert weights[s] == places[s] == 0
        assert torch.equal(rebuilt, combine_weights)


def test_capacity_is_float32_arithmetic():
    assert expert_capacity(25, 2, 1.2, 0) == 16
    assert expert_capacity(20, 3, 1.05, 0) == 7
    factors = [0.1, 0.5, 0.7, 1.0, 1.05, 1.1, 1.2, 1.25, 1.3, 1.5, 2.0, 2.4, 3.3, 4.0, 1e-3]
    for T in [*range(1, 130), 1000, 4095, 4096, 4097, 65537, 999_999]:
        for num_experts in (1, 2, 3, 5, 7, 8, 12, 64, 100, 256):
            for factor in factors:
                tensor = torch.tensor(T / num_experts) * torch.tensor(factor)
                wanted = max(int(tensor.ceil()), 4)
                assert expert_capacity(T, num_experts, factor, 4) == wanted


def test_capacity_follows_the_mode():
    gate = TopKGate(H, E, k=2, capacity_factor=1.0, eval_capacity_factor=3.0, min_capacity=1)
    assert gate.capacity(60) == 20
    assert gate.eval().capacity(60) == 60
    assert TopKGate(H, E, drop_tokens=False).capacity(60) is None


def test_random_token_selection_replays_one_uniform_draw():
    gate = TopKGate(H, E, k=1, capacity_factor=0.5, min_capacity=0)
    x = torch.randn(60, H)
    torch.manual_seed(7)
    routing = gate.route(x)
    torch.manual_seed(7)
    uniform = torch.rand(60, E)
    C = gate.capacity(60)
    for e in range(E):
        asked = (routing.plan.expert_ids[:, 0] == e).nonzero().flatten()
        kept = (routing.plan.slots[asked, 0] >= 0).nonzero().flatten()
        best = uniform[asked, e].topk(min(C, len(asked))).indices
        assert set(asked[kept].tolist()) == set(asked[best].tolist())


def test_a_nan_token_keeps_its_first_choice_in_training():
    gate = TopKGate(H, E, k=2, drop_tokens=False)
    x = torch.randn(20, H)
    x[3] = math.nan
    drawn, plain = gate.route(x).plan.expert_ids, gate.eval().route(x).plan.expert_ids
    assert torch.equal(drawn[:, 0], plain[:, 0])
    assert drawn[3].tolist() == [0, 1]


def test_routes_kept_by_probability_queue_token_after_token():
    """A location is the number of earlier tokens that the expert keeps, as in DeepSpeed."""
    gate = TopKGate(H, E, k=3, capacity_factor=0.5, min_capacity=0)
    x = torch.randn(60, H)
    _, _, dispatch_mask, _ = gate(x)
    kept = dispatch_mask.any(dim=-1)
    locations = (kept.cumsum(0) - 1)[kept]
    assert torch.equal(dispatch_mask.nonzero()[:, 2], locations)


def test_the_least_probable_are_dropped():
    gate = TopKGate(H, E, k=3, capacity_factor=0.5, min_capacity=0)
    routing = gate.route(torch.randn(60, H))
    probs = routing.probs.gather(-1, routing.plan.expert_ids.long())
    for e in range(E):
        mine = routing.plan.expert_ids == e
        kept, dropped = (
            probs[mine & (routing.plan.slots >= 0)],
            probs[mine & (routing.plan.slots < 0)],
        )
        if len(dropped):
            assert kept.min() >= dropped.max()


def test_evaluation_is_deterministic():
    for options in (
        {},
        {"noisy_gate_policy": "RSample"},
        {"noisy_gate_policy": "Jitter"},
        {"k": 2},
    ):
        gate = TopKGate(H, E, **options).eval()
        x = torch.randn(50, H)
        first, second = gate(x), gate(x)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_noise_is_for_training():
    x = torch.randn(200, H)
    for options in ({"noisy_gate_policy": "RSample"}, {"noisy_gate_policy": "Jitter"}, {"k": 2}):
        gate = TopKGate(H, E, drop_tokens=False, **options)
        draws = [gate.route(x) for _ in range(2)]
        assert any(
            not torch.equal(a, b) for a, b in zip(draws[0].weights, draws[1].weights, strict=True)
        )
    # Only the second expert is drawn.
    gate = TopKGate(H, E, k=2, drop_tokens=False)
    drawn, plain = gate.route(x).plan.expert_ids, gate.eval().route(x).plan.expert_ids
    assert torch.equal(drawn[:, 0], plain[:, 0])
    assert not torch.equal(drawn[:, 1], plain[:, 1])


def test_jitter_is_one_percent():
    gate = TopKGate(H, E, noisy_gate_policy="Jitter", drop_tokens=False)
    with torch.no_grad():
        gate.wg.weight.copy_(torch.eye(E, H))
    x = torch.full((1000, H), 3.0)
    ratio = gate.route(x).probs.log().diff(dim=-1).abs() / 3
    assert 0.015 < ratio.max() <= 0.0201


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


def test_an_even_router_has_loss_one():
    for k in (1, 2, 3):
        gate = gate_for(k)
        x = torch.eye(E, H, dtype=torch.float64).repeat(10, 1)
        with torch.no_grad():
            weight = torch.eye(E, dtype=torch.float64)
            weight = weight + 0.5 * weight.roll(1, 0) + 0.25 * weight.roll(2, 0)
            gate.wg.weight.copy_(F.pad(weight, (0, H - E)))
        assert gate.route(x).l_aux.item() == pytest.approx(1.0)
