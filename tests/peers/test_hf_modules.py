"""A single experts module of transformers, under every flag, with moe_ext."""

import copy

import accelerate
import pytest
import torch
import transformers
from cases import relative_error
from test_hf_experts import assert_close
from torch import nn
from transformers.integrations import moe

import moe_ext.hf


class Module(nn.Module):
    """Experts with the parameters that their flags ask for."""

    def __init__(self, config):
        super().__init__()
        self.num_experts, H, F = config.E, config.H, config.F
        G = 2 * F if config.flags.get("has_gate", True) else F
        flip = config.flags.get("is_transposed", False)

        def stack(rows, columns):
            shape = (columns, rows) if flip else (rows, columns)
            return nn.Parameter(0.3 * torch.randn(self.num_experts, *shape))

        up = "gate_up_proj" if config.flags.get("has_gate", True) else "up_proj"
        self.register_parameter(up, stack(G, H))
        self.down_proj = stack(H, F)
        if config.flags.get("has_bias"):
            self.register_parameter(f"{up}_bias", nn.Parameter(torch.randn(self.num_experts, G)))
            self.down_proj_bias = nn.Parameter(torch.randn(self.num_experts, H))
        if config.flags.get("has_post_expert_norm"):
            self.post_expert_norm = nn.RMSNorm(H)
            nn.init.normal_(self.post_expert_norm.weight)
        self.act_fn = config.act_fn

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise AssertionError("never run")


def interleaved_gate(self, gate_up):
    gate, up = gate_up[..., ::2].clamp(max=1.0), gate_up[..., 1::2].clamp(-1.0, 1.0)
    return gate * torch.sigmoid(1.7 * gate) * (up + 1)


def module_of(act_fn=None, apply_gate=None, E=5, **flags) -> nn.Module:
    cls = type("Module", (Module,), {"forward": Module.forward, "__init__": Module.__init__})
    if apply_gate:
        cls._apply_gate = apply_gate
    config = transformers.PretrainedConfig()
    config.E, config.H, config.F, config.flags = E, 12, 8, flags
    config.act_fn = act_fn or nn.SiLU()
    return moe.use_experts_implementation(**flags)(cls)(config)


def run(module, implementation, x, experts, weights):
    module.config._experts_implementation = implementation
    module.zero_grad()
    x, weights = (t.detach().clone().requires_grad_() for t in (x, weights))
    out = module(x, experts, weights)
    out.backward(torch.arange(out.numel()).mul(1.3).sin().view_as(out).to(out.dtype))
    return [out.detach(), x.grad, weights.grad, *(p.grad for p in module.parameters())]


def routes_of(T=17, E=5, K=3):
    return torch.randn(T, 12), torch.rand(T, E).topk(K)[1], torch.rand(T, K)


class Twice(nn.SiLU):
    def forward(self, x):
        return 2 * super().forward(x)


FLAGS = {
    "default": {},
    "transposed": {"is_transposed": True},
    "bias": {"has_bias": True},
    "gpt-oss": {
        "is_transposed": True,
        "is_concatenated": False,
        "has_bias": True,
        "apply_gate": interleaved_gate,
    },
    "own gate": {"apply_gate": lambda self, x: x.chunk(2, -1)[0].tanh() * x.chunk(2, -1)[1]},
    "no gate": {"has_gate": False, "act_fn": nn.ReLU()},
    "no gate, bias": {"has_gate": False, "has_bias": True, "act_fn": nn.GELU()},
    "no gate, squared relu": {
        "has_gate": False,
        "act_fn": transformers.activations.ACT2FN["relu2"],
    },
    "norm": {"has_post_expert_norm": True},
    "norm, bias": {"has_post_expert_norm": True, "has_bias": True},
    "gelu": {"act_fn": transformers.activations.ACT2FN["gelu"]},
    "subclass of silu": {"act_fn": Twice()},
    "tanh gelu": {"act_fn": transformers.activations.ACT2FN["gelu_pytorch_tanh"]},
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("T", [0, 1, 2, 17])
def test_every_flag_of_an_experts_module_is_understood(flags, T):
    module, args = module_of(**flags), routes_of(T)
    mine = run(module, "moe_ext", *args)
    assert mine[0].shape == (T, 12)
    if T:
        assert_close(mine, run(module, "batched_mm", *args))
    else:
        assert all((grad == 0).all() for grad in mine)


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_sentinels_of_expert_parallelism_add_nothing(flags):
    """The choice of an expert of another rank adds nothing to the output or a gradient."""
    module = module_of(**flags)
    module._is_expert_parallel = True
    x, experts, weights = routes_of()
    elsewhere = torch.rand(experts.shape) < 0.5
    elsewhere[0] = True
    experts = experts.masked_fill(elsewhere, module.num_experts)
    weights = weights.masked_fill(elsewhere, 0)
    mine = run(module, "moe_ext", x, experts, weights)
    assert_close(mine, run(module, "batched_mm", x, experts, weights))
    assert (mine[0][0] == 0).all()
    assert (mine[1][0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["default", "gpt-oss", "norm, bias"])
def test_16_bit_is_within_a_few_roundings_of_float64(name, dtype):
    """As the error of transformers' own; with the experts given, since a rounding changes them."""
    module = module_of(**FLAGS[name])
    wide = copy.deepcopy(module.to(dtype)).double()
    x, experts, weights = routes_of(200)
    x = x.to(dtype)
    exact = run(wide, "batched_mm", x.double(), experts, weights.double())
    mine = run(module, "moe_ext", x, experts, weights)
    theirs = run(module, "batched_mm", x, experts, weights.to(dtype))
    assert mine[0].dtype == dtype
    eps = torch.finfo(dtype).eps
    for one, other, its in zip(mine, theirs, exact, strict=True):
        assert relative_error(one, its) < max(4 * eps, 1.2 * relative_error(other, its))


def test_weights_may_have_the_dtype_of_the_router():
    module = module_of()
    x, experts, weights = routes_of()
    module.config._experts_implementation = "moe_ext"
    out = module(x.bfloat16(), experts, weights.bfloat16())
    assert out.dtype == torch.bfloat16
    exact = module(x.bfloat16().float(), experts, weights.bfloat16().float())
    assert torch.equal(out, exact.bfloat16())


INT8 = nn.Parameter(torch.zeros(5, 16, 12, dtype=torch.int8), requires_grad=False)
# A member of a module, and why the module is refused with it.
REFUSED = {
    ("down_proj", None): "must have down_proj of 3 dimensions, got NoneType",
    ("gate_up_proj", INT8): "must have gate_up_proj in a floating-point dtype, got torch.int8",
    ("num_experts", 6): "must have gate_up_proj of num_experts = 6",
    ("act_fn", None): "must have a callable act_fn",
    ("is_concatenated", False): "must have an _apply_gate",
    ("has_bias", True): "must have gate_up_proj_bias of 2 dimensions",
}


@pytest.mark.parametrize(("member", "why"), REFUSED.items(), ids=REFUSED.values())
def test_unknown_flags_are_refused(member, why):
    module = module_of()
    setattr(module, *member)
    module.config._experts_implementation = "moe_ext"
    with pytest.raises(ValueError, match=f'experts_implementation="moe_ext": Module {why}'):
        module(*routes_of())
    model = nn.ModuleDict({"mlp": module})
    with pytest.raises(ValueError, match=f"^mlp: .*{why}"):
        moe_ext.hf.check(model)


def test_check_refuses_a_model_without_experts():
    with pytest.raises(ValueError, match=r"must have an experts module .* got a Linear"):
        moe_ext.hf.check(nn.Linear(2, 2))


def test_an_apply_gate_of_one_module_is_used():
    module, args = module_of(), routes_of()
    module._apply_gate = lambda x: x.chunk(2, -1)[0] ** 2
    assert_close(run(module, "moe_ext", *args), run(module, "batched_mm", *args))


def test_inference_mode_gives_the_same():
    module, (x, experts, weights) = module_of(), routes_of(300)
    module.config._experts_implementation = "moe_ext"
    expected = module(x, experts, weights)
    with torch.inference_mode():
        assert torch.equal(module(x, experts, weights), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_may_be_offloaded(bias, dtype):
    """Its weights come with the call of each module."""
    gate = moe_ext.TopKGate(16, 4, k=2, drop_tokens=False, expert_bias=bias)
    layer = moe_ext.MOELayer(gate, moe_ext.GroupedExperts(4, 16, 8)).to(dtype).eval()
    x = torch.randn(6, 16, dtype=dtype)
    with torch.no_grad():
        expected = layer(x)
        accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
        assert layer.gate.wg.weight.is_meta
        assert torch.equal(layer(x), expected)


def test_an_offloaded_router_of_others_is_named():
    router = nn.Linear(16, 4, dtype=torch.bfloat16)
    gate = moe_ext.TopKGate(16, 4, router=router).eval()
    accelerate.cpu_offload(gate, execution_device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"Linear: weight is offloaded, and not torch.float32"):
        gate.route(torch.randn(3, 16))
