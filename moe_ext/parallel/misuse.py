"""Refuse wrappers and checkpoints that mistake one rank's experts for copies of another's.

Divided experts have the same names on every rank, and the same shapes where they divide evenly.
Code that does not know of the division broadcasts, averages, shards or saves them as if they were
the same parameters.
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

instances: weakref.WeakValueDictionary[int, ExpertParallel] = weakref.WeakValueDictionary()  # by id


def begin_call(key: int) -> int:
    """Refuse unsuitable wrappers, and return the layer's number.

    key: the id of an ExpertParallel. Compiled code calls this once, while torch.compile traces.

    Raises RuntimeError inside a forward of plain DistributedDataParallel, FullyShardedDataParallel
    or fully_shard, and for a copy that was made on another rank.
    """
    experts = instances[key]
    _refuse_ddp(experts)
    _refuse_fsdp(experts)
    _refuse_fsdp1(experts)
    state = experts.communicator.state
    is_new = experts not in state.layer_numbers
    if is_new and experts.communicator.current_rank() != experts.rank:
        raise RuntimeError(
            f"ExpertParallel: this copy holds the experts of rank {experts.rank} of "
            f"{experts.size}, and was loaded on another rank. Save a whole module on each rank "
            "and load each rank's own, or save and load with moe_ext.parallel.global_state and "
            "local_state"
        )
    return state.number_of(experts)


# As torch.compiler.assume_constant_result, which would import torch._dynamo.
begin_call._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _wrap_by(function: str) -> str:
    return f"Rebuild the model and wrap it by moe_ext.parallel.{function}(model, groups)"


def _refuse_ddp(experts: ExpertParallel) -> None:
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None or hasattr(ddp, "reduces_experts"):  # set by parallel.data_parallel
        return
    averaged = set(dist.get_process_group_ranks(ddp.process_group))
    if all(len(averaged.intersection(ranks)) < 2 for ranks in experts.communicator.global_ranks()):
        return
    mine = {id(parameter) for parameter in experts.parameters()}
    for name, parameter in ddp.module.named_parameters():
        if id(parameter) in mine and name not in ddp.parameters_to_ignore:
            raise RuntimeError(
                f"ExpertParallel: DistributedDataParallel treats {name} as equal on ranks that "
                "hold different experts: it has overwritten them with one rank's, and would "
                f"average their gradients. {_wrap_by('data_parallel')}"
            )


def _refuse_fsdp(experts: ExpertParallel) -> None:
    if isinstance(experts, FSDPModule):
        if not experts.average:
            raise RuntimeError(
                "ExpertParallel: fully_shard must shard experts over the ranks that hold the same "
                f"ones and average their gradients over all ranks. {_wrap_by('fully_shard')}"
            )
        return
    # FSDP replaces all parameters by its own, so that checking one suffices.
    if not _is_replaced(next(experts.parameters(), None)):
        return
    for name, parameter in experts.named_parameters():
        if name in experts.marked and _is_replaced(parameter):
            raise RuntimeError(
                f"ExpertParallel: {name} of the experts was replaced by another parameter. Plain "
                "fully_shard does so and mixes the experts of different ranks. "
                f"{_wrap_by('fully_shard')}. If you replaced it yourself, call experts.mark()"
            )


def _refuse_fsdp1(experts: ExpertParallel) -> None:
    # It replaces all parameters by views of one, so that checking one suffices.
    for name in itertools.islice(experts.marked, 1):
        path, _, last = name.rpartition(".")
        tensor = getattr(experts.get_submodule(path), last, None)
        if tensor is None or hasattr(getattr(tensor, "_base", None), "_is_flat_param"):
            raise RuntimeError(
                f"ExpertParallel: FullyShardedDataParallel treats {name} as equal on ranks that "
                f"hold different experts. {_wrap_by('fully_shard')}"
            )


def _is_replaced(parameter: Tensor | None) -> bool:
    # torch.func replaces parameters by plain tensors, which are no reason to refuse.
    return type(parameter) is nn.Parameter and not hasattr(parameter, "group_name")


RANK = "expert_parallel_rank"  # in a state dict's metadata: [rank, size]


def mark_state(
    experts: ExpertParallel, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """Mark a state dict's tensors as one rank's experts. A state-dict hook.

    torch.distributed.checkpoint asks a tensor how to write and read it, and would treat a plain one
    as equal on all ranks. The metadata records the rank.
    """
    if experts.size == 1:
        return
    metadata[RANK] = [experts.rank, experts.size]
    for key, value in state.items():
        # keep_vars gives parameters, which outlive the state dict.
        if not key.startswith(prefix) or isinstance(value, nn.Parameter):
            continue
        if isinstance(value, Tensor):
            value.__create_write_items__ = _refuse_checkpoint  # type: ignore[attr-defined]
            value.__create_chunk_list__ = _refuse_checkpoint  # type: ignore[attr-defined]
            if type(value) is Tensor:
                # torch.save stores this beside the values: nothing, instead of the marks.
                value.__getstate__ = dict  # type: ignore[attr-defined]


def unmarked(value: Any) -> Any:
    """Return the tensor without the marks of `mark_state`."""
    return value.detach() if isinstance(value, Tensor) else value


def refuse_state(experts: ExpertParallel, metadata: dict[str, Any]) -> None:
    """Raise RuntimeError for a state dict of another rank's experts."""
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
        f"ExpertParallel: {name} holds the experts of one rank, and torch.distributed.checkpoint "
        "would treat it as equal on all ranks. Pass it "
        "moe_ext.parallel.global_state(model, groups, state)"
    )


# torch.save stores the marks of a DTensor. torch.load must accept them with weights_only=True.
torch.serialization.add_safe_globals([_refuse_checkpoint])
