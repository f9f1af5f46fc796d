"""DeepEP's transport, with a stand-in for its buffer: DeepEP itself needs GPUs."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import gathered
from test_expert_parallel import Case, assert_like_one_process, divided_layer, on_ranks_of_case


class DeepEPBuffer:
    """`ElasticBuffer` as DeepEP documents it, by collectives.

    `dispatch` sends a token once to each rank that has any of its experts, in the order of ranks
    and tokens. Received ids count that rank's experts, -1 for others. `combine` returns rows to
    their source ranks and sums them per token.
    """

    def __init__(self) -> None:
        self.waited = True

    def dispatch(
        self,
        x,
        topk_idx=None,
        topk_weights=None,
        num_experts=None,
        handle=None,
        do_cpu_sync=None,
        do_expand=False,
        async_with_compute_stream=False,
    ):
        assert (topk_idx is None) == (handle is not None) == (topk_weights is None)
        if handle is not None:
            topk_idx, num_experts = handle
        assert topk_idx.dtype == torch.int64
        parts = gathered((x, topk_idx, topk_weights))
        size = num_experts // len(parts)
        received = []
        for rows, ids, weights in parts:
            is_mine = ids // size == dist.get_rank()
            local = torch.where(is_mine, ids % size, -1)
            of_token = (rows, local) if handle else (rows, local, weights)
            received.append([x[is_mine.any(dim=1)] for x in of_token])
        rows, ids, *weights = map(torch.cat, zip(*received, strict=True))
        self.waited = not async_with_compute_stream
        return rows, ids, weights[0] if weights else None, (topk_idx, num_experts), self

    def current_stream_wait(self) -> None:
        self.waited = True

    def combine(self, x, handle, topk_weights=None):
        assert self.waited
        topk_idx, num_experts = handle
        parts = gathered((x, topk_idx, topk_weights))
        out = torch.zeros(len(topk_idx), x.shape[1], dtype=x.dtype)
        weights = (
            None if topk_weights is None else torch.zeros_like(topk_idx, dtype=topk_weights.dtype)
        )
        size, mine = num_experts // len(parts), dist.get_rank()
        for receiver, (rows, _, weights_there) in enumerate(parts):
            is_there = [ids // size == receiver for _, ids, _ in parts]
            counts = [int(there.any(dim=1).sum()) for there in is_there]
            comes = is_there[mine].any(dim=1)
            out[comes] += rows.split(counts)[mine]
            if weights is not None:
                returned = weights_there.split(counts)[mine]
                weights[comes] += torch.where(is_there[mine][comes], returned, 0)
        return out, weights, self


@pytest.mark.parametrize("is_set_later", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        Case(k=1),
        Case(k=3),
        Case((6, 6), k=3, drop_tokens=True),
        Case((5, 0, 3, 7), k=4),
        Case((5, 0, 3, 7), k=4, experts=10),
    ],
    ids=str,
)
@on_ranks_of_case
def test_ranks_compute_what_one_process_computes(rank, case, is_set_later):
    buffer = mock.Mock(wraps=DeepEPBuffer())
    layer = divided_layer(case, deepep=None if is_set_later else buffer)
    layer.experts.deepep = buffer
    assert_like_one_process(rank, case, layer)
    assert buffer.dispatch.called
