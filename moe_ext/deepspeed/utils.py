"""Which parameters are experts', for optimizers and gradient norms: DeepSpeed's
`deepspeed.moe.utils`.

An expert's parameter carries `allreduce = False` and the `group_name` of its processes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import engine
from .layer import MoE

_MOE = engine.their_class("layer", "MoE") or MoE  # ours is one of theirs


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """Whether a module holds an MoE, DeepSpeed's too, and the number of experts of the first."""
    for module in m.modules():
        if isinstance(module, _MOE):
            return True, module.num_experts  # type: ignore[return-value]
    return False, 0


def is_moe_param(param: Tensor) -> bool:
    """Whether it belongs to an expert."""
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
    """(shared gradients, experts' gradients) of the parameters that have one."""
    shared, expert = split_params_into_shared_and_expert_params(group)
    return _grads(shared), _grads(expert)


def _grads(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad.to(p.dtype) for p in params if p.grad is not None]


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: dict[str, Any] | tuple[dict[str, Any], ...] | list[dict[str, Any]],
    max_group_size: int | float | None = 178956971,
) -> list[dict[str, Any]]:
    """Optimizer groups with the experts' parameters in groups of their own.

    param_groups: groups with "params" and "name"; they stay as they are
    max_group_size: numbers of parameters that a group of experts may hold, None for any; a larger
        parameter has a group to itself

    Returns the given groups without experts' parameters, then the experts': of every given group
    and `group_name` in the order of their parameters, {**group, "name": group_name, "moe": True}.
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
            of_group = by_name.setdefault(param.group_name, [])  # type: ignore[attr-defined]
            of_group.append(param)
        for name, params in by_name.items():
            for part in _parts(params, max_group_size):
                moved.append({**group, "name": name, "moe": True, "params": part})
    return kept + moved


def _parts(params: list[nn.Parameter], max_size: int | float | None) -> list[list[nn.Parameter]]:
    parts: list[list[nn.Parameter]] = []
    size = 0
    for param in params:
        # A parameter that ZeRO keeps in parts says its whole size.
        numel = getattr(param, "ds_numel", param.numel())
        if not parts or (max_size is not None and size + numel > max_size):
            parts.append([])
            size = 0
        parts[-1].append(param)
        size += numel
    return parts


def is_moe_param_group(param_group: dict[str, Any]) -> bool:
    """Whether an optimizer group is experts'."""
    return param_group.get("moe", False)


def configure_moe_param_groups(model_parameters: list) -> list[dict[str, Any]]:
    """Optimizer groups that keep experts apart, from a list of parameters or of groups; groups that
    are so already stay."""
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
