"""State dicts of ranks that share experts, as parts of all experts' state dict.

torch.distributed.checkpoint writes and reads those: the same files whatever the number of ranks
that share, one among them.

    state = get_model_state_dict(model)
    dcp.save(global_state(model, groups, state), checkpoint_id=folder)

Stacked parameters [E / processes, ...] become DTensors [E, ...] on the same memory; experts that
are modules of their own take their number among all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from .groups import Groups, experts_of
from .misuse import unmarked
from .sharding import is_in, lists_of, shifted


def global_state(model: nn.Module, groups: Groups, state: dict[str, Any]) -> dict[str, Any]:
    """Turn this rank's state dict into its part of all experts' state.

    Args:
        model: the model, wrapped or not
        groups: as of `make_groups`
        state: {name: value} of the model, or of its optimizer in the flat form of
            torch.distributed.checkpoint.state_dict.get_optimizer_state_dict. Names of a wrapped
            model are with or without what its wrapper adds.

    Raises:
        ValueError: the state has none of the experts' names
    """
    return _converted(state, _entries(model, here=True), groups, _as_global)


def local_state(model: nn.Module, groups: Groups, state: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `global_state`: for load_state_dict, set_optimizer_state_dict.

    Args:
        model: the model, wrapped or not
        groups: as of `make_groups`
        state: as `global_state` returned it, loaded since

    Raises:
        ValueError: the state has none of the experts' names
    """
    return _converted(state, _entries(model, here=False), groups, _as_local)


class _Entry(NamedTuple):
    """A parameter or buffer of experts.

    old, new: its name in its module, as it is and as it becomes
    """

    old: str
    new: str
    is_stacked: bool
    is_sharded: bool
    num_experts: int


def _entries(model: nn.Module, here: bool) -> dict[str, _Entry]:
    """By their names in the model, without what wrappers add; those in this process, or those among
    all experts."""
    entries = {}
    for path, part in experts_of(model).items():
        lists, first = lists_of(part.experts_here()), part.rank * part.num_local_experts
        for name, tensor in (*part.named_parameters(), *part.named_buffers()):
            names = name, shifted(name, lists, first)
            old, new = names if here else reversed(names)
            kinds = not is_in(lists, name), isinstance(tensor, DTensor)
            full = _unwrapped(f"{path}.{old}" if path else old)
            entries[full] = _Entry(old, new, *kinds, part.num_experts)
    return entries


# Before and after a parameter's name in an optimizer's flat state.
_OPTIMIZER = re.compile(r"(?:state|param_groups)\.(.+)\.[^.]+")
# Of DistributedDataParallel, torch.compile and checkpoint_wrapper.
_WRAPPERS = re.compile(r"^module\.|\b_orig_mod\.|\b_checkpoint_wrapped_module\.")


def _unwrapped(name: str) -> str:
    return _WRAPPERS.sub("", name)


def _converted(
    state: dict[str, Any], entries: dict[str, _Entry], groups: Groups, convert: Callable
) -> dict[str, Any]:
    result, has_any = {}, not entries
    for key, value in state.items():
        match = _OPTIMIZER.fullmatch(key)
        for begin, end in ((0, len(key)), match.span(1) if match else (0, 0)):
            if entry := entries.get(_unwrapped(key[begin:end])):
                old, new = entry.old, entry.new
                if not key[begin:end].endswith(old):  # a name without what wrappers inside add
                    old, new = _unwrapped(old), _unwrapped(new)
                key = key[: end - len(old)] + new + key[end:]
                value = unmarked(value)
                if entry.is_stacked and isinstance(value, Tensor) and value.dim() > 0:
                    value = convert(entry, groups, value)
                has_any = True
                break
        result[key] = value
    if not has_any:
        raise ValueError(f"state must have the experts' names, as {next(iter(entries))!r}")
    return result


def _as_global(entry: _Entry, groups: Groups, value: Tensor) -> Tensor:
    local: Tensor = value
    placement: Placement = Replicate()
    if isinstance(value, DTensor):
        local = value.to_local()
        # Of one copy there are no shards: not all of torch can put those together.
        placement = value.placements[-1] if groups.dp.size() > 1 else placement
    shape = (entry.num_experts, *value.shape[1:])
    placements = [Shard(0)] * (groups.mesh.ndim - 1) + [placement]
    return _dtensor(local, groups.mesh, placements, shape)


def _as_local(entry: _Entry, groups: Groups, value: Tensor) -> Tensor:
    if not isinstance(value, DTensor):
        return value
    if not entry.is_sharded:
        return value.to_local()
    number = entry.num_experts * groups.dp.size() // groups.mesh.size()
    placements = list(value.placements[-1:])
    if placements == [Replicate()]:
        if groups.dp.size() > 1:  # of a full state dict
            return value.to_local()
        placements = [Shard(0)]
    return _dtensor(value.to_local(), groups.mesh["dp"], placements, (number, *value.shape[1:]))


def _dtensor(local: Tensor, mesh: DeviceMesh, placements: list, shape: tuple[int, ...]) -> DTensor:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    )
