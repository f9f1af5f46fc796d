"""State dicts of processes that share experts, as parts of all experts' state dict.

torch.distributed.checkpoint writes and reads those: the same files whatever the number of processes
that share, one among them.

    state = get_model_state_dict(model)
    dcp.save(global_state(model, groups, state), checkpoint_id=folder)

Stacked parameters [E / processes, ...] become DTensors [E, ...] on the same memory; experts that
are modules of their own take their number among all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from .division import is_in, lists_of, shifted
from .groups import Groups, experts_of


def global_state(model: nn.Module, groups: Groups, state: dict[str, Any]) -> dict[str, Any]:
    """This process's part of all experts' state.

    state: {name: value} of the model, or of its optimizer in the flat form of
        torch.distributed.checkpoint.state_dict.get_optimizer_state_dict
    """
    entries = {entry.here: entry for entry in _entries(model)}
    return _converted(state, entries, lambda e: e.everywhere, lambda e, x: _as_global(e, groups, x))


def local_state(model: nn.Module, groups: Groups, state: dict[str, Any]) -> dict[str, Any]:
    """What `global_state` was made of: for load_state_dict, set_optimizer_state_dict."""
    entries = {entry.everywhere: entry for entry in _entries(model)}
    return _converted(state, entries, lambda e: e.here, lambda e, x: _as_local(e, groups, x))


class _Entry(NamedTuple):
    """A parameter or buffer of experts: its names in this process and among all experts."""

    here: str
    everywhere: str
    is_stacked: bool
    is_sharded: bool
    num_experts: int


def _entries(model: nn.Module) -> Iterator[_Entry]:
    for path, part in experts_of(model).items():
        lists, before = lists_of(part.experts_here()), f"{path}." if path else ""
        for name, tensor in (*part.named_parameters(), *part.named_buffers()):
            number = part.rank * part.num_local_experts
            everywhere = before + shifted(name, lists, number)
            kinds = not is_in(lists, name), isinstance(tensor, DTensor)
            yield _Entry(before + name, everywhere, *kinds, part.num_experts)


# Before and after a parameter's name in an optimizer's flat state.
_OPTIMIZER = re.compile(r"(state|param_groups)\.(.+)(\.[^.]+)")


def _converted(state: dict[str, Any], entries: dict[str, _Entry], rename, convert) -> dict:
    result = {}
    for key, value in state.items():
        match = _OPTIMIZER.fullmatch(key)
        before, name, after = ("", key, "")
        if key not in entries and match:
            before, name, after = f"{match[1]}.", match[2], match[3]
        if entry := entries.get(name):
            key = before + rename(entry) + after
            if entry.is_stacked and isinstance(value, Tensor) and value.dim() > 0:
                value = convert(entry, value)
        result[key] = value
    return result


def _as_global(entry: _Entry, groups: Groups, value: Tensor) -> Tensor:
    local = value.to_local() if entry.is_sharded else value
    shape = (entry.num_experts, *value.shape[1:])
    # Of one copy there are no shards: not all of torch can put those together.
    is_sharded = entry.is_sharded and groups.dp.size() > 1
    placements = [Shard(0)] * (groups.mesh.ndim - 1) + [Shard(0) if is_sharded else Replicate()]
    return _dtensor(local, groups.mesh, placements, shape)


def _as_local(entry: _Entry, groups: Groups, value: Tensor) -> Tensor:
    if not isinstance(value, DTensor):
        return value
    if not entry.is_sharded:
        return value.to_local()
    number = entry.num_experts * groups.dp.size() // groups.mesh.size()
    return _dtensor(value.to_local(), groups.mesh["dp"], [Shard(0)], (number, *value.shape[1:]))


def _dtensor(local: Tensor, mesh: DeviceMesh, placements: list, shape: tuple[int, ...]) -> DTensor:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=shape, stride=tuple(strides)
    )
