"""Small models of transformers, and their checkpoints."""

import safetensors.torch
import torch
import transformers

from moe_ext import QuantizedWeight

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def model_of(name: str, **options):
    config = transformers.AutoConfig.for_model(name, **SIZES | options)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def shipped_by_gpt_oss(folder, **changes) -> None:
    """A checkpoint in gpt-oss's layout, with experts in MXFP4."""
    model = model_of("gpt_oss")
    state = {}
    for name, tensor in model.state_dict().items():
        if "experts" in name and name.endswith("_proj"):
            weight = QuantizedWeight.quantize(torch.randn_like(tensor).mT, "mxfp4")
            state[f"{name}_blocks"] = weight.values.unflatten(-1, (-1, 16)).contiguous()
            state[f"{name}_scales"] = weight.scales.detach().clone()
        else:
            state[name] = torch.randn_like(tensor) if "bias" in name else tensor
    for name, change in changes.items():
        key = f"model.layers.1.mlp.experts.{name}"
        state[key] = change(state[key])
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    model.config.quantization_config = {"quant_method": "mxfp4"}
    model.config.save_pretrained(folder)
