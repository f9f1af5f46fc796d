"""A layer of divided experts, and programs that go wrong on one rank."""

import torch
import torch.distributed as dist
from processes import gathered
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
    gate = {"top2_2nd_expert_sampling": False, "min_capacity": 0} | gate
    experts = GroupedExperts(num_experts, width, 3)
    experts = ExpertParallel.of(experts, group or dist.group.WORLD, **(options or {}))
    return MOELayer(TopKGate(width, num_experts, k, **gate), experts).to(dtype)


def error_of(function) -> str:
    """Its type and text, or "no error"."""
    try:
        function()
    except (Exception, KeyboardInterrupt, CheckpointException) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class GivenUp(Exception):
    """A program has left its step early."""


def run_out_of_step(
    rank: int, program, options: dict, num_experts: int, trains: bool
) -> tuple[str, bool]:
    """Run a program on rank 1 of 2, and both layers in order on rank 0.

    Asserts that both raise the same error, and that later steps are as before. Returns the error,
    and whether an output was NaN.
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
        except GivenUp:
            pass
        except RuntimeError as raised:
            error = str(raised)
            break
    assert torch.equal(step(in_order), expected)
    assert len(set(gathered(error))) == 1
    return error, has_nan
