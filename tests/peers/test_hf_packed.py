"""Loading of packed models by moe_ext.hf: options, interruptions, and what is refused."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch
import transformers
from hf_models import SIZES, model_of, shipped_by_gpt_oss

import moe_ext.hf
from moe_ext import QuantizedWeight
from moe_ext.hf import packed


def without(folder, part: str) -> None:
    """Take the tensors with this part in their names out of a checkpoint."""
    file = folder / "model.safetensors"
    state = safetensors.torch.load_file(file)
    kept = {name: tensor for name, tensor in state.items() if part not in name}
    assert len(kept) < len(state)
    safetensors.torch.save_file(kept, file, {"format": "pt"})


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_reaches_the_loader(tmp_path, name, dtype):
    shipped_by_gpt_oss(tmp_path)
    model = moe_ext.hf.from_pretrained(tmp_path, **{name: dtype})
    assert model.dtype == (torch.float32 if dtype == "auto" else dtype)


def test_a_dtype_reaches_the_text_of_a_larger_model(tmp_path):
    text = SIZES | {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    text |= {"shared_expert_intermediate_size": 32, "layer_types": ["full_attention"] * 2}
    config = transformers.AutoConfig.for_model("qwen3_5_moe", text_config=text)
    model = transformers.AutoModelForCausalLM.from_config(config.get_text_config())
    moe_ext.hf.quantize(model, "int8")
    model.save_pretrained(tmp_path)
    loaded = moe_ext.hf.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16


def test_a_configuration_is_used_and_left_as_it_is(tmp_path):
    shipped_by_gpt_oss(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.num_hidden_layers = 1
    before = config.to_dict()
    assert len(moe_ext.hf.from_pretrained(tmp_path, config=config).model.layers) == 1
    assert config.to_dict() == before


def test_a_configuration_may_say_that_there_is_no_format(tmp_path):
    model_of("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": None}))
    moe_ext.hf.from_pretrained(tmp_path, "int8")


@pytest.mark.parametrize(
    "part", ["layers.1.block_sparse_moe.experts.1.", "layers.1.block_sparse_moe.experts.3."]
)
def test_a_missing_expert_is_refused(tmp_path, part, caplog):
    model_of("mixtral").save_pretrained(tmp_path)
    without(tmp_path, part)
    with pytest.raises(RuntimeError, match="automatic conversion"):
        moe_ext.hf.from_pretrained(tmp_path, "int8")
    assert "gate_up_proj must be [4, 192, 64], the checkpoint has [3, 192, 64]" in caplog.text


def test_experts_of_another_size_are_refused(tmp_path, caplog):
    model_of("mixtral").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="automatic conversion"):
        moe_ext.hf.from_pretrained(tmp_path, "int8", intermediate_size=64)
    assert "gate_up_proj must be [4, 128, 64], the checkpoint has [4, 192, 64]" in caplog.text


ASKED = {
    ("mxfp4", 128): "packed with group_size 32, not 128",
    ("mxfp4", None, True): "packed with zero_points False, not True",
    ("int8",): "packed with format 'mxfp4', not 'int8'",
}


@pytest.mark.parametrize(("asked", "why"), ASKED.items(), ids=ASKED.values())
def test_what_a_packed_checkpoint_has_cannot_be_changed(tmp_path, asked, why):
    shipped_by_gpt_oss(tmp_path)
    format, group, zeros = (*asked, None, None)[:3]
    with pytest.raises(ValueError, match=why):
        moe_ext.hf.from_pretrained(tmp_path, format, group, zero_points=bool(zeros))


def test_another_quantisation_is_named(tmp_path):
    shipped_by_gpt_oss(tmp_path)
    file = tmp_path / "config.json"
    other = {"quantization_config": {"quant_method": "fp8"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | other))
    for args in ((), ("int8",)):
        with pytest.raises(ValueError, match="quantised by fp8, which moe_ext cannot read"):
            moe_ext.hf.from_pretrained(tmp_path, *args)


def test_threads_that_load_leave_the_loader_as_it_was(tmp_path):
    model_of("mixtral").save_pretrained(tmp_path)
    before = transformers.modeling_utils.safe_open
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(moe_ext.hf.from_pretrained, tmp_path, "int8") for _ in range(4)]
    assert all(len(load.result().model.layers) == 2 for load in loads)
    assert transformers.modeling_utils.safe_open is before


def test_an_interrupted_quantisation_is_ended_by_the_same_call(monkeypatch):
    model, ids = model_of("mixtral"), torch.randint(50, (2, 5))
    whole = model_of("mixtral")
    moe_ext.hf.quantize(whole, "int8")
    replaced, done = packed.replace_parameter, []

    def interrupted(module, name, weight):
        if len(done) == 2:
            raise MemoryError
        done.append(name)
        replaced(module, name, weight)

    monkeypatch.setattr(packed, "replace_parameter", interrupted)
    with pytest.raises(MemoryError):
        moe_ext.hf.quantize(model, "int8")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="quantized already"):
        moe_ext.hf.quantize(model, "int4", 32)
    assert moe_ext.hf.quantize(model, "int8") == 2
    assert torch.equal(model(ids).logits, whole(ids).logits)


def test_weights_that_are_elsewhere_are_not_lost():
    with torch.device("meta"):
        model = model_of("mixtral")
    with pytest.raises(ValueError, match=r"gate_up_proj is not in memory: .* without offloading"):
        moe_ext.hf.quantize(model, "int8")


def test_a_device_map_with_a_disk_is_refused(tmp_path):
    shipped_by_gpt_oss(tmp_path)
    with pytest.raises(ValueError, match="cannot put them on disk"):
        moe_ext.hf.from_pretrained(tmp_path, device_map={"": "disk"}, offload_folder=tmp_path)


def test_a_packed_model_runs_by_moe_ext_without_being_told(tmp_path):
    model, ids = model_of("qwen3_moe"), torch.randint(50, (2, 5))
    moe_ext.hf.quantize(model, "int8")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_reports_add_up_calls_and_bind_names():
    model = model_of("mixtral").model.layers[0].mlp
    _, experts = next(moe_ext.hf.experts_modules(model))
    x, ids = torch.randn(6, 64), torch.rand(6, 4).topk(2)[1]
    weights = torch.rand(6, 2)

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts, self.unused = experts, type(experts)(model_of("mixtral").config)

        def forward(self, both):
            for half in both:
                rows = slice(3 * half, 3 * half + 3)
                self.experts(x[rows], top_k_weights=weights[rows], top_k_index=ids[rows])

    twice = Twice()
    torch.nn.init.normal_(twice.unused.gate_up_proj)
    torch.nn.init.normal_(twice.unused.down_proj)
    found = moe_ext.hf.report(twice, "int4", 32, inputs=[0, 1])
    once = moe_ext.hf.report(Once(experts), "int4", 32, inputs=(x, ids, weights))
    assert [row.name for row in found] == ["experts", "unused"]
    assert found[0].output_errors == pytest.approx(once[0].output_errors, rel=1e-4, nan_ok=True)
    assert found[0].output_error == pytest.approx(once[0].output_error, rel=1e-4)
    assert found[1].output_errors == []


class Once(torch.nn.Module):
    def __init__(self, experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, args):
        return self.experts(*args)


def test_a_report_of_a_packed_model_is_refused_and_of_zeros_is_none():
    model = model_of("mixtral")
    _, experts = next(moe_ext.hf.experts_modules(model))
    with torch.no_grad():
        experts.gate_up_proj[2] = 0
        experts.down_proj[2] = 0
    (row, _) = moe_ext.hf.report(model, "int4", 32, inputs=torch.randint(50, (2, 9)))
    assert row.weight_errors[2] == 0
    assert 0 < row.weight_error < 0.2
    assert row.output_errors[2] == 0
    moe_ext.hf.quantize(model, "int8")
    assert isinstance(experts.gate_up_proj, QuantizedWeight)
    with pytest.raises(ValueError, match="quantized already"):
        moe_ext.hf.report(model, "int4", 32)
