"""The base class of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from .. import options
from ..ops.checks import refuse_torchscript
from ..ops.checks import shape_of as shape_of
from ..ops.functional import combine, dispatch
from ..ops.plan import Plan


class Experts(nn.Module):
    """The base class of experts.

    Simple experts define `forward(rows, plan) -> rows`. Experts that gather inside their GEMM, save
    less or exchange tokens between ranks override `routed`. ExpertParallel divides modules in the
    nn.ModuleLists that `expert_lists` names, and the first dimension of all other parameters.

    Args:
        num_experts: E
    """

    __prepare_scriptable__ = refuse_torchscript
    expert_lists: tuple[str, ...] = ()

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = options.integer(type(self).__name__, "num_experts", num_experts, 1)

    def routed(self, tokens: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        """Compute the weighted sum of every token's experts.

        Args:
            tokens: [T, H]
            plan: for the same T tokens
            weights: [T, K]

        Returns:
            [T, H]
        """
        rows = dispatch(tokens, plan)
        out = self(rows, plan)
        check_shape(f"{type(self).__name__}: forward must return [R, H]", out, rows.shape)
        return combine(out, plan, weights)

    def routed_beside(
        self, work: Callable[[], Tensor], tokens: Tensor, plan: Plan, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run `routed` and independent `work`; experts overlap it with communication.

        Args:
            work: a function without arguments
            tokens: as for `routed`
            plan: as for `routed`
            weights: as for `routed`

        Returns:
            (routed(tokens, plan, weights), work())
        """
        done = work()
        return self.routed(tokens, plan, weights), done

    def forward(self, rows: Tensor, plan: Plan) -> Tensor:
        """Send every row through its expert.

        Args:
            rows: [R, H]
            plan: for the same R rows

        Returns:
            [R, H]; the values of empty rows are ignored
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(rows, plan) -> rows")


class ExpertParameters(nn.Module):
    """Marks its parameters as experts': `allreduce = False`, and the `group_name` of the ranks that
    share them. Optimizers for expert parallelism read both.

    marked: names of the marked parameters
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

    # Copied, moved and assigned parameters are new objects without marks.

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
    """The output of an expert, which may return a tuple that begins with it."""
    return out[0] if isinstance(out, tuple) and out else out


def check_shape(contract: str, out, shape: Sequence[int]) -> None:
    """Raise RuntimeError unless `out` is a tensor of this shape, as the contract says."""
    if shape_of(out) != list(shape):
        raise RuntimeError(f"{contract} = {list(shape)}, got {shape_of(out)}")
