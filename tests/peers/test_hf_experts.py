"""experts_implementation="moe_ext" gives the results of "eager", on small models."""

import runpy
from pathlib import Path

import hf_models
import peft
import pytest
import torch
import transformers
from cases import relative_error
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations import moe

import moe_ext.hf

# The name differs between models.
EXPERTS = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 8)
DEEPSEEK = {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
QWEN = {"moe_intermediate_size": 16}
MODELS = {
    "mixtral": {},
    "qwen3_moe": QWEN,
    "deepseek_v3": DEEPSEEK | LATENT,
    "gpt_oss": {"num_experts_per_tok": 4},
    "olmoe": {},
    "qwen2_moe": QWEN | {"shared_expert_intermediate_size": 24},
    "glm4_moe": DEEPSEEK | {"n_shared_experts": 1},
}


def model_of(name: str, **options) -> nn.Module:
    model = hf_models.model_of(name, **EXPERTS | MODELS[name] | options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)
    return model


def tokens_of(rows=2, length=11) -> torch.Tensor:
    return torch.randint(3, hf_models.SIZES["vocab_size"], (rows, length))


def logits_and_grads(model: nn.Module, ids: torch.Tensor, implementation: str) -> list:
    model.set_experts_implementation(implementation)
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return [out.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def training_arguments(folder: Path, **options) -> "transformers.TrainingArguments":
    options = {"per_device_train_batch_size": 2, "learning_rate": 3e-3} | options
    options |= {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    return transformers.TrainingArguments(output_dir=str(folder), **options)


def assert_close(mine: list, theirs: list, tolerance=1e-5) -> None:
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert relative_error(one, other) < tolerance


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_eager(name):
    model, ids = model_of(name), tokens_of()
    assert moe_ext.hf.check(model) >= 1
    theirs = logits_and_grads(model, ids, "eager")
    mine = logits_and_grads(model, ids, "moe_ext")
    assert_close(mine, theirs)
    experts = [p for n, p in model.named_parameters() if "experts" in n and p.dim() == 3]
    assert experts
    assert all(p.grad.abs().sum() > 0 for p in experts)


def test_the_gate_of_gpt_oss_is_understood_with_its_constants():
    for options, expected in (
        ({}, "swiglu_oai"),
        ({"swiglu_limit": 5.0}, None),
        ({"swiglu_alpha": 1.0}, None),
    ):
        model = model_of("gpt_oss", **options)
        for _, experts in moe_ext.hf.experts_modules(model):
            assert moe_ext.hf.Layout(experts).activation == expected
        ids = tokens_of()
        assert_close(logits_and_grads(model, ids, "moe_ext"), logits_and_grads(model, ids, "eager"))


# Faults that the comparison above must see.
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


def test_compiled_generation_is_that_of_eager():
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
    routed = torch.randn(22, 64), torch.rand(22, 8).topk(2)[1], torch.rand(22, 2)
    compiled = torch.compile(blocks[0], fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(*routed), blocks[0](*routed)) < 1e-6
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_error(whole(input_ids=ids).logits, expected[0]) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_gradient_checkpointing_changes_no_bit(name):
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


def test_lora_on_expert_parameters_is_that_of_eager():
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
    data = [{"input_ids": ids, "labels": ids} for ids in tokens_of(2, 12)] * 4
    losses = []
    for implementation in ("eager", "moe_ext"):
        model = model_of("mixtral", output_router_logits=True)
        model.set_experts_implementation(implementation)
        arguments = training_arguments(tmp_path, max_steps=4, logging_steps=1)
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_the_finetuning_example_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path(__file__).parents[2] / "examples" / "finetune_mixtral.py"
    results = runpy.run_path(str(path))["main"](["--steps", "4", "--batch", "2", "--length", "32"])
    printed = capsys.readouterr().out
    losses = [losses for losses, _ in results.values()]
    assert list(results) == ["eager", "grouped_mm", "moe_ext"]
    assert all(len(each) == 4 for each in losses)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)
    assert printed.count("tokens/s") == 3
