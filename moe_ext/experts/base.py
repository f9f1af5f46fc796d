"""The experts: what happens to routed tokens."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .. import options
from ..ops.functional import combine, dispatch
from ..ops.plan import Plan


class Experts(nn.Module):
    """Base class. A simple expert defines `forward(rows, plan) -> rows`; one that gathers inside
    its GEMM, saves less or exchanges tokens between processes overrides `routed`.

    A subclass whose experts are modules in an nn.ModuleList names it in `expert_lists`; all other
    parameters are stacked, [E, ...]. ExpertParallel divides by that.

    Args:
        num_experts: E
    """

    expert_lists: tuple[str, ...] = ()

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = options.integer(type(self).__name__, "num_experts", num_experts, 1)

    def routed(self, tokens: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        """The weighted sum of every token's experts.

        Args:
            tokens: [T, H]
            plan: of the same T tokens
            weights: [T, K]

        Returns:
            [T, H]
        """
        rows = dispatch(tokens, plan)
        out = self(rows, plan)
        if shape_of(out) != list(rows.shape):
            raise RuntimeError(
                f"{type(self).__name__}: forward must return [R, H] = {list(rows.shape)}, "
                f"got {shape_of(out)}"
            )
        return combine(out, plan, weights)

    def routed_beside(
        self, work: Callable[[], Tensor], tokens: Tensor, plan: Plan, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`routed`, and what `work` gives, which needs nothing of it: experts that wait for other
        processes do it meanwhile.

        Args:
            work: a function of nothing
            tokens: as of `routed`
            plan: as of `routed`
            weights: as of `routed`

        Returns:
            (the output of `routed`, the output of `work`)
        """
        done = work()
        return self.routed(tokens, plan, weights), done

    def forward(self, rows: Tensor, plan: Plan) -> Tensor:
        """Every row through its expert.

        Args:
            rows: [R, H]
            plan: with the same R rows

        Returns:
            [R, H]; what empty rows give is not used
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(rows, plan) -> rows")


class ExpertParameters(nn.Module):
    """Marks its parameters as experts': `allreduce = False`, and the `group_name` of the ranks that
    share them. Optimizers for expert parallelism read both.

    marked: names of the parameters that do
    """

    expert_group_name: str | None
    marked: set[str]

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.register_load_state_dict_post_hook(_mark_again)

    def mark(self) -> None:
        self.marked = set()
        for name, parameter in self.named_parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.expert_group_name  # type: ignore[attr-defined]
            self.marked.add(name)

    # Copies, moved and assigned parameters are new ones, without marks.

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.mark()

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.mark()
        return self


def _mark_again(module: ExpertParameters, keys) -> None:
    module.mark()


def first_of(out):
    """An expert may return a tuple that begins with its output."""
    return out[0] if isinstance(out, tuple) and out else out


def shape_of(out) -> list[int] | str:
    """Of a tensor its shape, of anything else its type."""
    return list(out.shape) if isinstance(out, Tensor) else type(out).__name__
