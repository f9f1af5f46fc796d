"""The functions and the layer under torch.compile, torch.export and torch.func."""

from functools import partial

import pytest
import torch
from cases import all_equal, assert_near, with_seed
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import moe_ext
from moe_ext import CosineRouter, GroupedExperts, MOELayer, TopKGate, losses
from moe_ext.layer import Layer
from moe_ext.routing.gate import Gate
from moe_ext.routing.rule import Rule

E, H, FFN = 6, 8, 8
TOKENS = (33, 5, 64, 127, 200)
compile_whole = partial(torch.compile, fullgraph=True, backend="aot_eager")


def layer_for(k=2, **options) -> MOELayer:
    options = {"top2_2nd_expert_sampling": False} | options
    gate = TopKGate(H, E, k=k, **options)
    return MOELayer(gate, GroupedExperts(E, H, FFN))


OPTIONS = [
    {"drop_tokens": False},
    {"capacity_factor": 0.8, "min_capacity": 1},
    {"k": 1, "min_capacity": 2, "use_rts": False},
    {"k": 3, "capacity_factor": 1.2},
]


@pytest.fixture
def compiled():
    """torch.compile from a clean state; returns the number of graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def loss_and_gradients(layer, function, x, *rest):
    out, aux = with_seed(function, x, *rest)
    grads = torch.autograd.grad(out.square().sum() + aux.l_aux, [x, *layer.parameters()])
    return [out.detach(), aux.l_aux.detach(), aux.exp_counts, *grads]


def assert_alike(layer, function, x, tolerance):
    """The function is forward_with_aux, with its gradients."""
    expected = loss_and_gradients(layer, layer.forward_with_aux, x)
    assert_near(loss_and_gradients(layer, function, x), expected, tolerance)


RULES = [
    {"noisy_gate_policy": "Jitter", "use_rts": True, "k": 1},
    {"noisy_gate_policy": "RSample", "drop_policy": "random"},
    {"noisy_gate_policy": "Gaussian", "scoring": "sqrtsoftplus", "normalize": "before"},
    {"top2_2nd_expert_sampling": True, "drop_tokens": False},
    {"scoring": "sigmoid", "num_groups": 3, "topk_groups": 2, "group_score": "top2_sum"},
    {"expert_bias": True, "num_groups": 2, "k": 3, "scale": 2.5},
    {"balancing": "sinkhorn", "drop_policy": "probs", "order": "choice"},
    {"balancing": "forced", "drop_tokens": False},
    {"k": E, "drop_policy": "probs", "normalize": "never", "capacity_factor": 2 / E},
    {"router": lambda: CosineRouter(H, E, proj_dim=5)},
    {"aux_loss": lambda r: losses.z_loss(r.logits) + losses.importance_loss(r.importance)},
    {
        "aux_loss": lambda r: losses.sequence_balance_loss(r.probs, r.plan.expert_ids, 1),
        "scoring": "sigmoid",
    },
]


@pytest.mark.parametrize(
    ("options", "has_mask"),
    [(options, False) for options in OPTIONS] + [(options, True) for options in RULES],
    ids=lambda value: value if isinstance(value, bool) else " ".join(value),
)
def test_one_graph_serves_five_values_of_t(compiled, options, has_mask):
    if make_router := options.get("router"):
        options = options | {"router": make_router()}
    layer = layer_for(**options)
    steps = compile_whole(layer.forward_with_aux, dynamic=True), layer.forward_with_aux
    used = torch.rand(max(TOKENS)) < 0.8
    for T in TOKENS:
        x = torch.randn(T, H, requires_grad=True)
        rest = (used[:T],) if has_mask else ()
        found, expected = (loss_and_gradients(layer, step, x, *rest) for step in steps)
        assert all_equal(found, expected)
    assert compiled() == 1


def test_inductor_compiles_forward_and_backward(compiled):
    layer = layer_for(drop_tokens=False)
    function = torch.compile(layer.forward_with_aux, fullgraph=True, dynamic=True)
    for T in TOKENS:
        assert_alike(layer, function, torch.randn(T, H, requires_grad=True), 1e-5)
    assert compiled() == 1


def test_compiled_layer_sets_its_attributes(compiled):
    layer = layer_for()
    x = torch.randn(40, H)
    expected = layer(x)
    l_aux, exp_counts = layer.l_aux, layer.exp_counts
    layer.l_aux = layer.exp_counts = None
    assert torch.equal(compile_whole(layer)(x), expected)
    assert torch.equal(layer.l_aux, l_aux)
    assert torch.equal(layer.exp_counts, exp_counts)


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_compile_with_checkpoint(compiled, options):
    layer = layer_for(**options)
    function = partial(checkpoint, layer.forward_with_aux, use_reentrant=False)
    assert_alike(layer, compile_whole(function), torch.randn(40, H, requires_grad=True), 1e-6)


class Pure(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden):
        return self.layer.forward_with_aux(hidden)


@pytest.mark.parametrize("options", OPTIONS)
def test_export_gives_a_program_that_trains(options):
    layer = layer_for(**options)
    is_dynamic = layer.gate.capacity(64) is None
    shapes = {"hidden": {0: torch.export.Dim("T")}} if is_dynamic else None
    program = torch.export.export(Pure(layer), (torch.randn(64, H),), dynamic_shapes=shapes)
    called = {str(node.target) for node in program.graph.nodes}
    assert {f"moe_ext.{name}.default" for name in ("gate", "plan", "feed_forward")} <= called
    module = program.module()
    for T in TOKENS if is_dynamic else (64,):
        x = torch.randn(T, H, requires_grad=True)
        out, aux = module(x)
        loss = out.square().sum() + aux.l_aux
        actual = torch.autograd.grad(loss, [x, module.layer.gate.wg.weight])
        expected = loss_and_gradients(layer, layer.forward_with_aux, x)
        assert torch.equal(out, expected[0])
        # The program calls raw operators: the weights' gradient comes from the saved output.
        assert_near(actual, expected[3:5], 1e-6)


def test_aot_inductor_gives_the_layers_result(tmp_path):
    layer = layer_for(drop_tokens=False)
    shapes = {"hidden": {0: torch.export.Dim("T")}}
    with torch.no_grad():
        program = torch.export.export(Pure(layer), (torch.randn(64, H),), dynamic_shapes=shapes)
        package = str(tmp_path / "layer.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=package)
        run = torch._inductor.aoti_load_package(package)
        for T in (64, 5):
            x = torch.randn(T, H)
            out, aux = run(x)
            expected, expected_aux = layer.forward_with_aux(x)
            assert all_equal([out, *aux], [expected, *expected_aux])


def test_export_with_a_capacity_needs_a_fixed_number_of_tokens():
    shapes = {"hidden": {0: torch.export.Dim("T")}}
    core = Layer(Gate(H, E, Rule(capacity_factor=1.0)), GroupedExperts(E, H, FFN))
    for name, layer in (("TopKGate", layer_for()), ("Gate", core)):
        message = f"^{name}: torch.export with a capacity needs a fixed number"
        with pytest.raises(RuntimeError, match=message):
            torch.export.export(Pure(layer), (torch.randn(64, H),), dynamic_shapes=shapes)


def test_an_exported_program_is_saved_and_loaded(tmp_path):
    layer = layer_for(drop_tokens=False)
    x = torch.randn(64, H)
    torch.export.save(torch.export.export(Pure(layer), (x,)), tmp_path / "layer.pt2")
    out, aux = torch.export.load(tmp_path / "layer.pt2").module()(x)
    expected, expected_aux = layer.forward_with_aux(x)
    assert torch.equal(out, expected)
    assert torch.equal(aux.l_aux, expected_aux.l_aux)

    class Parts(torch.nn.Module):
        def forward(self, logits):
            choice = moe_ext.gate(logits, 2)
            return choice, moe_ext.make_plan(choice.expert_ids, E), layer.gate.route(x)

    parts = torch.export.export(Parts(), (torch.randn(5, E),), strict=False)
    torch.export.save(parts, tmp_path / "parts.pt2")
    choice, plan, routing = torch.export.load(tmp_path / "parts.pt2").module()(torch.ones(5, E))
    assert isinstance(choice, moe_ext.Choice)
    assert isinstance(plan, moe_ext.Plan)
    assert isinstance(routing, moe_ext.Routing)


def test_one_compilation_of_an_aligned_plan(compiled):
    def function(experts):
        return moe_ext.make_plan(experts, E, align=8)[:4]

    fast = compile_whole(function, dynamic=True)
    for T in (3, 4, 1000, 33):
        experts = torch.rand(T, E).topk(2).indices.to(torch.int32)
        assert all_equal(fast(experts), function(experts))
    assert compiled() == 1


def test_raw_operators_have_gradients():
    plan = moe_ext.make_plan(torch.tensor([[0, 1], [1, 0]], dtype=torch.int32), 2)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    raw = torch.ops.moe_ext.dispatch(x, plan.slots, plan.sources, None)
    (grad,) = torch.autograd.grad(raw.square().sum(), x)
    torch.testing.assert_close(grad, 4 * x)


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_func_grad_and_per_sample_gradients(options):
    layer = layer_for(**options).eval()
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        out = torch.func.functional_call(layer, parameters, (x,))
        return out.square().sum()

    x = torch.randn(3, 10, H)
    grads = torch.func.grad(loss)(parameters, x[0])
    layer(x[0]).square().sum().backward()
    assert grads.keys() == parameters.keys()
    assert_near(grads.values(), [parameter.grad for parameter in layer.parameters()], 1e-5)
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        expected = torch.func.grad(loss)(parameters, x[i])
        assert_near([grad[i] for grad in per_sample.values()], expected.values(), 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"k": 1, "drop_tokens": False},
        {"k": 2, "drop_tokens": False},
        {"k": 3, "capacity_factor": 0.6},
        {"k": 2, "drop_policy": "random", "drop_tokens": False, "scoring": "sigmoid"},
    ],
)
def test_vmap_is_a_loop_in_training_too(options):
    """A gate whose results depend on no draw runs under vmap as it is."""
    layer = layer_for(**options)
    x = torch.randn(3, 10, H)
    out, aux = torch.func.vmap(layer.forward_with_aux)(x)
    for i in range(3):
        expected, expected_aux = layer.forward_with_aux(x[i])
        assert all_equal([out[i], *(part[i] for part in aux)], [expected, *expected_aux])
    assert torch.equal(torch.func.vmap(layer)(x), out)


def test_random_token_selection_draws_where_nothing_is_dropped():
    """As in DeepSpeed: later draws do not depend on dropping."""
    x = torch.randn(10, H)
    torch.manual_seed(3)
    torch.rand(10, E)
    expected = torch.rand(4)
    gate = TopKGate(H, E, k=1, drop_tokens=False)
    torch.manual_seed(3)
    gate.route(x)
    assert torch.equal(torch.rand(4), expected)


def test_hessian_vector_products_match():
    x = torch.randn(4, E, dtype=torch.float64)

    def loss(logits):
        return (moe_ext.gate(logits, 2, normalize=True).weights ** 2).sum()

    hessian = torch.func.jacrev(torch.func.jacrev(loss))(x)
    twice = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(hessian, twice)


def test_forward_mode_and_torch_func_of_raw_operators_are_errors():
    x = torch.randn(4, E)
    plan = moe_ext.make_plan(torch.zeros(4, 1, dtype=torch.int32), 1)
    for function in (lambda x: moe_ext.gate(x, 2).weights, lambda x: moe_ext.dispatch(x, plan)):
        with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
            torch.func.jvp(function, (x,), (x,))

    def raw(x):
        return torch.ops.moe_ext.dispatch(x, plan.slots, plan.sources, None)

    with pytest.raises(NotImplementedError, match="moe_ext::dispatch has no jvp"):
        torch.func.jvp(raw, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has no jvp"):
        raw(forward_ad.make_dual(x, x))
    with pytest.raises(NotImplementedError, match="does not differentiate raw operators"):
        torch.func.grad(lambda x: raw(x).sum())(x)
