"""Any modules as experts."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops import checks
from ..ops.plan import Plan
from ..ops.registry import is_exporting
from .base import Experts, check_shape, first_of


class ModuleExperts(Experts):
    """Any modules as experts, run one after the other on their own rows.

    Each call reads the experts' bounds back from the device: one synchronisation. torch.compile
    breaks its graph there (under checkpointing all of it runs eagerly); torch.export and the meta
    device raise. GroupedExperts has none of these limits.

    Args:
        module: a list of one module per expert, or one module to copy for every expert.
            A module maps [rows, H] to [rows, H], or to a tuple that begins with it; rows may be 0.
        num_experts: E; None takes the length of a list

    Raises:
        ValueError: module is neither, or num_experts is another number
    """

    expert_lists = ("experts",)

    def __init__(
        self, module: nn.Module | Sequence[nn.Module], num_experts: int | None = None
    ) -> None:
        if isinstance(module, (nn.ModuleList, list, tuple)):
            super().__init__(_number_of(module, num_experts))
            self.experts = nn.ModuleList(module)
            return
        if not isinstance(module, nn.Module):
            raise ValueError(
                "ModuleExperts: module must be an nn.Module, or a list of one per expert, "
                f"got {type(module).__name__}"
            )
        if num_experts is None:
            raise ValueError(
                "ModuleExperts: num_experts must be given beside one module, which is copied; "
                "a module per expert is a list"
            )
        super().__init__(num_experts)
        self.experts = nn.ModuleList(copy.deepcopy(module) for _ in range(num_experts))

    def forward(self, rows: Tensor, plan: Plan) -> Tensor:
        if rows.is_meta or is_exporting():
            raise RuntimeError(
                "ModuleExperts: the bounds of the experts are read back from the device, which "
                "torch.export and the meta device cannot; use GroupedExperts"
            )
        bounds = self._bounds(rows, plan)
        pieces = []
        done = 0
        for e, (begin, end) in enumerate(bounds):
            out = first_of(self.experts[e](rows[begin:end]))
            shape = end - begin, rows.shape[1]
            check_shape(f"ModuleExperts: expert {e} must return [rows, H]", out, shape)
            pieces += [out.new_zeros(begin - done, rows.shape[1]), out]
            done = end
        pieces.append(out.new_zeros(rows.shape[0] - done, rows.shape[1]))
        return torch.cat(pieces)

    def _bounds(self, rows: Tensor, plan: Plan) -> list[tuple[int, int]]:
        """The first and last row of every expert, checked as by `grouped_mm`."""
        check = checks.Check("ModuleExperts")
        R, E, offsets, load = plan.sources.shape[0], self.num_experts, plan.offsets, plan.load
        check.shape("rows", rows, [("R", R), ("H", None)], ("sources", plan.sources))
        check.shape("load", load, [("E", E)])
        check.dtype("load", load, torch.int32)
        check.same_device("load", load, "rows", rows)
        check.shape("offsets", offsets, [("E+1", E + 1)], ("load", load))
        check.dtype("offsets", offsets, torch.int32)
        check.same_device("offsets", offsets, "rows", rows)
        checks.planned_capacity(check, plan.capacity, R, E)
        return checks.owned_rows(check.op, offsets, load, R)


def refuse_list(owner: str, experts: object) -> None:
    """Raise ValueError for a list of modules in the place of experts."""
    if isinstance(experts, (nn.ModuleList, list, tuple)):
        raise ValueError(
            f"{owner}: moe_ext.ModuleExperts(experts) makes experts of a list of modules, "
            f"got {type(experts).__name__}"
        )


def _number_of(modules: nn.ModuleList | Sequence[nn.Module], num_experts: int | None) -> int:
    """The length of a list of distinct modules. Raises ValueError for any other list."""
    if len(modules) == 0:
        raise ValueError("ModuleExperts: module must hold one module or more, got an empty list")
    if num_experts not in (None, len(modules)):
        raise ValueError(
            f"ModuleExperts: num_experts must be {len(modules)}, the length of the list, or "
            f"None, got {num_experts!r}"
        )
    first: dict[int, int] = {}
    for e, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"ModuleExperts: expert {e} must be an nn.Module, got {type(module).__name__}"
            )
        if (other := first.setdefault(id(module), e)) != e:
            raise ValueError(
                f"ModuleExperts: experts must be different modules, but {other} and {e} are the "
                "same object, and would stay equal; make a new module for each"
            )
    return len(modules)
