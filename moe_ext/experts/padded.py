"""Experts that take a padded buffer: a module that maps [ep, E, C, H] to the same shape.

Each of ep ranks sends C rows to each of E experts (GShard, arXiv 2006.16668).
"""

from torch import Tensor, nn

from ..ops.functional import combine, dispatch
from ..ops.plan import Plan, make_plan
from ..ops.registry import is_exporting
from .base import Experts, shape_of

# torch.compile(module), checkpoint_wrapper and FSDP1 keep the module under these names, and pass
# its attributes on.
_WRAPPED = "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"
_INSTEAD = {"gate": "wrap the layer", "experts": "wrap the layer, or call layer.experts.compile()"}


def refuse_wrapped(part: str, module: nn.Module) -> None:
    """Raises RuntimeError for a part that is wrapped alone: the layer would bypass the wrapper."""
    wrapped = next((name for name in _WRAPPED if name in module._modules), None)
    if wrapped == "_fsdp_wrapped_module":
        inner = module._modules[wrapped]
        if not isinstance(inner, Experts) and not hasattr(inner, "route"):
            return  # the layer calls it through the wrapper
    if wrapped is not None:
        raise RuntimeError(
            f"moe_ext: {part} must not be wrapped alone, got {type(module).__name__}; "
            f"{_INSTEAD[part]}"
        )


def routed(experts: nn.Module, tokens: Tensor, plan: Plan, weights: Tensor) -> Tensor:
    """`Experts.routed`, also of a module that maps [1, E, C, H] to the same shape.

    For such a module C is the largest load in a plan without capacity, which is read back from the
    device: one synchronisation per call.

    Raises RuntimeError for experts that are wrapped alone.
    """
    if isinstance(experts, Experts):
        return experts.routed(tokens, plan, weights)
    refuse_wrapped("experts", experts)
    capacity = plan.capacity
    if capacity is None:
        if tokens.is_meta or is_exporting():
            raise RuntimeError(
                f"{type(experts).__name__}: without dropping, experts on [1, E, C, H] need the "
                "largest load on the host, which torch.export and the meta device cannot; use "
                "GroupedExperts"
            )
        capacity = int(plan.load.max())
        plan = make_plan(plan.expert_ids, plan.num_experts, capacity)
    rows = dispatch(tokens, plan)
    buffer = rows.view(1, plan.num_experts, capacity, tokens.shape[1])
    return combine(run_padded(experts, buffer), plan, weights)


def run_padded(experts: nn.Module, buffer: Tensor) -> Tensor:
    """The output [ep * E * C, H] of a module that maps a buffer [ep, E, C, H] to the same shape.

    Raises RuntimeError for experts that are wrapped alone.
    """
    refuse_wrapped("experts", experts)
    out = experts(buffer)
    shape = list(buffer.shape)
    if shape_of(out) != shape and (shape[0] > 1 or shape_of(out) != shape[1:]):
        raise RuntimeError(
            f"{type(experts).__name__}: experts must return [ep, E, C, H] = {shape}, "
            f"got {shape_of(out)}"
        )
    return out.reshape(-1, shape[-1])
