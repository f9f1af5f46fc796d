"""A layer as a module: l_aux, copies, state dicts, meta device, checkpointing, compile."""

import copy
import math
import pickle
import re
from functools import partial

import pytest
import torch
from cases import all_equal
from rules import FFN, Apply, E, H, gradients_of, layer_for
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moe_ext import GroupedExperts, MoE, MOELayer, TopKGate, route, total_l_aux
from moe_ext.layer import Layer

pytestmark = pytest.mark.usefixtures("poisoned")
compile_eagerly = partial(torch.compile, backend="eager")


@pytest.mark.parametrize("wrap", [nn.Sequential, checkpoint_wrapper, compile_eagerly])
def test_total_l_aux_is_the_sum_over_the_layers(wrap):
    shared, idle = layer_for(2), layer_for(2)
    moe = MoE(H, nn.Linear(H, H), E, k=3).double()
    first_output = Apply(lambda outputs: outputs[0])
    model = wrap(nn.Sequential(shared, nn.Sequential(shared, layer_for(1)), moe, first_output))
    x = torch.randn(40, H, dtype=torch.float64)
    model(x)
    layers = {m for m in model.modules() if isinstance(m, MOELayer)}
    assert len(layers) == 3
    total = total_l_aux(nn.ModuleList([model, idle]))
    expected = sum(layer.l_aux for layer in layers)
    torch.testing.assert_close(total, expected)
    weights = [layer.gate.wg.weight for layer in layers]
    grads = torch.autograd.grad(total, weights, retain_graph=True)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, weights))
    torch._dynamo.reset()


def test_total_l_aux_without_a_loss():
    class NoLoss(nn.Module):
        num_experts = H

        def route(self, tokens, used_token):
            return route(tokens, 1)._replace(l_aux=self.l_aux)

    layer, x = MOELayer(NoLoss(), GroupedExperts(H, H, FFN)), torch.randn(5, H)
    with pytest.raises(RuntimeError, match="no layer in this MOELayer was called yet"):
        total_l_aux(layer)
    for l_aux, total in ((None, 0.0), (2.5, 2.5), (torch.tensor(3), 3.0)):
        layer.gate.l_aux = l_aux
        layer(x)
        assert total_l_aux(layer) == total
    with torch.no_grad():
        layer(x)
    assert not total_l_aux(layer).requires_grad
    with pytest.raises(ValueError, match="must contain a MOELayer or a Layer, Linear does not"):
        total_l_aux(nn.Linear(H, H))
    with pytest.raises(TypeError, match=r"total_l_aux: model must be an nn\.Module, got list"):
        total_l_aux([layer])


class CountBalances(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.moe_ext.balance.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_evaluation_computes_the_loss_where_it_is_read(k):
    layer, x = layer_for(k).eval(), torch.randn(40, H, dtype=torch.float64)
    with CountBalances() as balances:
        layer(x)
        expected, counts = layer.l_aux, layer.exp_counts
        assert expected.requires_grad
        assert balances.count == 1
        with torch.no_grad():
            layer(x)
        assert balances.count == 1
        assert not layer.l_aux.requires_grad
        assert torch.equal(layer.l_aux, expected)
        assert layer.exp_counts.dtype == torch.int64
        assert torch.equal(layer.exp_counts, counts)
        assert balances.count == 3
    with torch.no_grad():
        _, aux = layer.forward_with_aux(x)
        assert torch.equal(aux.l_aux, expected)
        # The gate alone has it, in its own form and DeepSpeed's.
        assert torch.equal(layer.gate.route(x).l_aux, expected)
        assert torch.equal(layer.gate(x)[0], expected)


def test_a_loss_of_ones_own_is_computed_in_every_call():
    class MoreLoss(TopKGate):
        def route(self, tokens, used_token=None, expert_ids=None):
            routing = super().route(tokens, used_token, expert_ids)
            return routing._replace(l_aux=routing.l_aux + 1)

    class NoLoss(TopKGate):
        def route(self, tokens, used_token=None, expert_ids=None):
            return super().route(tokens, used_token, expert_ids)._replace(l_aux=None)

    class Around(nn.Module):
        def __init__(self, gate):
            super().__init__()
            self.gate, self.num_experts = gate, gate.num_experts

        def route(self, tokens, used_token=None, expert_ids=None):
            return self.gate.route(tokens, used_token, expert_ids)

    called = []

    def own_loss(routing):
        called.append(routing)
        return routing.logits.square().mean()

    x = torch.randn(40, H)
    options = {"k": 2, "top2_2nd_expert_sampling": False}
    gates = [MoreLoss(H, 4, **options), NoLoss(H, 4, **options), Around(TopKGate(H, 4, **options))]
    gates.append(TopKGate(H, 4, **options, aux_loss=own_loss))
    for gate in gates:
        layer = MOELayer(gate, GroupedExperts(4, H, FFN)).eval()
        layer(x)
        expected = layer.l_aux
        with torch.no_grad():
            layer(x)
        if isinstance(gate, NoLoss):
            assert expected is None
            assert layer.l_aux is None
            assert total_l_aux(layer) == 0
        else:
            assert torch.equal(layer.l_aux, expected)
    assert len(called) == 2


def test_a_layer_calls_a_forward_with_aux_of_its_own():
    class More(MOELayer):
        def forward_with_aux(self, hidden, used_token=None, *, expert_ids=None):
            out, aux = super().forward_with_aux(hidden, used_token, expert_ids=expert_ids)
            return out + 100, aux._replace(l_aux=aux.l_aux + 1)

    gate = TopKGate(H, 4, 2, drop_tokens=False, top2_2nd_expert_sampling=False)
    layer = More(gate, GroupedExperts(4, H, FFN))
    plain = MOELayer(gate, layer.experts)
    x = torch.randn(40, H)
    assert torch.equal(layer(x), plain(x) + 100)
    assert torch.equal(layer.l_aux, plain.l_aux + 1)


def test_attributes_of_a_layer_can_be_reset():
    layer = layer_for(2)
    layer(torch.randn(40, H, dtype=torch.float64))
    layer.l_aux = layer.exp_counts = None
    assert layer.l_aux is None
    assert layer.exp_counts is None
    with pytest.raises(RuntimeError, match="was called yet"):
        total_l_aux(layer)


def test_total_l_aux_in_compiled_code():
    layer, x = layer_for(2), torch.randn(40, H, dtype=torch.float64)

    def loss(x):
        return layer(x).sum() + 0.01 * total_l_aux(layer)

    assert torch.equal(compile_eagerly(loss, fullgraph=True)(x), loss(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_layer_can_be_copied_and_pickled_after_a_forward(copier):
    layer = layer_for(2)
    x = torch.randn(30, H, dtype=torch.float64)
    out = layer(x)
    twin = copier(layer)
    assert twin.l_aux is None
    assert twin.exp_counts is None
    assert layer.l_aux.requires_grad
    assert torch.equal(twin(x), out)
    # Names of private modules would break a pickle when they change.
    assert not {b"foreign", b"padded"} & set(re.findall(rb"\w+", pickle.dumps(layer)))


def test_copies_of_a_compiled_layer_are_their_own():
    layer = layer_for(2, drop_tokens=False)
    layer.compile(backend="eager")
    x = torch.randn(30, H, dtype=torch.float64)
    out = layer(x)
    twin = copy.deepcopy(layer)
    pickle.dumps(layer)
    for parameter in twin.parameters():
        torch.nn.init.zeros_(parameter)
    assert (twin(x) == 0).all()
    assert torch.equal(layer(x), out)
    torch._dynamo.reset()


def test_state_dict_keys():
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    state = layer_for(2, bias=True).state_dict()
    assert set(state) == {"gate.wg.weight", *(f"experts.{name}" for name in names)}
    state = GroupedExperts(E, H, FFN, activation="gelu").state_dict()
    sizes = {name: tuple(parameter.shape) for name, parameter in state.items()}
    assert sizes == {"up_proj": (E, FFN, H), "down_proj": (E, H, FFN)}


def test_meta_device():
    with torch.device("meta"):
        layer = layer_for(2, bias=True, dtype=torch.float32)
    out, aux = layer.forward_with_aux(torch.randn(30, H, device="meta"))
    assert out.shape == (30, H)
    assert aux.exp_counts.shape == (E,)
    real = layer.to_empty(device=torch.get_default_device())
    for module in (real.gate, real.experts):
        module.reset_parameters()
    assert real(torch.randn(30, H)).isfinite().all()
    assert real.experts.down_proj.abs().max() <= 1 / math.sqrt(FFN)


@pytest.mark.parametrize("options", [{}, {"drop_tokens": False}, {"drop_policy": "random"}])
def test_checkpointing(options):
    """The recomputation routes as the forward did, with noise too."""
    layer = layer_for(1, **options)

    def run(apply):
        torch.manual_seed(3)
        x = torch.linspace(-2, 2, 40 * H, dtype=torch.float64).view(40, H).requires_grad_()
        return gradients_of(layer, x, *apply(x))

    def attribute(x, module=layer):
        out = module(x)
        return out, layer.l_aux

    def result(x):
        out, aux = again(layer.forward_with_aux, x)
        return out, aux.l_aux

    again = partial(checkpoint, use_reentrant=False)
    plain = run(attribute)
    for other in (partial(attribute, module=partial(again, layer)), result):
        assert all_equal(plain, run(other))


def test_a_gradient_of_l_aux_that_reentrant_checkpointing_loses_is_warned_of():
    layer, x = layer_for(2), torch.randn(40, H, dtype=torch.float64, requires_grad=True)
    core = Layer(layer.gate, layer.experts)
    reentrant = partial(checkpoint, use_reentrant=True)
    for way in (reentrant, partial(reentrant, reentrant)):
        for name, module in (("MOELayer", layer), ("Layer", core)):
            out = way(module, x)
            with pytest.warns(UserWarning, match=f"^{name}: the gradient of l_aux is lost"):
                (out.sum() + module.l_aux).backward()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_l_aux_that_is_returned_from_a_checkpoint_has_its_gradient(use_reentrant):
    layer, moe = layer_for(2), MoE(H, nn.Linear(H, H), E, k=3).double()

    def of_layer(x):
        out = layer(x)
        return out, layer.l_aux

    def gradient(of, x, gate):
        gate.zero_grad()
        out, l_aux = of(x)
        (out.sum() + 3 * l_aux).backward()
        return gate.wg.weight.grad

    of_moe, gate_of_moe = (lambda x: moe(x)[:2]), moe.deepspeed_moe.gate
    for of, gate in ((of_layer, layer.gate), (of_moe, gate_of_moe)):
        x = torch.randn(40, H, dtype=torch.float64, requires_grad=True)
        plain = gradient(of, x, gate)
        apply = partial(checkpoint, of, use_reentrant=use_reentrant)
        assert torch.equal(gradient(apply, x, gate), plain)


@pytest.mark.filterwarnings("error")
def test_l_aux_of_a_call_without_gradients_has_none():
    layer, x = layer_for(2), torch.randn(40, H, dtype=torch.float64, requires_grad=True)
    for mode in (torch.no_grad, torch.inference_mode):
        for training in (True, False):
            with mode():
                layer.train(training)(x)
            assert not layer.l_aux.requires_grad


@pytest.mark.parametrize("wrap", [compile_eagerly, checkpoint_wrapper])
@pytest.mark.parametrize("part", ["gate", "experts"])
def test_a_part_that_is_wrapped_alone_is_refused(wrap, part):
    """The layer would bypass the wrapper."""
    parts = {"gate": TopKGate(8, 4), "experts": GroupedExperts(4, 8, 5)}
    layer, wrapped = MOELayer(**parts), wrap(parts[part])
    message = rf"{part} must not be wrapped alone, got {type(wrapped).__name__}"
    with pytest.raises(RuntimeError, match=message):
        MOELayer(**parts | {part: wrapped})
    layer._modules[part] = wrapped
    with pytest.raises(RuntimeError, match=message):
        layer(torch.randn(6, 8))


def test_experts_compiled_in_place_are_used():
    layer, compiled = MOELayer(TopKGate(8, 4), GroupedExperts(4, 8, 5)), CompileCounter()
    layer.experts.compile(backend=compiled)
    layer(torch.randn(6, 8))
    assert compiled.frame_count == 1
