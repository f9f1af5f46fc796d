"""Convert a rank's state dict to its part of all experts' state dict, and back.

torch.distributed.checkpoint then writes the same files for any number of ranks that share the
experts, and loads them into any other number. docs/parallel.md has an example.

Stacked parameters [E_local, ...] become DTensors [E, ...] on the same memory. Experts that are
modules get their global number in their names.
"""

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
        groups: from `make_groups`
        state: {name: value} of the model, or of its optimizer in the flat form of
            torch.distributed.checkpoint.state_dict.get_optimizer_state_dict. Names of a wrapped
            model may have the wrapper's prefix or not.

    Raises:
        ValueError: the state has no name of the experts
    """
    return _converted(state, _entries(model, here=True), groups, _as_global)


def local_state(model: nn.Module, groups: Groups, state: dict[str, Any]) -> dict[str, Any]:
    """Invert `global_state`, for load_state_dict and set_optimizer_state_dict.

    Args:
        model: the model, wrapped or not
        groups: from `make_groups`
        state: the result of `global_state`, after dcp.load

    Raises:
        ValueError: the state has no name of the experts
    """
    return _converted(state, _entries(model, here=False), groups, _as_local)


class _Entry(NamedTuple):
    """A parameter or buffer of experts.

    old, new: its name in its module before and after the conversion
    """

    old: str
    new: str
    is_stacked: bool
    is_sharded: bool
    num_experts: int


def _entries(model: nn.Module, here: bool) -> dict[str, _Entry]:
    """The experts' tensors, by name in the model without wrappers' prefixes.

    here: names of this rank, otherwise those among all experts
    """
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


# A parameter's name within a key of an optimizer's flat state.
_OPTIMIZER = re.compile(r"(?:state|param_groups)\.(.+)\.[^.]+")
# The prefixes of DistributedDataParallel, torch.compile and checkpoint_wrapper.
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
                if not key[begin:end].endswith(old):  # a name without prefixes of inner wrappers
                    old, new = _unwrapped(old), _unwrapped(new)
                key = key[: end - len(old)] + new + key[end:]
                value = unmarked(value)
                if entry.is_stacked and isinstance(value, Tensor) and value.dim() > 0:
                    value = convert(entry, groups, value)
                has_any = True
                break
        result[key] = value
    if not has_any:
        raise ValueError(f"state must have the experts' names, such as {next(iter(entries))!r}")
    return result


def _as_global(entry: _Entry, groups: Groups, value: Tensor) -> Tensor:
    local: Tensor = value
    placement: Placement = Replicate()
    if isinstance(value, DTensor):
        local = value.to_local()
        # A single copy has no shards. Some of torch cannot gather Shard on a mesh dimension of 1.
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
        if groups.dp.size() > 1:  # a full state dict
            return value.to_local()
        placements = [Shard(0)]
    return _dtensor(value.to_local(), groups.mesh["dp"], placements, (number, *value.shape[1:]))


def _dtensor(local: Tensor, mesh: DeviceMesh, placements: list, shape: tuple[int, ...]) -> DTensor:
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
    )
