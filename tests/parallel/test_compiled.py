"""Expert parallelism under torch.compile."""

import copy

import pytest
import torch
from parallel_faults import E, H, layer_of
from processes import on_ranks
from test_expert_parallel import Case, assert_like_one_process, divided_layer, on_ranks_of_case
from torch import nn

from moe_ext import MoE
from moe_ext.parallel import make_groups


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case((6, 6), drop_tokens=True),
        Case((6, 6), drop_tokens=True, options={"overlap": 2}),
        Case((4, 4, 4, 4), drop_tokens=True, nodes=2),
        Case((6, 6), drop_tokens=True, experts=5),
    ],
    ids=str,
)
@on_ranks_of_case
def test_compiled_ranks_compute_what_one_process_computes(rank, case):
    torch._dynamo.reset()
    layer = divided_layer(case)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=case.drop_tokens)
    assert_like_one_process(rank, case, compiled)


@pytest.mark.parametrize(
    ("options", "gate"),
    [
        ({}, {"drop_tokens": False}),
        ({"uneven_tokens": True}, {"capacity_factor": 1.0}),
        # As many rows per expert for every number of tokens.
        ({}, {"min_capacity": 16}),
    ],
    ids=["dropless", "uneven", "capacity"],
)
@on_ranks(2)
def test_one_rank_may_fall_back_to_eager_code(rank, options, gate):
    """Rank 0 has more sizes than torch.compile may make programs for, and rank 1 has one."""
    torch._dynamo.reset()
    layer = layer_of(dtype=torch.float64, options=options, **gate)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="eager", dynamic=False)
    for call in range(3):
        x = torch.randn(3 + (call if rank == 0 else 0), H, dtype=torch.float64)
        found = []
        for run in (compiled, eager):
            tokens = x.clone().requires_grad_()
            # Rank 0 runs eagerly from the second size on.
            with torch._dynamo.config.patch(recompile_limit=1):
                out = run(tokens)
            (grad,) = torch.autograd.grad(out.square().sum(), tokens)
            found.append((out, grad))
        assert all(map(torch.equal, *found))


@pytest.mark.parametrize("kind", ["MoE", "tensor group"])
@on_ranks(2)
def test_layers_with_a_capacity_compile_whole(rank, kind):
    torch._dynamo.reset()
    torch.manual_seed(1)
    if kind == "MoE":
        layer = MoE(H, nn.Linear(H, H), E, ep_size=2, use_rts=False)
        layer.set_deepspeed_parallelism()
    else:
        group, tensor_group = make_groups(2).ep, make_groups(2).ep
        layer = layer_of(group=group, options={"tensor_group": tensor_group}, use_rts=False)
    x = torch.randn(8, H)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out, expected = (found[0] if kind == "MoE" else found for found in (compiled(x), layer(x)))
    assert torch.equal(out, expected)
