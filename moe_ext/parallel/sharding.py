"""Split a module of experts into the parts of each rank."""

import copy
import re
from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from ..experts.base import Experts


def lists_of(experts: nn.Module) -> tuple[str, ...]:
    """Names of the ModuleLists that hold one module per expert."""
    return getattr(experts, "expert_lists", ())


def expert_range(num_experts: int, rank: int, size: int) -> range:
    """The ids of a rank's experts. Ranks differ by one expert at most; the first ones have more.

    Raises ValueError for more ranks than experts.
    """
    if num_experts < size:
        raise ValueError(
            f"ExpertParallel: every rank needs an expert, got num_experts = {num_experts} for "
            f"{size} ranks. Let {num_experts} ranks or fewer share them, such as by "
            "make_groups(ep=), which gives other ranks copies"
        )
    fewer, ranks_with_more = divmod(num_experts, size)
    begin = rank * fewer + min(rank, ranks_with_more)
    return range(begin, begin + fewer + (rank < ranks_with_more))


def check_part(
    experts: nn.Module, num_local_experts: int, num_experts: int, rank: int, size: int
) -> None:
    """Raise ValueError unless `experts` can be a rank's part of all experts."""
    expected = len(expert_range(num_experts, rank, size))
    if num_local_experts != expected:
        raise ValueError(
            f"ExpertParallel: rank {rank} of {size} must hold {expected} of num_experts = "
            f"{num_experts}, got {num_local_experts}. ExpertParallel.of takes all experts and "
            "keeps each rank's part"
        )
    if num_experts % size and not isinstance(experts, Experts):
        raise ValueError(
            "ExpertParallel: experts that take capacity buffers must divide evenly, got "
            f"num_experts = {num_experts} for {size} ranks and {type(experts).__name__}. "
            "moe_ext.Experts, such as ModuleExperts, may divide unevenly"
        )


def divide(experts: nn.Module, rank: int, size: int) -> nn.Module:
    """Copy a module of experts with this rank's part of them."""
    name = type(experts).__name__
    num_experts = getattr(experts, "num_experts", None)
    if not isinstance(num_experts, int):
        raise ValueError(f"ExpertParallel: experts must have num_experts, got {name}")
    ids = expert_range(num_experts, rank, size)
    mine = slice(ids.start, ids.stop)
    lists = lists_of(experts)
    # deepcopy skips what memo holds: the parts of other ranks are never copied.
    memo: dict = {}
    for path in lists:
        modules = cast(nn.ModuleList, experts.get_submodule(path))
        memo[id(modules)] = nn.ModuleList(copy.deepcopy(module) for module in modules[mine])
    for tensor in _stacked(experts, lists, num_experts):
        part = tensor.detach()[mine].clone()
        if isinstance(tensor, nn.Parameter):
            part = nn.Parameter(part, tensor.requires_grad)
        memo[id(tensor)] = part
    divided = copy.deepcopy(experts, memo)
    # torch's stubs know tensors and modules alone as a module's attributes.
    divided.num_experts = len(ids)  # type: ignore[assignment]
    return divided


def _stacked(experts: nn.Module, lists: tuple[str, ...], num_experts: int) -> Iterator[Tensor]:
    for name, tensor in (*experts.named_parameters(), *experts.named_buffers()):
        if is_in(lists, name):
            continue
        if tensor.dim() == 0 or tensor.shape[0] != num_experts:
            raise ValueError(
                "ExpertParallel: parameters and buffers must be stacked [E, ...] with E = "
                f"{num_experts}, got {name} {list(tensor.shape)}"
            )
        yield tensor


def is_in(lists: tuple[str, ...], name: str) -> bool:
    return any(name.startswith(f"{path}.") for path in lists)


def shifted(name: str, lists: tuple[str, ...], shift: int) -> str:
    """Add `shift` to the expert number in a name."""
    for path in lists:
        if match := re.fullmatch(rf"({re.escape(path)}\.)(\d+)(\..*)", name):
            return f"{match[1]}{int(match[2]) + shift}{match[3]}"
    return name
