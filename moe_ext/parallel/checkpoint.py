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
    return _converted(state, entries, lambda e: e.here, lambda e, x: _as_local(groups, x))


class _Entry(NamedTuple):
    """A parameter or buffer of experts: its names in this process and among all experts."""

    here: str
    everywhere: str
    is_stacked: bool
    num_experts: int


def _entries(model: nn.Module) -> Iterator[_Entry]:
    for path, part in experts_of(model).items():
        lists, before = lists_of(part.experts_here()), f"{path}." if path else ""
        for name, _ in (*part.named_parameters(), *part.named_buffers()):
            number = part.rank * part.num_local_experts
            everywhere = before + shifted(name, lists, number)
            yield _Entry(before + name, everywhere, not is_in(lists, name), part.num_experts)


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
    mesh, is_sharded = groups.mesh, isinstance(value, DTensor)
    local = value.to_local() if is_sharded else value
    shape = (entry.num_experts, *value.shape[1:])
    placements = [Shard(0)] * (mesh.ndim - 1) + [Shard(0) if is_sharded else Replicate()]
    stride = _contiguous(shape)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def _as_local(groups: Groups, value: Tensor) -> Tensor:
    mesh = groups.mesh
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
