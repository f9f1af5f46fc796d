"""mask_weights and its gradient."""

import pytest
import torch
from cases import SIZES, assert_within, plans, random_experts
from torch.autograd import gradcheck, gradgradcheck

import moe_ext
from moe_ext.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.float64]
EPS = 0.3  # of weights in 0..1 some sums are below it, most above


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "K", "E", "H"), SIZES)
@pytest.mark.parametrize("normalize", [False, True])
def test_matches_reference(device, T, K, E, H, dtype, normalize):
    rule = normalize, EPS, 2.5
    for plan in plans(T, K, E, device):
        weights = torch.rand(T, K, device=device, dtype=dtype)
        grad = torch.randn(T, K, device=device, dtype=dtype)
        kept = moe_ext.mask_weights(weights, plan, normalize=normalize, eps=EPS, scale=2.5)
        assert kept.dtype == dtype
        exact = reference.mask_weights(weights.double(), plan.slots, *rule)
        assert_within(kept, exact, exact.abs(), K + 3)

        got = torch.ops.moe_ext.mask_weights_backward(grad, weights, plan.slots, *rule)
        exact = reference.mask_weights_backward(grad.double(), weights.double(), plan.slots, *rule)
        # The gradient is a difference of two numbers that are no larger than this.
        terms = grad.double().abs().sum(dim=-1, keepdim=True) * 2.5 / EPS
        assert_within(got, exact, terms.expand(T, K), K + 5)
        assert (got[plan.slots < 0] == 0).all()


def test_a_nan_is_its_tokens_alone(device):
    experts = torch.tensor([[0, 1], [1, 0], [0, 1]], dtype=torch.int32, device=device)
    plan = moe_ext.make_plan(experts, 2, 2, order="token")
    assert (plan.slots < 0).tolist() == [[False, False], [False, False], [True, True]]
    weights = torch.tensor([[0.4, 0.2], [0.3, torch.nan], [0.5, torch.nan]], device=device)
    kept = moe_ext.mask_weights(weights, plan, normalize=True)
    assert kept.isnan().tolist() == [[False, False], [True, True], [False, False]]
    assert kept[2].tolist() == [0, 0]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_stands_beside_a_dropped_route_does_not_matter(device, value):
    plan = moe_ext.make_plan(torch.zeros(4, 1, dtype=torch.int32, device=device), 1, 2)
    weights = torch.full((4, 1), 0.5, device=device).masked_fill(plan.slots < 0, value)
    weights.requires_grad_()
    kept = moe_ext.mask_weights(weights, plan, normalize=True)
    assert kept.flatten().tolist() == [1, 1, 0, 0]
    (grad,) = torch.autograd.grad((kept * kept).sum(), weights)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("T", "K", "E"), [(5, 2, 3), (1, 1, 1), (0, 2, 4), (4, 4, 4)])
def test_gradients(device, T, K, E, normalize):
    for plan in plans(T, K, E, device):
        weights = torch.rand(T, K, device=device, dtype=torch.float64)
        # Half of the tokens are well below the eps, none is near it.
        weights[::2] *= 0.1 / max(K, 1)
        weights[1::2] += EPS + 0.1
        weights.requires_grad_()

        def function(weights, plan=plan):
            return moe_ext.mask_weights(weights, plan, normalize=normalize, eps=EPS, scale=1.7)

        assert gradcheck(function, (weights,), check_batched_grad=T > 0)
        assert gradgradcheck(function, (weights,))


@pytest.mark.parametrize(("T", "K"), [(1, 1), (256, 2), (1000, 8)])
def test_one_launch_each_way(launches_of, T, K):
    """A weight is read twice, as a first sum needs all of them."""
    plan = moe_ext.make_plan(random_experts(T, K, 8), 8, T)
    weights = torch.rand(T, K, requires_grad=True)
    (launch,) = launches_of(moe_ext.mask_weights, weights, plan, normalize=True)
    assert launch["kernel"] == "mask_weights"
    assert launch["loads"] == {4: 4 * T * K}
    assert launch["stores"] == {4: T * K}
    loss = moe_ext.mask_weights(weights, plan, normalize=True).square().sum()
    (launch,) = launches_of(loss.backward)
    assert launch["kernel"] == "mask_weights_backward"
