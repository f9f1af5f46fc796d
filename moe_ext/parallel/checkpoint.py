"""State dicts of processes that share experts, as parts of all experts' state dict.

torch.distributed.checkpoint writes and reads those: the same files whatever the number of processes
that share, one among them.

    state = get_model_state_dict(model)
    dcp.save(global_state(model, groups, state), checkpoint_id=folder)

Stacked parameters [E / processes, ...] become DTensors [E, ...] on the same memory; experts that
are modules of their own take their number among all.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from .division import lists_of, local_name
from .expert_parallel import ExpertParallel
from .groups import Groups, experts_of


def global_state(model: nn.Module, groups: Groups, state: dict[str, Any]) -> dict[str, Any]:
    """This process's part of all experts' state.

    state: {name: value} of the model, or of its optimizer in the flat form of
        torch.distributed.checkpoint.state_dict.get_optimizer_state_dict
    """
    return _converted(model, state, lambda part, value: _as_global(part, groups.mesh, value), 1)


def local_state(model: nn.Module, groups: Groups, state: dict[str, Any]) -> dict[str, Any]:
    """What `global_state` was made of: for load_state_dict, set_optimizer_state_dict."""
    return _converted(model, state, lambda part, value: _as_local(groups.mesh, value), -1)


def _converted(model: nn.Module, state: dict[str, Any], convert, direction: int) -> dict[str, Any]:
    parts = {
        name: (part, lists_of(part, part.num_local_experts))
        for name, part in experts_of(model).items()
    }
    result = {}
    for key, value in state.items():
        for name, (part, lists) in parts.items():
            before, found, rest = f".{key}".partition(f".{name}." if name else ".")
            if not found:
                continue
            shift = direction * part.rank * part.num_local_experts
            renamed = local_name(rest, lists, shift)
            key = (before + found + renamed)[1:]
            is_one_experts = any(rest.startswith(f"{path}.") for path in lists)
            if not is_one_experts and isinstance(value, Tensor):
                value = convert(part, value)
            break
        result[key] = value
    return result


def _as_global(part: ExpertParallel, mesh: DeviceMesh, value: Tensor) -> Tensor:
    if value.dim() == 0:
        return value  # as an optimizer's count of steps
    is_sharded = isinstance(value, DTensor)
    local = value.to_local() if is_sharded else value
    shape = (part.num_experts, *value.shape[1:])
    placements = [Shard(0)] * (mesh.ndim - 1) + [Shard(0) if is_sharded else Replicate()]
    stride = _contiguous(shape)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def _as_local(mesh: DeviceMesh, value: Tensor) -> Tensor:
    if not isinstance(value, DTensor) or value.device_mesh != mesh:
        return value
    local = value.to_local()
    if not isinstance(value.placements[-1], Shard):
        return local
    number = value.shape[0]
    for size in mesh.shape[:-1]:
        number //= size
    shape = (number, *value.shape[1:])
    copies = mesh["dp"]
    return DTensor.from_local(
        local, copies, [Shard(0)], run_check=False, shape=shape, stride=_contiguous(shape)
    )


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides)
