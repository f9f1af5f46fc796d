"""TopKGate and MOELayer against plain loops, and the ways callers use layers."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from cases import gate_for, relative_error
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moe_ext import (
    CosineRouter,
    Experts,
    GroupedExperts,
    ModuleExperts,
    MoE,
    MOELayer,
    TopKGate,
    route,
    total_l_aux,
)
from moe_ext.parallel.sharding import divide

pytestmark = pytest.mark.usefixtures("poisoned")

E, H, FFN = 6, 10, 12

compile_eagerly = partial(torch.compile, backend="eager")


def layer_for(k: int, dtype=torch.float64, activation="swiglu", bias=False, **options) -> MOELayer:
    experts = GroupedExperts(E, H, FFN, activation=activation, bias=bias, dtype=dtype)
    return MOELayer(gate_for(k, dtype, **options), experts)


def expert_by_hand(experts: GroupedExperts, e: int, x: torch.Tensor) -> torch.Tensor:
    p = dict(experts.named_parameters())
    up_name = "gate_up_proj" if experts.activation == "swiglu" else "up_proj"
    up = x @ p[up_name][e].T + (p[f"{up_name}_bias"][e] if experts.has_bias else 0)
    if experts.activation == "swiglu":
        pre_activation = F.silu(up[:, :FFN]) * up[:, FFN:]
    else:
        pre_activation = {"gelu": F.gelu, "relu": F.relu}[experts.activation](up)
    return pre_activation @ p["down_proj"][e].T + (
        p["down_proj_bias"][e] if experts.has_bias else 0
    )


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
    outputs = torch.stack([expert_by_hand(layer.experts, e, x) for e in range(E)], dim=1)
    out = (weights.unsqueeze(-1) * outputs.gather(1, ids.unsqueeze(-1).expand(-1, -1, H))).sum(1)
    counted = ids[:, :1] if k <= 2 else ids
    share = F.one_hot(counted, E).double().sum((0, 1)) / len(x)
    l_aux = E / counted.shape[1] * (probs.mean(0) * share).sum()
    return out, l_aux, torch.tensor(load)


def gradients(layer, x, out, l_aux):
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    loss = (out * upstream).sum() + 3 * l_aux
    return torch.autograd.grad(loss, [x, *layer.parameters()])


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("capacity", ["dropless", "above T", "below T"])
def test_a_layer_equals_the_plain_loop(k, capacity, activation, bias):
    T = 50
    options = {
        "dropless": {"drop_tokens": False},
        "above T": {"capacity_factor": 2.0 * E},
        "below T": {"capacity_factor": 0.6},
    }[capacity]
    layer = layer_for(k, activation=activation, bias=bias, **options)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    C = layer.gate.capacity(T)
    if capacity == "above T":
        assert C > T
    if capacity == "below T":
        assert C < T
    out, l_aux, load = layer_by_hand(layer, x, C)
    actual = layer(x)
    assert relative_error(actual, out) < 1e-12
    assert relative_error(layer.l_aux, l_aux) < 1e-12
    assert layer.exp_counts.dtype == torch.int64
    assert torch.equal(layer.exp_counts, load)
    if capacity == "below T":
        assert load.max() > C
    expected = gradients(layer, x, out, l_aux)
    for grad, wanted in zip(gradients(layer, x, actual, layer.l_aux), expected, strict=True):
        assert relative_error(grad, wanted) < 1e-12


@pytest.mark.parametrize("options", [{}, {"drop_tokens": False}])
def test_module_experts_equal_grouped_ones(options):
    grouped = layer_for(2, activation="relu", bias=True, **options)

    modules = ModuleExperts(
        nn.Sequential(nn.Linear(H, FFN), nn.ReLU(), nn.Linear(FFN, H)).double(), E
    )
    p = grouped.experts
    for e, module in enumerate(modules.experts):
        module[0].load_state_dict({"weight": p.up_proj[e], "bias": p.up_proj_bias[e]})
        module[2].load_state_dict({"weight": p.down_proj[e], "bias": p.down_proj_bias[e]})
    layer = MOELayer(grouped.gate, modules)
    x = torch.randn(4, 9, H, dtype=torch.float64)
    assert relative_error(layer(x), grouped(x)) < 1e-12
    # Experts without a token have a gradient, which is zero.
    layer(x[:1, :1]).sum().backward()
    assert all(q.grad is not None for q in modules.parameters())


def test_modules_given_one_by_one_are_the_experts():
    given = nn.ModuleList(nn.Sequential(nn.Linear(H, 2 + e), nn.Linear(2 + e, H)) for e in range(E))
    experts = ModuleExperts(given.double())
    assert experts.num_experts == ModuleExperts(given, E).num_experts == E
    assert all(mine is its for mine, its in zip(experts.experts, given, strict=True))
    assert set(experts.state_dict()) == {f"experts.{name}" for name in given.state_dict()}
    layer, x = MOELayer(gate_for(2, drop_tokens=False), experts), torch.randn(9, H).double()
    routing = layer.gate.route(x)
    outputs = torch.stack([expert(x) for expert in given], dim=1)
    chosen = outputs.gather(1, routing.plan.expert_ids.long().unsqueeze(-1).expand(-1, -1, H))
    expected = (routing.weights.unsqueeze(-1) * chosen).sum(1)
    assert relative_error(layer(x), expected) < 1e-12


def test_modules_given_one_by_one_are_divided_among_processes():
    given = nn.ModuleList(nn.Linear(H, H) for _ in range(E))
    part = divide(ModuleExperts(given), 1, 2)
    assert part.num_experts == E // 2
    for mine, its in zip(part.experts, given[E // 2 :], strict=True):
        assert torch.equal(mine.weight, its.weight)


def test_module_experts_name_what_is_wrong_with_their_modules():
    one = nn.Linear(H, H)
    for make, message in (
        (lambda: ModuleExperts(nn.ModuleList()), "must hold one module or more, got an empty"),
        (lambda: ModuleExperts(nn.ModuleList([one]), 2), "num_experts must be 1, the length of"),
        (lambda: ModuleExperts(nn.ModuleList([one, None])), "expert 1 must be an nn.Module, got N"),
        (lambda: ModuleExperts(nn.ModuleList([one] * 2)), "0 and 1 are the same object"),
        (lambda: ModuleExperts([one]), "or an nn.ModuleList of one per expert, got list"),
        (lambda: ModuleExperts(one), "num_experts must be given beside one module"),
        (lambda: MOELayer(gate_for(2), nn.ModuleList([one])), "ModuleExperts takes an nn.Modul"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("router", [nn.Linear(H, E), CosineRouter(H, E), nn.Sequential()])
def test_a_router_in_the_place_of_a_gate_is_refused(router):
    experts = GroupedExperts(E, H, FFN)
    with pytest.raises(ValueError, match=rf"got {type(router).__name__}; .*router=gate"):
        MOELayer(router, experts)
    MOELayer(TopKGate(H, E, router=router), experts)


def test_module_experts_take_the_first_of_a_tuple():
    class Pair(nn.Module):
        def forward(self, rows):
            return rows + 1, "more"

    layer = MOELayer(gate_for(2, drop_tokens=False), ModuleExperts(Pair(), E))
    x = torch.randn(9, H, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x + 1)


def test_shape_dtype_and_device_are_kept():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        layer = layer_for(2, dtype=dtype)
        x = torch.randn(2, 3, 5, H, dtype=dtype)
        out = layer(x)
        assert out.shape == x.shape
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


def test_one_expert():
    layer = MOELayer(
        TopKGate(H, 1, dtype=torch.float64, drop_tokens=False),
        GroupedExperts(1, H, FFN, dtype=torch.float64),
    )
    x = torch.randn(7, H, dtype=torch.float64)
    assert relative_error(layer(x), expert_by_hand(layer.experts, 0, x)) < 1e-12
    torch.testing.assert_close(layer.l_aux, torch.ones_like(layer.l_aux))


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
    out = torch.einsum("sec,ecm->sm", combine_weights, outputs)
    assert relative_error(layer(x), out) < 1e-12
    assert torch.equal(layer.exp_counts, exp_counts)
    assert torch.equal(layer.l_aux, l_aux)
    grads = torch.autograd.grad(combine_weights.square().sum(), layer.gate.wg.weight)
    weights = layer.gate.route(x).weights
    expected = torch.autograd.grad(weights.square().sum(), layer.gate.wg.weight)
    assert relative_error(grads[0], expected[0]) < 1e-12


def test_layer_under_autocast():
    layer = layer_for(2, dtype=torch.float32)
    x = torch.randn(30, H, requires_grad=True)
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.float32
    assert 0 < relative_error(out, layer(x)) < 0.02
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


class First(nn.Module):
    """A module that returns the first output of another."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)[0]


@pytest.mark.parametrize("wrap", [nn.Sequential, checkpoint_wrapper, compile_eagerly])
def test_total_l_aux_is_the_sum_over_the_layers(wrap):
    shared, idle = layer_for(2), layer_for(2)
    moe = MoE(H, nn.Linear(H, H), E, k=3).double()
    model = wrap(nn.Sequential(shared, nn.Sequential(shared, layer_for(1)), First(moe)))
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
        num_experts = E

        def route(self, tokens, used_token):
            return route(tokens[:, :E], 1)._replace(l_aux=self.l_aux)

    layer, x = MOELayer(NoLoss(), GroupedExperts(E, H, FFN)), torch.randn(5, H)
    with pytest.raises(RuntimeError, match="no MOELayer in this MOELayer was called yet"):
        total_l_aux(layer)
    for l_aux, total in ((None, 0.0), (2.5, 2.5), (torch.tensor(3), 3.0)):
        layer.gate.l_aux = l_aux
        layer(x)
        assert total_l_aux(layer) == total
    with torch.no_grad():
        layer(x)
    assert not total_l_aux(layer).requires_grad
    with pytest.raises(ValueError, match="model must contain a MOELayer, Linear does not"):
        total_l_aux(nn.Linear(H, H))
    with pytest.raises(TypeError, match=r"total_l_aux: model must be an nn\.Module, got list"):
        total_l_aux([layer])


@pytest.mark.parametrize(("dtype", "advice"), [(torch.float64, True), (torch.int64, False)])
def test_autocast_is_advised_to_floating_tokens_alone(dtype, advice):
    layer = MOELayer(TopKGate(H, E), GroupedExperts(E, H, FFN))
    with pytest.raises(RuntimeError, match=r"convert one of the two with \.to\(dtype\)") as error:
        layer(torch.ones(3, H, dtype=dtype))
    assert ("torch.autocast" in str(error.value)) == advice


def test_total_l_aux_in_compiled_code():
    layer, x = layer_for(2), torch.randn(40, H, dtype=torch.float64)

    def loss(x):
        return layer(x).sum() + 0.01 * total_l_aux(layer)

    assert torch.equal(compile_eagerly(loss, fullgraph=True)(x), loss(x))
    torch._dynamo.reset()


def test_l_aux_reaches_the_router_and_nothing_else():
    layer = layer_for(2)
    layer(torch.randn(30, H, dtype=torch.float64))
    layer.l_aux.backward()
    assert layer.gate.wg.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in layer.experts.parameters())


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
    layer = layer_for(2, bias=True)
    assert set(layer.state_dict()) == {
        "gate.wg.weight",
        "experts.gate_up_proj",
        "experts.gate_up_proj_bias",
        "experts.down_proj",
        "experts.down_proj_bias",
    }
    plain = GroupedExperts(E, H, FFN, activation="gelu")
    assert {n: tuple(p.shape) for n, p in plain.named_parameters()} == {
        "up_proj": (E, FFN, H),
        "down_proj": (E, H, FFN),
    }


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
        return gradients(layer, x, *apply(x))

    def attribute(x):
        out = layer(x)
        return out, layer.l_aux

    def checkpointed_attribute(x):
        out = checkpoint(layer, x, use_reentrant=False)
        return out, layer.l_aux

    def checkpointed(x):
        out, aux = checkpoint(layer.forward_with_aux, x, use_reentrant=False)
        return out, aux.l_aux

    plain = run(attribute)
    for other in (checkpointed_attribute, checkpointed):
        assert all(torch.equal(a, b) for a, b in zip(plain, run(other), strict=True))


def test_a_gradient_of_l_aux_that_reentrant_checkpointing_loses_is_warned_of():
    layer, x = layer_for(2), torch.randn(40, H, dtype=torch.float64, requires_grad=True)
    reentrant = partial(checkpoint, use_reentrant=True)
    for way in (reentrant, partial(reentrant, reentrant)):
        out = way(layer, x)
        with pytest.warns(UserWarning, match="the gradient of l_aux is lost"):
            (out.sum() + layer.l_aux).backward()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_l_aux_that_is_returned_from_a_checkpoint_has_its_gradient(use_reentrant):
    layer, moe = layer_for(2), MoE(H, nn.Linear(H, H), E, k=3).double()

    def of_layer(x):
        out = layer(x)
        return out, layer.l_aux

    def of_moe(x):
        return moe(x)[:2]

    def gradient(of, x, gate):
        gate.zero_grad()
        out, l_aux = of(x)
        (out.sum() + 3 * l_aux).backward()
        return gate.wg.weight.grad

    for of, gate in ((of_layer, layer.gate), (of_moe, moe.deepspeed_moe.gate)):
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


def test_gradient_of_a_gradient():
    layer = layer_for(2, capacity_factor=0.7)
    x = torch.randn(20, H, dtype=torch.float64, requires_grad=True)

    def loss(x):
        out, aux = layer.forward_with_aux(x)
        return out.square().sum() + aux.l_aux

    (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
    direction = torch.randn_like(x)
    (product,) = torch.autograd.grad((grad * direction).sum(), x)
    step = 1e-6
    ahead, behind = (
        torch.autograd.grad(loss(point), point)[0]
        for point in ((x + s * step * direction).detach().requires_grad_() for s in (1, -1))
    )
    assert relative_error((ahead - behind) / (2 * step), product) < 1e-6


def test_experts_with_only_a_forward_run_in_a_layer():
    class Scale(Experts):
        def __init__(self):
            super().__init__(E)
            self.factor = nn.Parameter(torch.ones(E))

        def forward(self, rows, plan):
            expert = plan.expert_ids.reshape(-1)[plan.sources.clamp(min=0)].long()
            return rows * self.factor[expert].unsqueeze(-1)

    layer = MOELayer(gate_for(2, dtype=torch.float32, drop_tokens=False), Scale())
    x = torch.randn(30, H)
    torch.testing.assert_close(layer(x), x)
    with pytest.raises(NotImplementedError, match="Experts must define forward"):
        MOELayer(layer.gate, Experts(E))(x)


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


@pytest.mark.parametrize("wrap", [compile_eagerly, checkpoint_wrapper])
@pytest.mark.parametrize("part", ["gate", "experts"])
def test_a_part_that_is_wrapped_alone_is_refused(wrap, part):
    """The layer would bypass the wrapper."""
    layer = MOELayer(TopKGate(8, 4), GroupedExperts(4, 8, 5))
    wrapped = wrap(getattr(layer, part))
    name = type(wrapped).__name__
    with pytest.raises(RuntimeError, match=rf"{part} must not be wrapped alone, got {name}"):
        setattr(layer, part, wrapped)


def test_experts_compiled_in_place_are_used():
    layer, compiled = MOELayer(TopKGate(8, 4), GroupedExperts(4, 8, 5)), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    layer.experts.compile(backend=backend)
    layer(torch.randn(6, 8))
    assert len(compiled) == 1


def test_an_attribute_may_have_the_name_of_a_method():
    """Experts written for DeepSpeed may have such an attribute."""

    class Own(nn.Module):
        num_experts = 4

        def __init__(self):
            super().__init__()
            self.routed = nn.Linear(8, 8)

        def forward(self, x):
            return self.routed(x)

    layer = MOELayer(TopKGate(8, 4), Own())
    assert layer(torch.randn(6, 8)).shape == (6, 8)


def test_residual_under_autocast():
    moe = MoE(8, nn.Linear(8, 8), 4, use_residual=True)
    hidden = torch.randn(6, 8).bfloat16()
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        assert moe(hidden)[0].dtype == torch.bfloat16
