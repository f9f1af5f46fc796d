"""Which part of a module's state is which expert's."""

import copy
import re
from collections.abc import Iterator

from torch import Tensor, nn


def lists_of(experts: nn.Module, num_experts: int) -> list[str]:
    """Names of the lists that hold one module for every expert."""
    return [
        name
        for name, module in experts.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_experts
    ]


def divide(experts: nn.Module, rank: int, size: int) -> nn.Module:
    """A copy of a module of experts with this process's part of them."""
    name = type(experts).__name__
    num_experts = getattr(experts, "num_experts", None)
    if not isinstance(num_experts, int):
        raise ValueError(f"ExpertParallel: experts must have num_experts, got {name}")
    if num_experts % size:
        raise ValueError(
            f"ExpertParallel: experts must divide evenly, got num_experts = {num_experts} for "
            f"{size} processes"
        )
    mine = slice(rank * num_experts // size, (rank + 1) * num_experts // size)
    lists = lists_of(experts, num_experts)
    # What the others have is not copied.
    memo: dict = {}
    for path in lists:
        modules = experts.get_submodule(path)
        memo[id(modules)] = nn.ModuleList(copy.deepcopy(module) for module in modules[mine])
    for parameter in _stacked(experts, lists, num_experts):
        part = nn.Parameter(parameter.detach()[mine].clone(), parameter.requires_grad)
        memo[id(parameter)] = part
    part = copy.deepcopy(experts, memo)
    part.num_experts = mine.stop - mine.start
    return part


def _stacked(experts: nn.Module, lists: list[str], num_experts: int) -> Iterator[Tensor]:
    for name, parameter in experts.named_parameters():
        if any(name.startswith(f"{path}.") for path in lists):
            continue
        if parameter.dim() == 0 or parameter.shape[0] != num_experts:
            raise ValueError(
                f"ExpertParallel: parameters must be of experts, [E, ...] with E = {num_experts}, "
                f"got {name} {list(parameter.shape)}"
            )
        yield parameter


def local_name(name: str, lists: list[str], shift: int) -> str:
    """The name with the number of its expert shifted."""
    for path in lists:
        if match := re.fullmatch(rf"({re.escape(path)}\.)(\d+)(\..*)", name):
            return f"{match[1]}{int(match[2]) + shift}{match[3]}"
    return name
