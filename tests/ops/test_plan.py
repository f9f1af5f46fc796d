import math

import pytest
import torch
from cases import ROUTINGS, SIZES, all_equal, masked_experts

import moe_ext
from moe_ext.ops import checks, reference

pytestmark = pytest.mark.usefixtures("poisoned")


def assert_plan_by_hand(plan, priority, order, align):
    """The plan is its definition, one route at a time."""
    experts, capacity = plan.expert_ids.tolist(), plan.capacity
    T, K = plan.expert_ids.shape
    queue = [(t, k) for t in range(T) for k in range(K)]
    if order == "choice":
        queue.sort(key=lambda route: route[1])

    def rank(route):
        p = float(priority[route])
        return (1, 0.0) if math.isnan(p) else (0, -p)

    slots, sources, offsets, load = [[-1] * K for _ in range(T)], [-1] * len(plan.sources), [0], []
    for e in range(plan.num_experts):
        kept = routes = [(t, k) for t, k in queue if experts[t][k] == e]
        if capacity is not None:
            best = routes if priority is None else sorted(routes, key=rank)
            kept = [route for route in routes if route in best[:capacity]]
        for row, (t, k) in enumerate(kept, offsets[-1]):
            slots[t][k], sources[row] = row, t * K + k
        room = math.ceil(len(routes) / align) * align if capacity is None else capacity
        offsets.append(offsets[-1] + room)
        load.append(len(routes))
    assert [x.tolist() for x in plan[:4]] == [slots, sources, offsets, load]
    assert all(x.dtype == torch.int32 for x in plan[:4])


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("order", checks.ORDERS)
@pytest.mark.parametrize(("T", "K", "E", "H"), SIZES)
def test_is_the_definition(device, T, K, E, H, order, routing):
    experts = routing(T, K, E, device)
    for align in (1, 2, 8):
        plan = moe_ext.make_plan(experts, E, order=order, align=align)
        assert_plan_by_hand(plan, None, order, align)
    for capacity in (0, 1, max(1, T * K // (2 * E)), T + 3):
        plan = moe_ext.make_plan(experts, E, capacity, order=order)
        assert_plan_by_hand(plan, None, order, 1)


@pytest.mark.parametrize("order", checks.ORDERS)
@pytest.mark.parametrize("kind", ["uniform", "ties", "special"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_priority_decides_who_is_kept(device, order, kind, routing):
    T, K, E = 90, 3, 5
    experts = routing(T, K, E, device)
    priority = torch.rand(T, K, device=device)
    if kind == "ties":
        priority = (4 * priority).floor()
    if kind == "special":
        special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0], device=device)
        priority = special[torch.randint(len(special), (T, K), device=device)]
    for capacity in (None, 0, 1, 17, 40, T):
        plan = moe_ext.make_plan(experts, E, capacity, priority=priority, order=order)
        assert_plan_by_hand(plan, priority.cpu(), order, 1)


@pytest.mark.parametrize("order", checks.ORDERS)
@pytest.mark.parametrize("with_priority", [False, True])
def test_matches_reference_where_threads_share_the_queue(device, order, with_priority):
    T, K, E = 70_000, 3, 37
    experts = masked_experts(T, K, E, device)
    priority = torch.rand(T, K, device=device) if with_priority else None
    for capacity, align in ((None, 1), (None, 16), (4000, 1), (T, 1)):
        args = (experts, priority, E, capacity, order, align)
        assert all_equal(torch.ops.moe_ext.plan(*args), reference.plan(*args))


@pytest.mark.parametrize("order", checks.ORDERS)
@pytest.mark.parametrize("align", [1, 16])
def test_without_capacity_every_route_has_a_row(device, align, order):
    """The dropless law: no route is dropped, and no two share a row."""
    for routing in ROUTINGS:
        expert_ids = routing(200, 4, 7, device)
        plan = moe_ext.make_plan(expert_ids, 7, align=align, order=order)
        routes = (expert_ids.flatten() >= 0).nonzero().squeeze(1)
        rows = plan.slots.flatten()[routes]
        assert (rows >= 0).all()
        assert torch.equal(plan.sources[rows.long()].long(), routes)
        assert torch.equal(plan.kept(), plan.load)
        assert plan.load.sum() == len(routes)


@pytest.mark.parametrize("align", [1, 4, 128])
def test_the_number_of_dropless_rows_follows_from_shapes_and_suffices(device, align):
    for T, K, E in ((0, 2, 3), (1, 1, 8), (3, 2, 64), (200, 4, 7)):
        N, used = T * K, min(E, T * K)
        rows = N if align == 1 else align * ((N + used * (align - 1)) // align)
        for routing in ROUTINGS:
            plan = moe_ext.make_plan(routing(T, K, E, device), E, align=align)
            assert len(plan.sources) == rows
            assert plan.offsets[-1] <= rows
