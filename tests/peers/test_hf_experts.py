"""experts_implementation="moe_ext" beside transformers' own, on small models of random weights."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from cases import relative_error
from torch import nn

pytest.importorskip("transformers", reason="needs the extra peers")

import transformers
from transformers import AutoModelForCausalLM
from transformers.integrations import moe

import moe_ext.hf

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEEPSEEK = {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
QWEN = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}
MODELS = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": QWEN,
    "deepseek_v3": DEEPSEEK | LATENT,
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 4},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "qwen2_moe": QWEN | {"shared_expert_intermediate_size": 24},
    "glm4_moe": DEEPSEEK | {"n_shared_experts": 1},
}


def config_of(name: str, **options):
    options = SIZES | MODELS[name] | {"use_cache": True} | options
    return transformers.AutoConfig.for_model(name, **options)


def model_of(name: str, dtype=torch.float32, **options) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name, **options), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)
    return model.eval()


def tokens_of(rows=2, length=11) -> torch.Tensor:
    return torch.randint(3, SIZES["vocab_size"], (rows, length))


def logits_and_grads(model: nn.Module, ids: torch.Tensor, implementation: str) -> list:
    model.set_experts_implementation(implementation)
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return [out.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_close(mine: list, theirs: list, tolerance=1e-5) -> None:
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert relative_error(one, other) < tolerance


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_every_gradient(name):
    model, ids = model_of(name), tokens_of()
    assert moe_ext.hf.check(model) >= 1
    theirs = logits_and_grads(model, ids, "eager")
    mine = logits_and_grads(model, ids, "moe_ext")
    assert_close(mine, theirs)
    experts = [p for n, p in model.named_parameters() if "experts" in n and p.dim() == 3]
    assert experts
    assert all(p.grad.abs().sum() > 0 for p in experts)


# What the comparison above must see.
@pytest.mark.parametrize("fault", ["no output", "no weights", "shifted experts"])
def test_the_comparison_sees_a_fault(fault, monkeypatch):
    def faulty(self, hidden_states, top_k_index, top_k_weights):
        if fault == "no weights":
            top_k_weights = torch.ones_like(top_k_weights)
        if fault == "shifted experts":
            top_k_index = (top_k_index + 1) % self.num_experts
        out = moe_ext.hf.experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return 0 * out if fault == "no output" else out

    monkeypatch.setitem(moe.ExpertsInterface._global_mapping, "moe_ext", faulty)
    model, ids = model_of("mixtral"), tokens_of()
    theirs = logits_and_grads(model, ids, "eager")[0]
    assert relative_error(logits_and_grads(model, ids, "moe_ext")[0], theirs) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_generation_is_the_same(name):
    model, ids = model_of(name), tokens_of(2, 5)
    produced = []
    for implementation in ("eager", "moe_ext"):
        model.set_experts_implementation(implementation)
        produced.append(model.generate(ids, max_new_tokens=8, do_sample=False))
    assert torch.equal(*produced)
    assert produced[0].shape[1] > 5


def test_generates_with_a_static_cache_compiled():
    torch._dynamo.reset()
    model, ids = model_of("mixtral"), tokens_of(1, 5)
    model.set_experts_implementation("eager")
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.set_experts_implementation("moe_ext")
    config = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True  # else transformers compiles on GPUs alone
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    options = {"cache_implementation": "static", "compile_config": config}
    out = model.generate(ids, max_new_tokens=6, do_sample=False, **options)
    assert torch.equal(out, expected)
    assert graphs["unique_graphs"] > before


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_transformers_models_compile_in_one_graph(name):
    torch._dynamo.reset()
    model, ids = model_of(name), tokens_of()
    expected = logits_and_grads(model, ids, "moe_ext")
    blocks = [b for _, b in moe_ext.hf.experts_modules(model)]
    experts, weights = torch.rand(22, 8).topk(2)[1], torch.rand(22, 2)
    x = torch.randn(22, 32)
    eager = blocks[0](x, experts, weights)
    compiled = torch.compile(blocks[0], fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x, experts, weights), eager) < 1e-6
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(whole(input_ids=ids).logits, expected[0]) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_gradient_checkpointing(name):
    model, ids = model_of(name), tokens_of()
    model.train()
    plain = logits_and_grads(model, ids, "moe_ext")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = logits_and_grads(model, ids, "moe_ext")
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_models_save_and_load(name, tmp_path):
    model, ids = model_of(name), tokens_of()
    model.set_experts_implementation("moe_ext")
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moe_ext")
    assert loaded.config._experts_implementation == "moe_ext"
    assert torch.equal(loaded(input_ids=ids).logits, expected)


def test_lora_on_expert_parameters():
    peft = pytest.importorskip("peft", reason="needs the extra peers")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(target_modules=[], target_parameters=names, r=4, lora_alpha=8)
    results = []
    for implementation in ("eager", "moe_ext"):
        model = peft.get_peft_model(model_of("mixtral"), config)
        torch.manual_seed(1)
        for n, p in model.named_parameters():
            if "lora_" in n:
                nn.init.normal_(p, std=0.1)
        results.append(logits_and_grads(model, tokens_of(1, 9).fill_(7), implementation))
        assert sum(p.requires_grad for p in model.parameters()) == len(results[-1]) - 1 > 0
    assert_close(*results[::-1])


def test_the_trainer_trains(tmp_path):
    pytest.importorskip("accelerate", reason="needs the extra peers")
    data = [{"input_ids": ids, "labels": ids} for ids in tokens_of(2, 12)] * 4
    losses = []
    for implementation in ("eager", "moe_ext"):
        model = model_of("mixtral", output_router_logits=True)
        model.set_experts_implementation(implementation)
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path,
            max_steps=4,
            per_device_train_batch_size=2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            learning_rate=3e-3,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


# The contract of one module, whatever the model.


class Module(nn.Module):
    """Experts under every flag: a plain module that the decorator has seen."""

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
    "tanh gelu": {"act_fn": transformers.activations.ACT2FN["gelu_pytorch_tanh"]},
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_every_flag_of_an_experts_module_is_understood(flags):
    module = module_of(**flags)
    args = routes_of()
    assert_close(run(module, "moe_ext", *args), run(module, "batched_mm", *args))


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_expert_parallel_sentinels(flags):
    """Choices of another process: no product, no share in the output or in any gradient."""
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


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("T", [0, 1, 2])
def test_few_tokens_give_the_same(flags, T):
    module = module_of(**flags)
    x, experts, weights = routes_of(T)
    mine = run(module, "moe_ext", x, experts, weights)
    assert mine[0].shape == (T, 12)
    if T:
        assert_close(mine, run(module, "batched_mm", x, experts, weights))
    else:
        assert all((grad == 0).all() for grad in mine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["default", "gpt-oss", "norm, bias"])
def test_16_bit_with_fixed_routing(name, dtype):
    """Within a few roundings of float64, as transformers' own are: the choice is given here, which
    whole models flip."""
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


def test_weights_of_the_routers_dtype():
    module = module_of()
    x, experts, weights = routes_of()
    module.config._experts_implementation = "moe_ext"
    out = module(x.bfloat16(), experts, weights.bfloat16())
    assert out.dtype == torch.bfloat16
    exact = module(x.bfloat16().float(), experts, weights.bfloat16().float())
    assert torch.equal(out, exact.bfloat16())


REFUSED = {
    "must have down_proj of 3 dimensions, has NoneType": lambda m: setattr(m, "down_proj", None),
    "has gate_up_proj in torch.int8": lambda m: setattr(
        m,
        "gate_up_proj",
        nn.Parameter(m.gate_up_proj.to(torch.int8), requires_grad=False),
    ),
    "must have gate_up_proj of num_experts = 6": lambda m: setattr(m, "num_experts", 6),
    "must have act_fn": lambda m: setattr(m, "act_fn", None),
    "has interleaved gates and no _apply_gate": lambda m: setattr(m, "is_concatenated", False),
    "must have gate_up_proj_bias of 2 dimensions": lambda m: setattr(m, "has_bias", True),
}


@pytest.mark.parametrize("why", REFUSED)
def test_unknown_flags_are_refused(why):
    module = module_of()
    REFUSED[why](module)
    module.config._experts_implementation = "moe_ext"
    with pytest.raises(ValueError, match=f'experts_implementation="moe_ext": Module {why}'):
        module(*routes_of())
    model = nn.ModuleDict({"mlp": module})
    with pytest.raises(ValueError, match=f"^mlp: .*{why}"):
        moe_ext.hf.check(model)


def test_check_refuses_a_model_without_experts():
    with pytest.raises(ValueError, match="Linear has no experts module"):
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


def test_a_subclass_of_an_activation_is_asked_itself():
    class Twice(nn.SiLU):
        def forward(self, x):
            return 2 * super().forward(x)

    module, args = module_of(Twice()), routes_of()
    assert_close(run(module, "moe_ext", *args), run(module, "batched_mm", *args))


def test_the_finetuning_example_runs(capsys, tmp_path, monkeypatch):
    pytest.importorskip("accelerate", reason="needs the extra peers")
    monkeypatch.chdir(tmp_path)
    path = Path(__file__).parents[2] / "examples" / "finetune_mixtral.py"
    example = runpy.run_path(str(path))
    results = example["main"](["--steps", "4", "--batch", "2", "--length", "32"])
    printed = capsys.readouterr().out
    losses = [losses for losses, _ in results.values()]
    assert list(results) == ["eager", "grouped_mm", "moe_ext"]
    assert all(len(each) == 4 for each in losses)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)
    assert printed.count("tokens/s") == 3
