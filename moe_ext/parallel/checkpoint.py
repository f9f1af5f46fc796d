"""Convert a rank's state dict to its part of all experts' state dict, and back.

torch.distributed.checkpoint then writes the same files for any number of ranks that share the
experts, and loads them into any other number. docs/parallel.md has an example.

Stacked parameters [E_local, ...] become DTensors [E, ...] on the same memory. A DTensor cannot
describe experts that do not divide evenly: they become ExpertRows. Experts that are modules get
their global number in their names.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from .groups import Groups, experts_of
from .misuse import unmarked
from .sharding import expert_range, is_in, lists_of, shifted


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


class ExpertRows(Tensor):
    """One rank's rows of a tensor [E, ...], as torch.distributed.checkpoint writes and reads them.

    local: the rows, on the memory of the parameter
    offset: of the rows' first element among all of them
    placement: of the rows among the copies of the experts

    It has the shape of all rows, and supports no operators but copies.
    """

    local: Tensor
    offset: torch.Size
    placement: Placement

    @staticmethod
    def __new__(cls, local: Tensor, shape: torch.Size, offset: torch.Size, placement: Placement):
        rows = Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        rows.local, rows.offset, rows.placement = local, offset, placement
        return rows

    # The names by which torch.distributed.checkpoint asks a tensor.

    def __create_write_items__(self, name: str, _: Tensor) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                MetadataIndex(name, self.offset),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        # FSDP may leave a rank without rows. Its offset is another rank's.
        return [ChunkStorageMetadata(self.offset, self.local.shape)] if self.local.numel() else []

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.local

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        rows, options = args[0], kwargs or {}
        if func is _aten.new_empty.default:
            local = rows.local.new_empty(rows.local.shape, **options)
        elif func in (_aten.detach.default, _aten.clone.default, _aten._to_copy.default):
            local = func(rows.local, *args[1:], **options)
        else:
            raise RuntimeError(
                f"moe_ext.parallel: {func} is not supported for a value of global_state, where "
                "experts do not divide evenly; pass the state to torch.distributed.checkpoint, or "
                "to local_state"
            )
        return cls(local, rows.shape, rows.offset, rows.placement)

    def __repr__(self, *, tensor_contents=None) -> str:  # type: ignore[override]
        return f"ExpertRows({list(self.shape)}, offset={list(self.offset)}, local={self.local})"


_aten = torch.ops.aten


class _Entry(NamedTuple):
    """A parameter or buffer of experts.

    old, new: its name in its module before and after the conversion
    ids: of this rank's experts
    """

    old: str
    new: str
    is_stacked: bool
    is_sharded: bool
    is_uneven: bool
    num_experts: int
    ids: range


def _entries(model: nn.Module, here: bool) -> dict[str, _Entry]:
    """The experts' tensors, by name in the model without wrappers' prefixes.

    here: names of this rank, otherwise those among all experts
    """
    entries = {}
    for path, part in experts_of(model).items():
        lists = lists_of(part.experts_here())
        ids = expert_range(part.num_experts, part.rank, part.size)
        for name, tensor in (*part.named_parameters(), *part.named_buffers()):
            names = name, shifted(name, lists, ids.start)
            old, new = names if here else reversed(names)
            is_uneven = part.num_experts % part.size > 0
            kinds = not is_in(lists, name), isinstance(tensor, DTensor), is_uneven
            full = _unwrapped(f"{path}.{old}" if path else old)
            entries[full] = _Entry(old, new, *kinds, part.num_experts, ids)
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
    shape = torch.Size((entry.num_experts, *value.shape[1:]))
    if entry.is_uneven:
        offsets = [0] * value.dim()
        if isinstance(value, DTensor):
            local, placement = value.to_local(), value.placements[-1]
            offsets = list(value.__create_chunk_list__()[0].offsets)
        offsets[0] += entry.ids.start
        return ExpertRows(local, shape, torch.Size(offsets), placement)
    if isinstance(value, DTensor):
        local = value.to_local()
        # A single copy has no shards. Some of torch cannot gather Shard on a mesh dimension of 1.
        placement = value.placements[-1] if groups.dp.size() > 1 else placement
    placements = [Shard(0)] * (groups.mesh.ndim - 1) + [placement]
    return _dtensor(local, groups.mesh, placements, shape)


def _as_local(entry: _Entry, groups: Groups, value: Tensor) -> Tensor:
    shape = (len(entry.ids), *value.shape[1:])
    if isinstance(value, ExpertRows):
        if value.placement == Replicate():
            return value.local
        return _dtensor(value.local, groups.mesh["dp"], [value.placement], shape)
    if not isinstance(value, DTensor):
        return value
    if not entry.is_sharded:
        return value.to_local()
    placements = list(value.placements[-1:])
    if placements == [Replicate()]:
        if groups.dp.size() > 1:  # a full state dict
            return value.to_local()
        placements = [Shard(0)]
    return _dtensor(value.to_local(), groups.mesh["dp"], placements, shape)


def _dtensor(local: Tensor, mesh: DeviceMesh, placements: list, shape: tuple[int, ...]) -> DTensor:
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
    )
