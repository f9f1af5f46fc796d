"""The experts: what happens to routed tokens."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import options
from ..ops import checks, reference
from ..ops.functional import combine, dispatch
from ..ops.plan import Plan, make_plan
from ..ops.registry import is_exporting


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


class ModuleExperts(Experts):
    """Any modules as experts, run one after the other on their own rows.

    The bounds of the experts are read back from the device: one synchronisation per call. There
    torch.compile breaks its graph (under checkpointing all of it runs eagerly), and torch.export
    and the meta device raise: use GroupedExperts.

    Args:
        module: an nn.ModuleList of one module per expert, which are used as they are; or one
            module, of which every expert is a copy. A module maps [rows, H] to [rows, H], or to a
            tuple that begins with it, and is called with no row too.
        num_experts: E; for an nn.ModuleList its length, or None

    Raises:
        ValueError: module is neither, or num_experts does not fit
    """

    expert_lists = ("experts",)

    def __init__(self, module: nn.Module, num_experts: int | None = None) -> None:
        if isinstance(module, nn.ModuleList):
            super().__init__(_number_of(module, num_experts))
            self.experts = nn.ModuleList(module)
            return
        if not isinstance(module, nn.Module):
            raise ValueError(
                "ModuleExperts: module must be an nn.Module, or an nn.ModuleList of one per "
                f"expert, got {type(module).__name__}"
            )
        if num_experts is None:
            raise ValueError(
                "ModuleExperts: num_experts must be given beside one module, which is copied; "
                "a module per expert is an nn.ModuleList"
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
            if shape_of(out) != [end - begin, rows.shape[1]]:
                raise RuntimeError(
                    f"ModuleExperts: expert {e} must return [rows, H] = "
                    f"{[end - begin, rows.shape[1]]}, got {shape_of(out)}"
                )
            pieces += [out.new_zeros(begin - done, rows.shape[1]), out]
            done = end
        pieces.append(out.new_zeros(rows.shape[0] - done, rows.shape[1]))
        return torch.cat(pieces)

    def _bounds(self, rows: Tensor, plan: Plan) -> list[tuple[int, int]]:
        """The rows of every expert, with the contract of `grouped_mm`."""
        op = "ModuleExperts"
        check = checks.Check(op)
        R, E = plan.sources.shape[0], self.num_experts
        check.shape("rows", rows, [("R", R), ("H", None)], ("sources", plan.sources))
        check.shape("load", plan.load, [("E", E)])
        checks.groups(check, "rows", rows, plan.offsets, plan.load)
        checks.planned_capacity(check, plan.capacity, R, E)
        return reference.owned_rows(op, plan.offsets, plan.load, R)


def _number_of(modules: nn.ModuleList, num_experts: int | None) -> int:
    """How many experts a list holds. Raises ValueError where it cannot be the experts."""
    if len(modules) == 0:
        raise ValueError("ModuleExperts: module must hold one module or more, got an empty list")
    if num_experts not in (None, len(modules)):
        raise ValueError(
            f"ModuleExperts: num_experts must be {len(modules)}, the length of the ModuleList, or "
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


class SharedExperts(Experts):
    """Experts, and beside them a network that every token goes through (arXiv 2401.06066).

    A token without a route, masked ones too, has the shared output alone.

    Args:
        experts: Experts, of the routed tokens
        shared: a module that maps [T, H] to the same shape
        gate: a module that maps [T, H] to [T, 1]; its sigmoid weighs the shared output, as in
            Qwen2-MoE

    Raises:
        ValueError: a part is of another kind
    """

    def __init__(self, experts: Experts, shared: nn.Module, gate: nn.Module | None = None) -> None:
        if not isinstance(experts, Experts):
            raise ValueError(
                f"SharedExperts: experts must be Experts, got {type(experts).__name__}"
            )
        for name, part in (("shared", shared), ("gate", gate)):
            if not isinstance(part, nn.Module) and (name, part) != ("gate", None):
                raise ValueError(
                    f"SharedExperts: {name} must be a module, got {type(part).__name__}"
                )
        super().__init__(experts.num_experts)
        self.experts = experts
        self.shared = shared
        self.gate = gate

    @property
    def hidden_size(self) -> int | None:
        return getattr(self.experts, "hidden_size", None)

    def routed(self, tokens: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        # As a call of the module: hooks, FSDP and compile() see it.
        return self(tokens, plan, weights)

    # As every module's, of arguments of its own; `routed` is what experts have in common.
    def forward(  # type: ignore[override]
        self, tokens: Tensor, plan: Plan, weights: Tensor
    ) -> Tensor:
        """The weighted sum of every token's experts, and the shared output.

        Args:
            tokens: [T, H]
            plan: of the same T tokens
            weights: [T, K]

        Returns:
            [T, H]
        """
        # Data-parallel wrappers may cast what they pass on.
        weights = weights.to(checks.accumulate_dtype(tokens.dtype))
        out, of_shared = self.experts.routed_beside(
            lambda: self._of_shared(tokens), tokens, plan, weights
        )
        return out + of_shared

    def _of_shared(self, tokens: Tensor) -> Tensor:
        of_shared = self.shared(tokens)
        if shape_of(of_shared) != list(tokens.shape):
            raise RuntimeError(
                f"SharedExperts: shared must return [T, H] = {list(tokens.shape)}, "
                f"got {shape_of(of_shared)}"
            )
        if self.gate is None:
            return of_shared
        scores = self.gate(tokens)
        if shape_of(scores) != [tokens.shape[0], 1]:
            raise RuntimeError(
                f"SharedExperts: gate must return [T, 1] = {[tokens.shape[0], 1]}, "
                f"got {shape_of(scores)}"
            )
        return of_shared * torch.sigmoid(scores)


class ExpertParameters(nn.Module):
    """Every parameter carries `allreduce = False` and `group_name`, that of the processes which
    share the experts, in DeepSpeed's way.

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


def routed(experts: nn.Module, tokens: Tensor, plan: Plan, weights: Tensor) -> Tensor:
    """`Experts.routed`, also of a module that is none."""
    if isinstance(experts, Experts):
        return experts.routed(tokens, plan, weights)
    return _padded_routed(experts, tokens, plan, weights)


# Where torch.compile(module) and checkpoint_wrapper keep the module, whose attributes they pass on.
_WRAPPED = "_orig_mod", "_checkpoint_wrapped_module"


def refuse_wrapped(part: str, module: nn.Module, instead: str) -> None:
    """Raises for a part that is wrapped alone: the layer would go around what wraps it."""
    if any(name in module._modules for name in _WRAPPED):
        raise RuntimeError(
            f"MOELayer: {part} must not be wrapped alone, got {type(module).__name__}; {instead}"
        )


def _padded_routed(experts: nn.Module, tokens: Tensor, plan: Plan, weights: Tensor) -> Tensor:
    """`Experts.routed` of a module that maps [1, E, C, H] to the same shape.

    In a plan without capacity C is the largest load, which is read back from the device: one
    synchronisation per call.
    """
    capacity = plan.capacity
    if capacity is None:
        if tokens.is_meta or is_exporting():
            raise RuntimeError(
                "MOELayer: without dropping, experts on [1, E, C, H] need the largest load on the "
                "host, which torch.export and the meta device cannot; use GroupedExperts"
            )
        capacity = int(plan.load.max())
        plan = make_plan(plan.expert_ids, plan.num_experts, capacity)
    rows = dispatch(tokens, plan)
    rooms = rows.view(1, plan.num_experts, capacity, tokens.shape[1])
    return combine(through_rooms(experts, rooms), plan, weights)


def through_rooms(experts: nn.Module, rooms: Tensor) -> Tensor:
    """The output [ep * E * C, H] of a module that maps rooms [ep, E, C, H] to the same shape."""
    refuse_wrapped("experts", experts, "wrap the layer, or call layer.experts.compile()")
    out = experts(rooms)
    shape = list(rooms.shape)
    if shape_of(out) != shape and (shape[0] > 1 or shape_of(out) != shape[1:]):
        raise RuntimeError(
            f"MOELayer: experts must return [ep, E, C, H] = {shape}, got {shape_of(out)}"
        )
    return out.reshape(-1, shape[-1])
