import math

import pytest
import torch
from cases import DTYPES, assert_within, relative_error
from torch.autograd import gradcheck, gradgradcheck

import moe_ext
from moe_ext.ops import checks, reference

# T, E, K: T across the block of 128 tokens, K across the 32 up to which the choice is by insertion;
# on CUDA every layout of a row.
SHAPES = [
    *((0, 4, 2), (1, 1, 1), (33, 8, 2), (127, 8, 8), (128, 3, 1), (300, 64, 6), (40, 100, 33)),
    *((50, 256, 8), (20, 500, 4), (9, 1024, 40)),
]

pytestmark = pytest.mark.usefixtures("poisoned")


def stable_choice(scores: torch.Tensor, k: int) -> torch.Tensor:
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k].to(torch.int32)


@pytest.mark.parametrize(("T", "E", "K"), [*SHAPES, (20_000, 16, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_choice_is_a_stable_sort(device, T, E, K, dtype):
    logits = torch.randn(T, E, device=device).to(dtype)
    choice = moe_ext.gate(logits, K)
    assert choice.expert_ids.dtype == torch.int32
    assert torch.equal(choice.expert_ids, stable_choice(logits, K))


@pytest.mark.parametrize("K", [1, 3, 40])
def test_ids_are_distinct_and_in_range_whatever_comes(device, K):
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, 3e38], device=device)
    logits = special[torch.randint(len(special), (500, 40), device=device)]
    logits[0], logits[1], logits[2] = math.nan, -math.inf, math.inf
    assert torch.equal(moe_ext.gate(logits, K).expert_ids, stable_choice(logits, K))


@pytest.mark.parametrize("scoring", checks.SCORINGS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "E", "K"), SHAPES)
def test_matches_reference(device, T, E, K, dtype, scoring, normalize):
    logits = (3 * torch.randn(T, E, device=device)).to(dtype)
    scores = logits + torch.randn(T, E, device=device).to(dtype)
    rule = {"scoring": scoring, "normalize": normalize, "scale": 2.5}
    actual = moe_ext.gate(logits, K, choice_scores=scores, **rule)
    expected = reference.gate(logits.double(), scores.double(), K, scoring, normalize, 2.5)
    weights, experts, probs, importance = expected
    assert torch.equal(actual.expert_ids, experts)
    accumulate = checks.accumulate_dtype(dtype)
    assert {actual.weights.dtype, actual.probs.dtype, actual.importance.dtype} == {accumulate}
    # exp and log1p of float32 are good to some units in the last place, times the exponent.
    assert_within(actual.probs, probs, probs, additions=32 + E)
    assert_within(actual.weights, weights, weights, additions=64 + E)
    assert_within(actual.importance, importance, importance, additions=160 + E)


@pytest.mark.parametrize("scoring", checks.SCORINGS)
def test_nan_stays_in_its_token(device, scoring):
    logits = torch.randn(300, 8, device=device)
    clean = moe_ext.gate(logits, 3, scoring=scoring, normalize=True)
    logits[7, 3] = math.nan
    dirty = moe_ext.gate(logits, 3, scoring=scoring, normalize=True)
    assert dirty.weights[7].isnan().all()
    spoilt = torch.arange(8, device=device) == 3
    assert (dirty.probs[7].isnan() == (spoilt | (scoring == "softmax"))).all()
    assert torch.equal(dirty.importance.isnan(), dirty.probs[7].isnan())
    others = torch.arange(300, device=device) != 7
    for before, after in zip(clean[:3], dirty[:3], strict=True):
        assert torch.equal(before[others], after[others])


def test_a_sum_of_zero_gives_zero_weights(device):
    logits = torch.full((3, 4), -math.inf, device=device)
    choice = moe_ext.gate(logits, 2, scoring="sigmoid", normalize=True)
    assert torch.equal(choice.weights, torch.zeros(3, 2, device=device))


@pytest.mark.parametrize("scoring", checks.SCORINGS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("T", "E", "K"), [(4, 5, 2), (3, 4, 4), (2, 1, 1), (0, 3, 2)])
def test_gradients(device, T, E, K, scoring, normalize):
    # Apart enough for a finite difference not to change the choice.
    logits = torch.rand(T, E, device=device, dtype=torch.float64).argsort(-1).double() - E / 2
    logits.requires_grad_()

    def function(logits):
        choice = moe_ext.gate(logits, K, scoring=scoring, normalize=normalize, scale=1.7)
        return choice.weights, choice.probs, choice.importance

    assert gradcheck(function, (logits,), check_batched_grad=T > 0)
    assert gradgradcheck(function, (logits,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_has_the_dtype_of_the_logits(device, dtype):
    logits = torch.randn(130, 9, device=device).to(dtype).requires_grad_()
    choice = moe_ext.gate(logits, 3, normalize=True)
    upstream = torch.randn_like(choice.weights)
    (choice.weights * upstream).sum().backward()
    exact = logits.detach().double().requires_grad_()
    chosen = exact.softmax(-1).gather(-1, choice.expert_ids.long())
    ((chosen / chosen.sum(-1, keepdim=True)) * upstream.double()).sum().backward()
    assert logits.grad.dtype == dtype
    assert relative_error(logits.grad, exact.grad) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("scoring", checks.SCORINGS)
@pytest.mark.parametrize("normalize", [False, True])
def test_backward_kernel_matches_reference(device, scoring, normalize):
    T, E, K = 301, 12, 5
    choice = moe_ext.gate(torch.randn(T, E, device=device), K, scoring=scoring)
    grads = [torch.randn_like(t) for t in (choice.weights, choice.probs, choice.importance)]
    for present in range(8):
        some = [g if present >> i & 1 else None for i, g in enumerate(grads)]
        rule = (scoring, normalize, 0.7)
        args = (*some, choice.probs, choice.expert_ids, *rule)
        actual = torch.ops.moe_ext.gate_backward(*args)
        wide = [None if g is None else g.double() for g in some]
        expected = reference.gate_backward(*wide, choice.probs.double(), choice.expert_ids, *rule)
        assert relative_error(actual, expected) < 1e-6


def _from_others(p, g, size):
    """The sum over j of p[j] * (g[i] - g[j]), and that of the sizes of its terms. [T, N]"""
    others = 1 - torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    differences = others * (g.unsqueeze(-1) - g.unsqueeze(-2))
    sizes = others * (size.unsqueeze(-1) + size.unsqueeze(-2))
    return tuple((matrix @ p.unsqueeze(-1)).squeeze(-1) for matrix in (differences, sizes))


@pytest.mark.parametrize("normalize", ["never", "before", "after"])
@pytest.mark.parametrize("by_logits", [False, True])
@pytest.mark.parametrize(("E", "K"), [(4, 1), (8, 2), (100, 5)])
def test_gradient_of_a_saturated_row_is_exact(device, E, K, by_logits, normalize):
    """Its error is one of rounding beside differences of gradients, which are small where one
    probability is near 1; not beside the gradients."""
    T = 200
    scale = torch.logspace(-1, 0.9, T, device=device).unsqueeze(-1)
    # Multiples of 1/256, whose differences are exact.
    logits = (256 * scale * torch.randn(T, E, device=device)).round() / 256
    scores = logits if by_logits else torch.randn_like(logits)
    is_before, is_after = normalize == "before", normalize == "after"
    weights, experts, probs, _ = moe_ext.gate(logits, K, choice_scores=scores, normalize=is_before)
    slots = moe_ext.make_plan(experts, E, T if is_before else T // E).slots
    grad_weights = torch.randn_like(weights)
    grad_probs = torch.randn_like(probs)
    grad_probs[::2] = 0

    p, index, kept = logits.double().softmax(-1), experts.long(), slots >= 0
    g = grad_weights.double() * kept
    size = g.abs()
    if normalize != "never":
        chosen = p.gather(-1, index) * kept
        total = chosen.sum(-1, keepdim=True).clamp(min=1e-300)
        g, size = (kept * x / total for x in _from_others(chosen / total, g, size))
    g, size = (
        of_all.double().scatter_add(-1, index, of_chosen)
        for of_all, of_chosen in ((grad_probs, g), (grad_probs.abs(), size))
    )
    exact, terms = (p * x for x in _from_others(p, g, size))

    tiny, rest = torch.finfo(torch.float32).tiny, (probs, experts, "softmax", is_before, 1.0)
    for backend in (torch.ops.moe_ext, reference):
        grad = backend.mask_weights_backward(grad_weights, weights, slots, is_after, tiny, 1.0)
        grad = backend.gate_backward(grad, grad_probs, None, *rest)
        assert_within(grad, exact, terms, additions=16)


def test_no_gradient_through_the_choice(device):
    logits = torch.randn(4, 5, device=device, requires_grad=True)
    scores = torch.randn(4, 5, device=device, requires_grad=True)
    moe_ext.gate(logits, 2, choice_scores=scores).weights.sum().backward()
    assert scores.grad is None
    assert logits.grad is not None
