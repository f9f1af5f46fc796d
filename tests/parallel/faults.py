"""A layer of divided experts, and programs that go wrong on one rank."""

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from moe_ext import ExpertParallel, GroupedExperts, MOELayer, TopKGate

H, E, T = 6, 4, 5


def layer_of(
    *,
    num_experts: int = E,
    width: int = H,
    k: int = 2,
    dtype: torch.dtype = torch.float32,
    options: dict | None = None,
    group: dist.ProcessGroup | None = None,
    **gate,
) -> MOELayer:
    torch.manual_seed(0)
    gate = TopKGate(width, num_experts, k, top2_2nd_expert_sampling=False, min_capacity=0, **gate)
    experts = GroupedExperts(num_experts, width, 3)
    experts = ExpertParallel.of(experts, group or dist.group.WORLD, **(options or {}))
    return MOELayer(gate, experts).to(dtype)


def error_of(function) -> str:
    """Its type and text, or "no error"."""
    try:
        function()
    except (Exception, KeyboardInterrupt, CheckpointException) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def run_out_of_step(rank: int, program, options: dict, num_experts: int, trains: bool):
    """Run a program on rank 1, and both layers in order on the others.

    Returns the first error, whether an output was NaN, and whether later steps are as before.
    """
    first, second = layer_of(**options), layer_of(num_experts=num_experts, **options)

    def step(program):
        x = torch.linspace(-1, 1, T * H).view(T, H).requires_grad_(trains)
        with torch.set_grad_enabled(trains):
            out = program(first, second, x)
        if trains:
            out.sum().backward()
        return out.detach()

    def in_order(first, second, x):
        return second(first(x))

    expected, error, has_nan = step(in_order), "no error", False
    for _ in range(3):
        try:
            has_nan |= bool(step(program if rank == 1 else in_order).isnan().any())
        except (MemoryError, KeyboardInterrupt):
            pass
        except RuntimeError as raised:
            error = str(raised)
            break
    return error, has_nan, torch.equal(step(in_order), expected)
