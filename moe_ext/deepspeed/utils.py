"""DeepSpeed's `deepspeed.moe.utils`: find experts' parameters for optimizers and gradient norms.

An expert's parameter has `allreduce = False` and the `group_name` of its ranks.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import engine
from .layer import MoE

_MOE = engine.their_class("layer", "MoE") or MoE  # moe_ext's MoE is a subclass


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """Whether a module contains an MoE, DeepSpeed's included, and the first one's num_experts."""
    for module in m.modules():
        if isinstance(module, _MOE):
            return True, module.num_experts  # type: ignore[return-value]
    return False, 0


def is_moe_param(param: Tensor) -> bool:
    """Whether the parameter belongs to an expert."""
    return not getattr(param, "allreduce", True)


def split_params_into_shared_and_expert_params(
    params: list[nn.Parameter],
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(shared parameters, experts' parameters)."""
    shared = [p for p in params if not is_moe_param(p)]
    return shared, [p for p in params if is_moe_param(p)]


def split_params_grads_into_shared_and_expert_params(
    group: list[nn.Parameter],
) -> tuple[list[Tensor], list[Tensor]]:
    """(shared gradients, experts' gradients), for parameters that have one."""
    shared, expert = split_params_into_shared_and_expert_params(group)
    return _grads(shared), _grads(expert)


def _grads(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad.to(p.dtype) for p in params if p.grad is not None]


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: dict[str, Any] | tuple[dict[str, Any], ...] | list[dict[str, Any]],
    max_group_size: int | float | None = 178956971,
) -> list[dict[str, Any]]:
    """Move the experts' parameters into optimizer groups of their own.

    param_groups: groups with "params" and "name"; they are not changed
    max_group_size: the largest number of elements in a group of experts, None for any; a larger
        parameter gets a group to itself

    Returns the given groups without experts' parameters, then for each given group and `group_name`
    {**group, "name": group_name, "moe": True} with the experts' parameters in their order.
    """
    if isinstance(param_groups, dict):
        param_groups = [param_groups]
    elif not isinstance(param_groups, tuple | list):
        raise ValueError(f"param_groups must be a dict, tuple or list, got {type(param_groups)}")
    kept, moved = [], []
    for group in param_groups:
        if "name" not in group:
            raise ValueError(f"param_groups must each have a name, got the keys {list(group)}")
        shared, expert = split_params_into_shared_and_expert_params(list(group["params"]))
        kept.append({**group, "params": shared})
        by_name: dict[str, list[nn.Parameter]] = {}
        for param in expert:
            by_name.setdefault(param.group_name, []).append(param)  # type: ignore[attr-defined]
        for name, params in by_name.items():
            for part in _parts(params, max_group_size):
                moved.append({**group, "name": name, "moe": True, "params": part})
    return kept + moved


def _parts(params: list[nn.Parameter], max_size: int | float | None) -> list[list[nn.Parameter]]:
    parts: list[list[nn.Parameter]] = []
    size = 0
    for param in params:
        # ds_numel is the whole size of a parameter that ZeRO has partitioned.
        numel = getattr(param, "ds_numel", param.numel())
        if not parts or (max_size is not None and size + numel > max_size):
            parts.append([])
            size = 0
        parts[-1].append(param)
        size += numel
    return parts


def is_moe_param_group(param_group: dict[str, Any]) -> bool:
    """Whether an optimizer group holds experts' parameters."""
    return param_group.get("moe", False)


def configure_moe_param_groups(model_parameters: list) -> list[dict[str, Any]]:
    """Separate experts in a list of parameters or optimizer groups.

    Groups that are separate already are returned unchanged.
    """
    if not isinstance(model_parameters, list) or not model_parameters:
        raise ValueError("model_parameters must be a list of parameters or of groups")
    for p in model_parameters:
        if not isinstance(p, torch.Tensor | dict):
            raise TypeError(f"model_parameters must hold tensors or dicts, got {type(p)}")
    if isinstance(model_parameters[0], dict):
        if any("moe" in group for group in model_parameters):
            return model_parameters
        return split_params_into_different_moe_groups_for_optimizer(model_parameters)
    group = {"params": model_parameters, "name": "dense-params"}
    return split_params_into_different_moe_groups_for_optimizer(group)
