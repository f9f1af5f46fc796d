"""moe_ext.deepspeed against DeepSpeed, on random cases.

Both draw the same random numbers from the same seed, so noise and random token selection are
compared too. Left out is what in DeepSpeed hangs on a rounding or on the order in which torch.topk
takes equal numbers: who is kept by use_rts=False over capacity, and by probabilities that are equal
but for rounding; 16-bit logits are drawn without ties.
"""

import functools

import pytest
import torch
from deepspeed.moe import experts as ds_experts
from deepspeed.moe import layer as ds_layer
from deepspeed.moe import sharded_moe as ds
from torch import Tensor, nn

import moe_ext
import moe_ext.deepspeed.experts
from moe_ext.deepspeed import layer as our_layer
from moe_ext.deepspeed import sharded_moe

BATCHES = range(20)
CASES = range(50)
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _nothing_per_shape(monkeypatch):
    """DeepSpeed compiles helpers for every shape, and oneDNN caches kernels for each."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with torch.compiler.set_stance("force_eager"):
        yield


class Case:
    """A random case. The draws do not touch the generator that noise comes from."""

    def __init__(self, *numbers: int) -> None:
        seed = sum(number * 1009**i for i, number in enumerate(numbers))
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self.S = self.of(self.integer(1, 12), self.integer(13, 90), self.integer(91, 200))
        self.dtype = self.of(*DTYPES)
        self.E = self.integer(1, 16 if self.is_short else 64)
        # A factor above E makes capacity and masks larger than S.
        large = 1.1 * self.E if self.S * self.E < 1000 else 2.0
        self.factor = self.of(self.number(0.05, 1), self.number(1, 3), 1.0, 1.25, large)
        self.min_capacity = self.of(0, 1, 4, 8, self.S + 3)
        self.drops = self.of(True, True, False)

    @property
    def is_short(self) -> bool:
        return self.dtype.itemsize == 2

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def number(self, low: float, high: float) -> float:
        return float(torch.rand((), generator=self.generator)) * (high - low) + low

    def of(self, *options):
        return options[self.integer(0, len(options) - 1)]

    def rand(self, *size: int) -> Tensor:
        return torch.rand(size, generator=self.generator)

    @functools.cached_property
    def logits(self) -> Tensor:
        """[S, E] with an uneven load and no two nearly equal values in a row."""
        keys = self.rand(self.S, self.E) + self.of(0, 0.5, 3) * self.rand(self.E)
        steps = keys.argsort(-1).argsort(-1) + 0.4 * self.rand(self.S, self.E)
        return (steps * self.of(0.3, 0.3 if self.is_short else 0.05) - 2).to(self.dtype)

    def used_token(self, *shape: int) -> Tensor | None:
        used = (self.rand(*shape) < 0.7).to(self.of(torch.int64, torch.int32, torch.bool))
        return self.of(None, used)

    def run(self, function, *args):
        """With the noise of this case."""
        torch.manual_seed(self.seed)
        return function(*args)

    def assert_near(self, actual: Tensor, expected: Tensor, in_float32: bool = False) -> None:
        """in_float32: DeepSpeed computes it in float32 for float64 logits too."""
        short = torch.finfo(torch.float32).eps
        eps = torch.finfo(self.dtype).eps
        computed = short if self.is_short or in_float32 else eps
        eps = max(eps, computed)
        assert actual.shape == expected.shape
        error = (actual.double() - expected.double()).norm()
        # Sums of numbers of size one may cancel; their rounding error remains.
        assert error <= 16 * eps * expected.double().norm() + computed * expected.numel() ** 0.5


def hangs_on_rounding(probs: Tensor, k: int, C: int) -> bool:
    """Whether an expert's last kept and first dropped probabilities are nearly equal."""
    values, ids = probs.double().topk(k, dim=-1)
    chosen = torch.zeros_like(probs, dtype=torch.float64).scatter(1, ids, values)
    chosen = chosen.sort(dim=0, descending=True).values
    if not 0 < C < len(chosen):
        return False
    last, first = chosen[C - 1], chosen[C]
    return bool(((first > 0) & (last - first <= 2 * torch.finfo(probs.dtype).eps * last)).any())


def compare(case: Case, name: str, *options) -> None:
    """Compare outputs in both forms, and the gradient of weights and loss.

    name: of a function of (logits, *options, sparse_routes)
    """
    logits = case.logits
    for sparse in (False, True):
        results, grads, upstream = [], [], None
        # DeepSpeed's gradient through 16-bit probabilities is wrong by several percent.
        for module, dtype in (
            (sharded_moe, case.dtype),
            (ds, torch.float64 if case.is_short else case.dtype),
        ):
            leaf = logits.to(dtype, copy=True).requires_grad_()
            # DeepSpeed adds noise to its input in place.
            out = case.run(getattr(module, name), leaf * 1, *options, sparse)
            weights = out[-2] if sparse else out[1]
            if upstream is None:
                upstream = torch.randn(weights.shape, generator=case.generator)
            # This keeps both gradients at one scale, without cancellation.
            loss = (weights * upstream).sum() + case.S * out[0]
            grads.append(torch.autograd.grad(loss, leaf)[0])
            results.append(out)
        ours, wanted = results
        assert len(ours) == len(wanted)
        # DeepSpeed computes each expert's share of the loss in float32.
        case.assert_near(ours[0], wanted[0], in_float32=True)
        assert torch.equal(ours[-1], wanted[-1])
        assert ours[-1].dtype == wanted[-1].dtype
        if sparse:
            assert int(ours[1]) == int(wanted[1])
            assert ours[2] == wanted[2]
            assert all(torch.equal(a, b) for a, b in zip(ours[3:5], wanted[3:5], strict=True))
            case.assert_near(ours[5], wanted[5])
        else:
            case.assert_near(ours[1], wanted[1])
            assert torch.equal(ours[2], wanted[2])
        case.assert_near(*grads, in_float32=True)


@pytest.mark.parametrize("batch", BATCHES)
def test_top1gating_equals_deepspeeds(batch):
    for i in CASES:
        case = Case(1, batch, i)
        case.min_capacity = min(case.min_capacity, case.S)
        used, noise = case.used_token(case.S), case.of(None, "RSample")
        C = sharded_moe._capacity(torch.empty(case.S, case.E), case.factor, case.min_capacity)
        # DeepSpeed has no capacity if every token is unused.
        if used is not None and not case.drops:
            used[0] = 1
        use_rts = bool(case.drops and C < case.S) or case.of(True, False)
        options = case.factor, case.min_capacity, used, noise, case.drops, use_rts, None
        compare(case, "top1gating", *options)


@pytest.mark.parametrize("batch", BATCHES)
def test_top2gating_equals_deepspeeds(batch):
    for i in CASES:
        case = Case(2, batch, i)
        case.E = max(case.E, 2)
        case.dtype = torch.float32
        options = case.factor, case.min_capacity, case.drops, None, case.of(True, False)
        compare(case, "top2gating", *options)


@pytest.mark.parametrize("batch", BATCHES)
def test_topkgating_equals_deepspeeds(batch):
    left_out = 0
    for i in CASES:
        case = Case(3, batch, i)
        k = case.integer(1, min(case.E, 9))
        policy = case.of("probs", "position")
        options = k, case.factor, case.min_capacity, case.drops, None, policy
        C = sharded_moe._capacity(torch.empty(case.S, case.E), k * case.factor, case.min_capacity)
        by_probs = case.drops and policy == "probs"
        if by_probs and hangs_on_rounding(case.logits.softmax(-1), k, int(C)):
            left_out += 1
            continue
        compare(case, "topkgating", *options)
    assert left_out < len(CASES) / 2


def test_noise_equals_deepspeeds_draws():
    x = torch.randn(50, 7)
    for name, first in (("multiplicative_jitter", x), ("gumbel_rsample", x.shape)):
        mine, theirs = (
            Case(0).run(getattr(module, name), first, x.device) for module in (sharded_moe, ds)
        )
        assert torch.equal(mine, theirs)


class Modules(Case):
    """Gates or layers of both packages with equal weights, and a hidden state."""

    def __init__(self, *numbers: int) -> None:
        super().__init__(*numbers)
        self.dtype = self.of(torch.float32, torch.float32, torch.bfloat16, torch.float16)
        self.E = self.integer(2, 12)
        self.H = self.integer(8, 24)
        k = self.integer(1, 4) if self.E >= 4 else self.integer(1, 2)
        self.trains = self.of(True, False)
        shape = self.of((self.S,), (1, self.S), (self.S, 2))
        self.hidden = torch.randn(*shape, self.H, generator=self.generator).to(self.dtype)
        # DeepSpeed masks tokens for k = 1 only, and its top-1 gate needs min_capacity tokens.
        self.mask = None
        if k == 1:
            self.min_capacity = min(self.min_capacity, self.S)
            self.mask = self.used_token(self.hidden[..., 0].numel())
            if self.mask is not None:
                self.mask[0] = 1
        self.options = {
            "k": k,
            "capacity_factor": self.factor,
            "eval_capacity_factor": self.number(0.3, 2),
            "min_capacity": self.min_capacity,
            "noisy_gate_policy": self.of(None, "Jitter", *["RSample"] * (k == 1)),
            "drop_tokens": self.drops,
            "use_rts": True,
            "top2_2nd_expert_sampling": self.of(True, False),
        }

    def hangs_on_rounding(self, gate: nn.Module) -> bool:
        """Whether dropping by probability is nearly a tie, with the noise of this case."""
        k = self.options["k"]
        if k <= 2 or not self.drops:
            return False
        tokens = self.hidden.reshape(-1, self.H).float()
        torch.manual_seed(self.seed)
        if self.options["noisy_gate_policy"] == "Jitter" and self.trains:
            tokens = ds.multiplicative_jitter(tokens, tokens.device)
        probs = (tokens @ gate.wg.weight.float().t()).softmax(-1)
        name = "capacity_factor" if self.trains else "eval_capacity_factor"
        C = sharded_moe._capacity(probs, k * self.options[name], self.min_capacity)
        return hangs_on_rounding(probs, k, int(C))

    def step(self, layer: nn.Module, call) -> list[Tensor]:
        """The outputs, then the gradients of the first two for the hidden state and parameters."""
        layer.to(self.dtype).train(self.trains)
        hidden = self.hidden.clone().requires_grad_()
        out = self.run(call, layer, hidden, self.mask)
        upstream = torch.arange(out[0].numel()).mul(1.7).sin().view_as(out[0])
        loss = (out[0] * upstream).sum() + 7 * out[1]
        inputs = [hidden, *layer.parameters()]
        return [*out, *torch.autograd.grad(loss, inputs, allow_unused=True)]

    def compare(self, ours: nn.Module, theirs: nn.Module, call) -> None:
        """call: a function of (module, hidden, used_token) that returns the outputs"""
        eps = torch.finfo(self.dtype).eps
        for a, b in zip(self.step(ours, call), self.step(theirs, call), strict=True):
            if b is None or not b.is_floating_point():
                assert a is b is None or torch.equal(a, b)
                continue
            assert a.dtype == b.dtype
            error = (a.double() - b.double()).norm()
            # Sums over tokens may cancel.
            assert error <= eps * (64 * b.double().norm() + (b.numel() * self.S) ** 0.5)


def gate_outputs(gate: nn.Module, hidden: Tensor, used_token: Tensor | None) -> tuple:
    tokens = hidden.flatten(0, -2)
    l_aux, C, _, indices, locations, gates, counts = gate(tokens, used_token, True)
    return gates, l_aux, torch.as_tensor(int(C)), indices, locations, counts


def layer_outputs(layer: nn.Module, hidden: Tensor, used_token: Tensor | None) -> tuple:
    return layer(hidden, used_token), layer.l_aux, layer.exp_counts


@pytest.mark.parametrize("batch", BATCHES)
def test_gate_equals_deepspeeds(batch):
    for i in CASES:
        case = Modules(4, batch, i)
        theirs = ds.TopKGate(case.H, case.E, **case.options)
        if case.hangs_on_rounding(theirs.to(case.dtype)):
            continue
        ours = sharded_moe.TopKGate(
            case.H, case.E, **case.options, sampling_in_eval=True, dtype=case.dtype
        )
        ours.load_state_dict(theirs.state_dict())
        case.compare(ours, theirs, gate_outputs)


def expert(H: int) -> nn.Module:
    return nn.Sequential(nn.Linear(H, 2 * H), nn.GELU(), nn.Linear(2 * H, H))


@pytest.mark.parametrize("batch", BATCHES)
def test_moe_equals_deepspeeds(batch):
    """Layers built and loaded alike have equal outputs and gradients."""
    for i in CASES:
        case = Modules(5, batch, i)
        options = case.options | {"num_experts": case.E, "use_residual": case.of(True, False)}
        torch.manual_seed(case.seed)
        theirs = ds_layer.MoE(case.H, expert(case.H), **options).to(case.dtype)
        if case.hangs_on_rounding(theirs.deepspeed_moe.gate):
            continue
        torch.manual_seed(case.seed)
        ours = our_layer.MoE(case.H, expert(case.H), **options, sampling_in_eval=True)
        ours.to(case.dtype)
        for (name, a), (their_name, b) in zip(
            ours.state_dict().items(), theirs.state_dict().items(), strict=True
        ):
            assert name == their_name
            assert torch.equal(a, b)
        case.compare(ours, theirs, nn.Module.__call__)


class Masks(nn.Module):
    """A gate with one form only, as before DeepSpeed had sparse routes."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, tokens, used_token=None):
        return self.gate(tokens, used_token)


@pytest.mark.parametrize("batch", range(4))
@pytest.mark.parametrize("foreign", ["gate", "masks", "experts", "both", "our gate in their layer"])
def test_deepspeeds_gate_and_experts_run_in_our_layer(foreign, batch):
    for i in CASES:
        case = Modules(6, batch, i)
        torch.manual_seed(case.seed)
        their_gate = ds.TopKGate(case.H, case.E, **case.options)
        their_experts = ds_experts.Experts(expert(case.H), case.E, "ep_size_1")
        if case.hangs_on_rounding(their_gate.to(case.dtype)):
            continue
        our_gate = sharded_moe.TopKGate(case.H, case.E, **case.options, sampling_in_eval=True)
        our_gate.load_state_dict(their_gate.state_dict())
        our_experts = moe_ext.deepspeed.experts.Experts(expert(case.H), case.E, "ep_size_1")
        our_experts.load_state_dict(their_experts.state_dict())
        theirs = ds.MOELayer(their_gate, their_experts, "ep_size_1", 1, case.E)
        if foreign == "our gate in their layer":
            ours = ds.MOELayer(our_gate, their_experts, "ep_size_1", 1, case.E)
        else:
            gate = {"experts": our_gate, "masks": Masks(their_gate)}.get(foreign, their_gate)
            experts = our_experts if foreign == "gate" else their_experts
            ours = moe_ext.MOELayer(gate, experts, "ep_size_1", 1, case.E)
        case.compare(ours, theirs, layer_outputs)
