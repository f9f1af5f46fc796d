"""Routers: modules that compute logits [T, E] from tokens [T, H], as an nn.Linear does.

`logits_of` runs a router in the dtype of the tokens, float32 or float64: weights are cast per call
and keep their own dtype. The routers of this file cast them in their `forward`, after the hooks by
which FSDP and accelerate bring weights. `logits_of` casts those of others before it calls them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.types import Device

from .. import options
from ..ops.autograd import Operator, keeps
from ..ops.checks import as_dtype


class LinearRouter(nn.Linear):
    """The router that a gate makes: an nn.Linear without bias, in the dtype of the tokens."""

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model_dim, num_experts, bias=False, device=device, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        bias: Tensor | None = self.bias  # which may be set later
        bias = None if bias is None else bias.to(tokens.dtype)
        return F.linear(tokens, as_dtype(self.weight, tokens.dtype), bias)


class CosineRouter(nn.Module):
    """A router by cosine similarity, for `TopKGate(router=...)` (X-MoE, arXiv 2204.09179).

    logits = cosine(proj(token), directions) / temperature, with the parameters proj.weight [P, H],
    directions [E, P] and log_scale [1] = log(1 / temperature).

    Args:
        model_dim: H
        num_experts: E
        proj_dim: P, the width of the projection
        temperature: its initial value; it is learned and stays at 0.01 or above
        device: of the parameters
        dtype: of the parameters

    Raises:
        ValueError: an argument is out of range
    """

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        proj_dim: int = 256,
        temperature: float = 0.5,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        H = options.integer("CosineRouter", "model_dim", model_dim, 0)
        E = options.integer("CosineRouter", "num_experts", num_experts, 1)
        P = options.integer("CosineRouter", "proj_dim", proj_dim, 1)
        options.numbers("CosineRouter", temperature=(temperature, 0.01, math.inf))
        self.temperature = temperature
        self.proj = LinearRouter(H, P, device=device, dtype=dtype)
        self.directions = nn.Parameter(torch.empty(E, P, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.proj.reset_parameters()
        nn.init.normal_(self.directions, std=0.01)
        nn.init.constant_(self.log_scale, -math.log(self.temperature))

    def forward(self, tokens: Tensor) -> Tensor:
        projected = self.proj(tokens)
        # eps bounds the gradient of a short token: without it, 1 / length.
        projected = F.normalize(projected, dim=-1, eps=1e-4)
        directions = F.normalize(self.directions.to(tokens.dtype), dim=-1)
        scale = self.log_scale.to(tokens.dtype).clamp(max=math.log(100)).exp()
        return F.linear(projected, directions) * scale


def _tensors_of(router: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and buffers, by name."""
    if router._modules:
        return dict(router.named_parameters()), dict(router.named_buffers())
    # The same of a module without others, as an nn.Linear, in a tenth of the time.
    return _once(router._parameters), _once(router._buffers)


def _once(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Each tensor under its first name."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor is not None:
            first.setdefault(id(tensor), (name, tensor))
    return dict(first.values())


_OWN = LinearRouter, CosineRouter
_FORWARDS = tuple(router.forward for router in _OWN)


def dtype_of_logits(router: nn.Module, tokens: Tensor) -> torch.dtype:
    """float64 where the tokens or a parameter are, else float32."""
    # router.parameters() searches for submodules, which takes longer than the rest.
    parameters = router.parameters() if router._modules else router._parameters.values()
    for tensor in (tokens, *parameters):
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


class WideProduct(Operator):
    """tokens @ weight.T of 16-bit numbers as float32, in one product: float32 holds the product of
    two of them exactly. [T, H], [E, H] -> [T, E]"""

    @staticmethod
    def forward(tokens, weight):
        return torch.mm(tokens, weight.t(), out_dtype=torch.float32)

    setup_context = staticmethod(keeps(2))

    @staticmethod
    def backward(ctx, grad):
        tokens, weight = ctx.saved_tensors
        grad_tokens = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_tokens = torch.mm(grad, weight.to(grad.dtype)).to(tokens.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.mm(grad.t(), tokens.to(grad.dtype)).to(weight.dtype)
        return grad_tokens, grad_weight


def is_wide_product(router: nn.Module, tokens: Tensor) -> bool:
    """Whether a router is one WideProduct of these tokens: a plain nn.Linear that nothing hooks
    into, in eager mode, on a GPU for which torch has that product."""
    return (
        tokens.is_cuda
        and tokens.dtype in (torch.bfloat16, torch.float16)
        and type(router) in (nn.Linear, LinearRouter)
        and router.bias is None
        and type(router.weight) is nn.Parameter
        and (router.weight.dtype, router.weight.device) == (tokens.dtype, tokens.device)
        and not _is_hooked(router)
        and not torch.compiler.is_compiling()
        and _has_wide_product(tokens)
    )


def _is_hooked(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        any(getattr(module, name) for name in names)
        or "forward" in module.__dict__  # as accelerate replaces it
        or nn.modules.module._has_any_global_hook()
    )


def _has_wide_product(tokens: Tensor) -> bool:
    if torch.version.cuda is None or torch.cuda.get_device_capability(tokens.device)[0] < 8:
        return False
    # torch refuses a float32 result of products that may be summed in float16.
    matmul = torch.backends.cuda.matmul
    return tokens.dtype != torch.float16 or not matmul.allow_fp16_accumulation


def logits_of(router: nn.Module, tokens: Tensor) -> Tensor:
    """Run a router with its weights in the dtype of the tokens.

    Raises RuntimeError where weights that must be cast before the call come with the call.
    """
    if isinstance(router, _OWN) and type(router).forward in _FORWARDS:
        return router(tokens)  # which casts them itself
    parameters, buffers = _tensors_of(router)
    other = {
        name: value.to(tokens.dtype)
        for name, value in (*parameters.items(), *buffers.items())
        if value.dtype != tokens.dtype and value.is_floating_point()
    }
    if not other:
        return router(tokens)
    away = [name for name, value in other.items() if value.is_meta and not tokens.is_meta]
    if away:
        raise RuntimeError(
            f"{type(router).__name__}: {away[0]} is offloaded, and not {tokens.dtype} as the "
            "tokens of a router are; keep the router in memory, or give it this dtype"
        )
    logits = functional_call(router, other, (tokens,))
    if router.training:  # buffers such as a BatchNorm's change
        with torch.no_grad():
            for name in buffers.keys() & other.keys():
                if buffers[name].itemsize < other[name].itemsize:
                    buffers[name].copy_(other[name])
    return logits
