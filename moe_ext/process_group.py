"""A process group as a module's attribute."""

from __future__ import annotations

from typing import overload

import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group


def resolve(name) -> dist.ProcessGroup:
    return _resolve_process_group(name)


# As torch.compiler.assume_constant_result, which would import torch._dynamo: torch.compile cannot
# trace the lookup.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


class GroupAttribute:
    """An attribute that stores the group's name, so that the module can be copied and pickled."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}_name"

    @overload
    def __get__(self, module: None, owner: type) -> GroupAttribute: ...

    @overload
    def __get__(self, module: object, owner: type | None = None) -> dist.ProcessGroup | None: ...

    def __get__(self, module, owner=None):
        if module is None:
            return self
        name = module.__dict__.get(self.name)
        return None if name is None else resolve(name)

    def __set__(self, module, group: dist.ProcessGroup | None) -> None:
        module.__dict__[self.name] = None if group is None else group.group_name
