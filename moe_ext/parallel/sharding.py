"""Split a module of experts into the parts of each rank."""

import copy
import re
from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn


def lists_of(experts: nn.Module) -> tuple[str, ...]:
    """Names of the ModuleLists that hold one module per expert."""
    return getattr(experts, "expert_lists", ())


def divide(experts: nn.Module, rank: int, size: int) -> nn.Module:
    """Copy a module of experts with this rank's part of them."""
    name = type(experts).__name__
    num_experts = getattr(experts, "num_experts", None)
    if not isinstance(num_experts, int):
        raise ValueError(f"ExpertParallel: experts must have num_experts, got {name}")
    if num_experts % size:
        raise ValueError(
            f"ExpertParallel: experts must divide evenly, got num_experts = {num_experts} for "
            f"{size} ranks"
        )
    mine = slice(rank * num_experts // size, (rank + 1) * num_experts // size)
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
    divided.num_experts = mine.stop - mine.start  # type: ignore[assignment]
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
