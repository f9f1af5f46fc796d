"""Refuse wrappers and checkpoints that take one rank's experts for copies of another's.

Divided experts have the same names and shapes on every rank. What knows nothing of their division
broadcasts, averages, shards or saves them as if they were the same parameters.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from .expert_parallel import ExpertParallel

_members: weakref.WeakValueDictionary[int, ExpertParallel] = weakref.WeakValueDictionary()


def remember(experts: ExpertParallel) -> None:
    _members[id(experts)] = experts


def begin_call(key: int) -> int:
    """Refuse wrappers, and give the layer's number.

    key: the id of an ExpertParallel. Compiled code calls this once, while torch.compile traces.

    Raises RuntimeError inside a forward of plain DistributedDataParallel, FullyShardedDataParallel
    or fully_shard, and for a copy that another rank made.
    """
    experts = _members[key]
    _refuse_ddp(experts)
    _refuse_fsdp(experts)
    _refuse_fsdp1(experts)
    state = experts.communicator.state
    if experts not in state.layer_numbers:
        _refuse_other_rank(experts)
    return state.number_of(experts)


# As of torch.compiler.assume_constant_result, which would load all of torch._dynamo.
begin_call._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refuse_ddp(experts: ExpertParallel) -> None:
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None or hasattr(ddp, "reduces_experts"):  # as parallel.data_parallel leaves it
        return
    averaged = set(dist.get_process_group_ranks(ddp.process_group))
    if all(len(averaged.intersection(ranks)) < 2 for ranks in experts.communicator.global_ranks()):
        return
    mine = {id(parameter) for parameter in experts.parameters()}
    for name, parameter in ddp.module.named_parameters():
        if id(parameter) in mine and name not in ddp.parameters_to_ignore:
            raise RuntimeError(
                f"ExpertParallel: DistributedDataParallel takes {name} for the same on ranks that "
                "hold different experts: it has copied one rank's over the others', and would "
                "average their gradients. Build the model anew and wrap it by "
                "moe_ext.parallel.data_parallel(model, groups)"
            )


def _refuse_fsdp(experts: ExpertParallel) -> None:
    if isinstance(experts, FSDPModule):
        if not experts.average:
            raise RuntimeError(
                "ExpertParallel: fully_shard must shard experts over the ranks that hold the same "
                "ones and average their gradients over all ranks. Build the model anew and wrap it "
                "by moe_ext.parallel.fully_shard(model, groups)"
            )
        return
    # FSDP computes with parameters of its own making. It replaces all of them: one tells.
    if not _is_replaced(next(experts.parameters(), None)):
        return
    for name, parameter in experts.named_parameters():
        if name in experts.marked and _is_replaced(parameter):
            raise RuntimeError(
                f"ExpertParallel: {name} of the experts was replaced by another parameter. Plain "
                "fully_shard does so and mixes the experts of different ranks: build the model "
                "anew and wrap it by moe_ext.parallel.fully_shard(model, groups). If you replaced "
                "it yourself, call experts.mark()"
            )


def _refuse_fsdp1(experts: ExpertParallel) -> None:
    # It puts views of one flat parameter in the place of all: one tells.
    for name in itertools.islice(experts.marked, 1):
        path, _, last = name.rpartition(".")
        tensor = getattr(experts.get_submodule(path), last, None)
        if tensor is None or hasattr(getattr(tensor, "_base", None), "_is_flat_param"):
            raise RuntimeError(
                f"ExpertParallel: FullyShardedDataParallel takes {name} for the same on ranks that "
                "hold different experts. Build the model anew and wrap it by "
                "moe_ext.parallel.fully_shard(model, groups)"
            )


def _refuse_other_rank(experts: ExpertParallel) -> None:
    if experts.communicator.current_rank() != experts.rank:
        raise RuntimeError(
            f"ExpertParallel: this copy holds the experts of rank {experts.rank} of "
            f"{experts.size}, and was loaded on another rank. Save a whole module on each rank "
            "and load each rank's own, or save and load with moe_ext.parallel.global_state and "
            "local_state"
        )


def _is_replaced(parameter: Tensor | None) -> bool:
    # torch.func puts plain tensors in the place of parameters.
    return type(parameter) is nn.Parameter and not hasattr(parameter, "group_name")


RANK = "expert_parallel_rank"  # in a state dict's metadata: [rank, size]


def mark_state(
    experts: ExpertParallel, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """A state-dict hook: tensors of experts say that they are a part.

    torch.distributed.checkpoint asks a tensor how to write and to read it, and would take a plain
    one for the same on all ranks. A state dict's metadata remembers the rank it is of.
    """
    if experts.size == 1:
        return
    metadata[RANK] = [experts.rank, experts.size]
    for key, value in state.items():
        # Parameters, as keep_vars gives them, outlive the state dict.
        if not key.startswith(prefix) or isinstance(value, nn.Parameter):
            continue
        if isinstance(value, Tensor):
            value.__create_write_items__ = _refuse_checkpoint  # type: ignore[attr-defined]
            value.__create_chunk_list__ = _refuse_checkpoint  # type: ignore[attr-defined]
            if type(value) is Tensor:
                value.__getstate__ = _no_attributes  # type: ignore[attr-defined]


def unmarked(value: Any) -> Any:
    """The same tensor without the marks of `mark_state`."""
    return value.detach() if isinstance(value, Tensor) else value


def refuse_state(experts: ExpertParallel, metadata: dict[str, Any]) -> None:
    """Raises RuntimeError for a state dict of another rank's experts."""
    here = [experts.rank, experts.size]
    if metadata.get(RANK, here) != here:
        rank, size = metadata[RANK]
        raise RuntimeError(
            f"ExpertParallel: the state dict holds the experts of rank {rank} of {size}, and this "
            f"is rank {here[0]} of {here[1]}. Load each rank's own, or save and load with "
            "moe_ext.parallel.global_state and local_state"
        )


def _refuse_checkpoint(name: str = "a parameter", *args) -> NoReturn:
    raise RuntimeError(
        f"ExpertParallel: {name} holds experts of one rank alone, and torch.distributed.checkpoint "
        "would take it for the same on all ranks. Pass it "
        "moe_ext.parallel.global_state(model, groups, state)"
    )


def _no_attributes() -> dict:
    """What torch.save stores beside a tensor's values."""
    return {}


# A sharded tensor's attributes are saved with it.
torch.serialization.add_safe_globals([_refuse_checkpoint])
