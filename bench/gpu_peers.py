"""Layers and experts of libraries for GPUs, made of equal weights: `LAYERS` and `EXPERTS`.

As in layer_peers.py, `make(weights, routing)` gives a module, [T, H] -> [T, H].
"""

import torch
from layer_peers import Weights
from peers import Peer
from torch import Tensor, nn


class _Liger(nn.Module):
    def __init__(self, weights: Weights, expert_ids: Tensor) -> None:
        super().__init__()
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        self.function = LigerFusedMoEFunction
        self.expert_ids, self.router = expert_ids, nn.Parameter(weights.router.clone())
        self.up, self.down = nn.Parameter(weights.up.clone()), nn.Parameter(weights.down.clone())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.function.apply(tokens, self.up, self.down, self.expert_ids, self.router)


class _ScatterMoE(nn.Module):
    def __init__(self, weights: Weights, expert_ids: Tensor) -> None:
        super().__init__()
        from scattermoe.mlp import GLUMLP

        E, H, F = weights.down.shape
        self.experts = GLUMLP(H, F, E, expert_ids.shape[1]).to(weights.up)
        self.expert_ids = expert_ids.long()
        self.router = nn.Parameter(weights.router.to(weights.up.dtype))
        gate, linear = weights.up.chunk(2, dim=1)
        with torch.no_grad():
            self.experts.experts.weight.copy_(torch.cat([linear, gate], dim=1))
            self.experts.output_experts.weight.copy_(weights.down)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.experts(tokens, self.router, self.expert_ids)


class _SonicMoE(nn.Module):
    def __init__(self, weights: Weights, top_k: int) -> None:
        super().__init__()
        from sonicmoe import MoE
        from sonicmoe.enums import ActivationType

        E, H, F = weights.down.shape
        layer = MoE(E, top_k, H, F, ActivationType.SWIGLU, add_bias=False, std=0.02)
        self.layer = layer.to(weights.up)
        # Gates and the others take turns.
        up = torch.stack(weights.up.chunk(2, dim=1), dim=2).flatten(1, 2)
        with torch.no_grad():
            self.layer.router.weight.copy_(weights.router)
            self.layer.c_fc.weight.copy_(up)
            self.layer.c_proj.weight.copy_(weights.down)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens)[0]


LAYERS = [Peer("SonicMoE", "sonicmoe", _SonicMoE, gpu_only=True)]
EXPERTS = [
    Peer("Liger", "liger_kernel", _Liger, gpu_only=True),
    Peer("ScatterMoE", "scattermoe", _ScatterMoE, gpu_only=True),
]
