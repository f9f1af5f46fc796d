"""Models of transformers whose experts are frozen in 8 or 4 bits."""

import copy

import bench_loading
import pytest
import safetensors.torch
import torch
import transformers
from cases import relative_error
from hf_models import model_of, shipped_by_gpt_oss

import moe_ext.hf
from moe_ext import QuantizedWeight

MODELS = ["mixtral", "qwen3_moe", "gpt_oss"]
FORMATS = [("int8", {}), ("int4", {"group_size": 32, "zero_points": True}), ("mxfp4", {})]


def with_the_numbers(model, quantized):
    """The model with experts of the numbers that those of another stand for."""
    model = copy.deepcopy(model)
    for name, weight in quantized.named_modules():
        if isinstance(weight, QuantizedWeight):
            own = model.get_parameter(name)
            numbers = weight.dequantize(own.dtype)
            with torch.no_grad():
                own.copy_(numbers if numbers.shape == own.shape else numbers.mT)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("format", "options"), FORMATS)
def test_a_model_is_the_one_with_the_numbers(name, format, options):
    """Logits, gradients of what is not frozen, and generated tokens."""
    model = model_of(name)
    ids = torch.randint(50, (2, 9))
    quantized = copy.deepcopy(model)
    assert moe_ext.hf.quantize(quantized, format, **options) == 2
    expected = with_the_numbers(model, quantized)
    logits = quantized(ids).logits, expected(ids).logits
    assert relative_error(*logits) < 1e-5
    assert relative_error(logits[0], model(ids).logits) < 0.3
    weights = [
        {n: p for n, p in m.named_parameters() if "experts" not in n} for m in (quantized, expected)
    ]
    grads = [
        torch.autograd.grad(out.square().sum(), list(of.values()))
        for out, of in zip(logits, weights, strict=True)
    ]
    for one, other in zip(*grads, strict=True):
        assert relative_error(one, other) < 1e-4
    tokens = [m.generate(ids, max_new_tokens=3, do_sample=False) for m in (quantized, expected)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("format", "options"), [*FORMATS, ("nf4", {})])
def test_a_model_is_quantized_while_it_is_loaded(name, format, options, tmp_path):
    """The packed model is saved, and loads again as it is."""
    model = model_of(name, intermediate_size=128, moe_intermediate_size=128)
    model.save_pretrained(tmp_path / "whole")
    ids = torch.randint(50, (2, 9))
    moe_ext.hf.quantize(model, format, **options)
    expected = model(ids).logits
    loaded = moe_ext.hf.from_pretrained(tmp_path / "whole", format, **options)
    assert torch.equal(loaded(ids).logits, expected)
    loaded.save_pretrained(tmp_path / "packed")
    model.save_pretrained(tmp_path / "packed later")
    files = [(tmp_path / folder / "model.safetensors") for folder in ("packed", "whole")]
    assert files[0].stat().st_size < 0.6 * files[1].stat().st_size
    for folder in ("packed", "packed later"):
        again = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, experts_implementation="moe_ext"
        )
        assert torch.equal(again(ids).logits, expected)
        weights = [m for m in again.modules() if isinstance(m, QuantizedWeight)]
        assert len(weights) == 4
        for weight in weights:
            assert (weight.format, weight.values.dtype) == (format, torch.uint8)
            assert not any(p.requires_grad for p in weight.parameters())


def test_a_model_that_cannot_be_quantized_says_which_weight(tmp_path):
    model_of("mixtral", intermediate_size=80).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"experts.down_proj: .*rows of 80 numbers do not divide"):
        moe_ext.hf.from_pretrained(tmp_path, "int4", 32)
    model_of("llama", num_hidden_layers=1).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="model must have an experts module"):
        moe_ext.hf.from_pretrained(tmp_path / "dense", "int8")


def test_a_state_is_loaded_by_a_model_of_the_same_format():
    model = model_of("mixtral")
    moe_ext.hf.quantize(model, "int4", 32)
    other = model_of("mixtral")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    moe_ext.hf.quantize(other, "int4", 32)
    other.load_state_dict(model.state_dict())
    ids = torch.randint(50, (1, 5))
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert moe_ext.hf.check(model) == 2
    wrong = model_of("mixtral")
    moe_ext.hf.quantize(wrong, "int8")
    with pytest.raises(RuntimeError, match=r"experts\.down_proj: values must be"):
        wrong.load_state_dict(model.state_dict())


def test_an_error_changes_nothing():
    model = model_of("mixtral", intermediate_size=80)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"down_proj: .*rows of 80 numbers do not divide"):
        moe_ext.hf.quantize(model, "int4", 32)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    moe_ext.hf.quantize(model, "int8")
    with pytest.raises(ValueError, match=r"gate_up_proj is quantized already"):
        moe_ext.hf.quantize(model, "int8")


def test_mxfp4_of_gpt_oss_is_read_as_shipped(tmp_path):
    """Its logits are those of the numbers that transformers makes of it."""
    shipped_by_gpt_oss(tmp_path)
    wide = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.Mxfp4Config(dequantize=True)
    )
    ids = torch.randint(50, (2, 9))
    model = moe_ext.hf.from_pretrained(tmp_path)
    logits = model(ids).logits
    assert relative_error(logits, wide(ids).logits) < 1e-5
    bytes_of = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for name, weight in model.named_modules():
        if isinstance(weight, QuantizedWeight):
            assert torch.equal(weight.values, bytes_of[f"{name}_blocks"].flatten(-2))
            assert torch.equal(weight.scales, bytes_of[f"{name}_scales"])
    model.save_pretrained(tmp_path / "again")
    assert (
        bytes_of.keys()
        == safetensors.torch.load_file(tmp_path / "again" / "model.safetensors").keys()
    )
    for args in ((), ("mxfp4",)):
        again = moe_ext.hf.from_pretrained(tmp_path / "again", *args)
        assert torch.equal(again(ids).logits, logits)
    with pytest.raises(ValueError, match="packed with format 'mxfp4', not 'int4'"):
        moe_ext.hf.from_pretrained(tmp_path, "int4", 32)


def test_options_reach_the_configuration_of_gpt_oss(tmp_path):
    shipped_by_gpt_oss(tmp_path)
    model = moe_ext.hf.from_pretrained(
        tmp_path, activations="int8", num_hidden_layers=1, dtype=torch.bfloat16, device_map="cpu"
    )
    assert len(model.model.layers) == 1
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.experts.down_proj.activations == "int8"


def test_a_checkpoint_that_is_not_packed_needs_a_format(tmp_path):
    model_of("mixtral").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not packed: name a format of its experts"):
        moe_ext.hf.from_pretrained(tmp_path)


def nan_scale(scales: torch.Tensor) -> torch.Tensor:
    return scales.index_fill(1, torch.tensor([5]), 255)


WRONG = {
    "a missing tensor": ({"down_proj_blocks": lambda t: None}, "down_proj: .* not have all of it"),
    "a scale that is NaN": (
        {"gate_up_proj_scales": nan_scale},
        "gate_up_proj: scales must be finite and not zero, got 255 at",
    ),
    "a wrong size": (
        {"gate_up_proj_blocks": lambda t: t[:, :-2].clone()},
        "ignore_mismatched_sizes",
    ),
}


@pytest.mark.parametrize(("changes", "why"), WRONG.values(), ids=WRONG)
def test_a_wrong_checkpoint_is_refused(tmp_path, changes, why):
    shipped_by_gpt_oss(tmp_path, **changes)
    with pytest.raises((ValueError, RuntimeError), match=why):
        moe_ext.hf.from_pretrained(tmp_path)


def test_a_checkpoint_without_a_weight_is_refused(tmp_path):
    model_of("gpt_oss").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = safetensors.torch.load_file(file)
    del state["model.layers.1.mlp.experts.down_proj"]
    safetensors.torch.save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.down_proj: .* not have all of it"):
        moe_ext.hf.from_pretrained(tmp_path, "int8")


@pytest.mark.parametrize("packed", [False, True])
def test_a_truncated_checkpoint_is_refused(tmp_path, packed):
    model = model_of("mixtral")
    if packed:
        moe_ext.hf.quantize(model, "int8")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(safetensors.SafetensorError, match=r"[Ii]ncomplete"):
        moe_ext.hf.from_pretrained(tmp_path, "int8")


def test_a_load_takes_the_memory_of_the_packed_model_and_a_file():
    (load,) = bench_loading.measure(8, ["int4"], hidden=512, shard=100_000_000)
    assert load["packed"] < 0.29 * load["whole"]
    assert load["peak"] < load["limit"] < load["whole"]


@pytest.mark.parametrize("name", MODELS)
def test_the_report_has_the_errors_of_every_expert(name, tmp_path, capsys):
    model = model_of(name)
    ids = torch.randint(50, (2, 9))
    state = {n: p.clone() for n, p in model.state_dict().items()}
    calls = []
    path, experts = next(moe_ext.hf.experts_modules(model))
    hook = experts.register_forward_pre_hook(lambda module, args: calls.append(args))
    report = moe_ext.hf.report(model, "int4", 32, inputs=ids)
    hook.remove()
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())
    assert [layer.name for layer in report] == [p for p, _ in moe_ext.hf.experts_modules(model)]

    (args,) = calls
    model.set_experts_implementation("eager")
    with torch.no_grad():
        exact = experts(*args)
        whole = {n: getattr(experts, n).clone() for n in ("gate_up_proj", "down_proj")}
        moe_ext.hf.quantize(model, "int4", 32)
        row = report[0]
        assert row.output_error == pytest.approx(relative_error(experts(*args), exact), rel=1e-3)
        packed = {n: getattr(experts, n) for n in whole}
    assert row.bytes_before == sum(w.nbytes for w in whole.values())
    assert row.bytes_after == sum(w.nbytes for w in packed.values())
    numbers = {n: w.dequantize() for n, w in packed.items()}
    numbers = {n: w if w.shape == whole[n].shape else w.mT for n, w in numbers.items()}
    chosen = set(args[1].flatten().tolist())
    for e in range(4):
        one, other = (torch.cat([w[e].flatten() for w in of.values()]) for of in (numbers, whole))
        assert row.weight_errors[e] == pytest.approx(relative_error(one, other), rel=1e-4)
        assert (row.output_errors[e] == row.output_errors[e]) == (e in chosen)
    lines = str(report).splitlines()
    assert lines[2].startswith(path)
    assert lines[-1].startswith("total")
    report.plot(tmp_path / "errors.png")
    assert (tmp_path / "errors.png").stat().st_size > 10_000

    other = model_of(name)
    moe_ext.hf.quantize(other, "int4", 32, report=True, inputs={"input_ids": ids})
    assert str(report) in capsys.readouterr().out


def test_a_report_without_inputs_has_the_errors_of_weights(capsys):
    report = moe_ext.hf.report(model_of("mixtral"), "int8")
    assert all(layer.output_errors == [] for layer in report)
    assert all(0.001 < layer.weight_error < 0.01 for layer in report)
    assert report[0].worst(9)[0][1] == max(report[0].weight_errors)
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.gate_up_proj: .*do not divide"):
        moe_ext.hf.report(model_of("mixtral"), "int4", 128)
