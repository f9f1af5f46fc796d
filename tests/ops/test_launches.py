"""Launches of the CUDA kernels and the bytes they move, as the emulator counts them: --cusim."""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import (
    COMPOSED_ON_CUDA,
    DTYPES,
    all_equal,
    call_operator,
    masked_experts,
    random_experts,
    values,
    weights_for,
)
from torch.utils._python_dispatch import TorchDispatchMode

import moe_ext
from moe_ext import GroupedExperts, MOELayer, QuantizedWeight, TopKGate
from moe_ext.ops import registry, samples, torch_grouped_mm

IN_PYTHON = {*torch_grouped_mm.OPERATORS, *COMPOSED_ON_CUDA}
each_kernel = pytest.mark.parametrize("op", [op for op in registry.NAMES if op not in IN_PYTHON])
ORDERS = ("forward", "reverse", "random1", "random2", "random3")


def kernels(launches: list[dict]) -> list[str]:
    return [launch["kernel"] for launch in launches]


def moved(launch: dict) -> int:
    """Bytes of global memory that a launch reads and writes."""
    sizes = [*launch["loads"].items(), *launch["stores"].items()]
    return sum(size * count for size, count in sizes)


@pytest.mark.parametrize("T", [1, 100, 3000])
@pytest.mark.parametrize("E", [8, 60, 61, 256, 1024])
@pytest.mark.parametrize("scoring", moe_ext.ops.checks.SCORINGS)
def test_gate(launches_of, T, E, scoring):
    """Logits are read once and probs written once, in vectors where E keeps them aligned."""
    logits = torch.randn(T, E, requires_grad=True)
    args, rule = (logits, 4), {"scoring": scoring, "normalize": True}
    gate, *importance = launches_of(moe_ext.gate, *args, **rule)
    assert gate["kernel"] == "gate"
    width = 16 if E % 4 == 0 else 4
    assert gate["loads"][width] * width >= logits.nbytes
    if width == 16:
        assert gate["loads"][16] * 16 == gate["stores"][16] * 16 == logits.nbytes
    if gate["blocks"] == 1:
        assert importance == []
    else:
        assert kernels(importance) == ["gate_importance"]
        assert importance[0]["loads"] == {4: gate["blocks"] * E}

    out = moe_ext.gate(*args, **rule)
    total = out.weights.sum() + out.probs.square().sum() + out.importance.square().sum()
    assert kernels(launches_of(total.backward)) == ["gate_backward"]


@pytest.mark.parametrize(("T", "K"), [(0, 2), (1, 1), (512, 8), (513, 8), (20000, 3)])
@pytest.mark.parametrize("order", moe_ext.ops.checks.ORDERS)
def test_plan(launches_of, T, K, order):
    E = 16
    experts, priority = random_experts(T, K, E), torch.rand(T, K)
    sort = ["plan_place"] if T * K <= 4096 else ["plan_count", "plan_place"]
    for capacity in (None, 0, T * K // E + 1):
        calls_of_plan = partial(launches_of, moe_ext.make_plan, experts, E, capacity, order=order)
        assert kernels(calls_of_plan()) == sort
        has_choice = capacity is not None and T > 0
        keep = ["plan_keep"] if has_choice else []
        assert kernels(calls_of_plan(priority=priority)) == [*sort, *keep]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [8, 1024, 2056])
@pytest.mark.parametrize("capacity", [None, 40])
def test_rows_move_once_and_in_vectors(launches_of, dtype, H, capacity):
    """dispatch reads every token once and writes every row once; combine the reverse. Beyond that
    a route costs a few integers, which count for nothing beside rows of a model's width."""
    T, K, E = 150, 4, 8
    plan = moe_ext.make_plan(masked_experts(T, K, E), E, capacity)
    tokens = values(T, H, dtype=dtype)
    rows = values(len(plan.sources), H, dtype=dtype)
    weights = weights_for(dtype, T, K)
    row_vectors = rows[0].nbytes // 16
    kept = int(plan.kept().sum())
    for w in (None, weights):
        (dispatch,) = launches_of(moe_ext.dispatch, tokens, plan, w)
        assert dispatch["kernel"] == "dispatch"
        assert dispatch["loads"][16] == T * row_vectors
        assert dispatch["stores"] == {16: len(rows) * row_vectors}

        (combine,) = launches_of(moe_ext.combine, rows, plan, w)
        assert combine["kernel"] == "combine"
        assert combine["loads"][16] == kept * row_vectors
        assert combine["stores"] == {16: T * row_vectors}
        if H >= 1024:
            assert moved(dispatch) <= 1.03 * (tokens.nbytes + rows.nbytes)
            assert moved(combine) <= 1.03 * (tokens.nbytes + kept * rows[0].nbytes)


@pytest.mark.parametrize("H", [1024, 1])
def test_gradients_of_combine_in_one_launch(launches_of, H):
    plan = moe_ext.make_plan(random_experts(150, 3, 8), 8, 40)
    rows = torch.randn(len(plan.sources), H, requires_grad=True)
    weights = torch.rand(150, 3, requires_grad=True)
    out = moe_ext.combine(rows, plan, weights)
    calls = launches_of(out.backward, torch.randn_like(out))
    assert kernels(calls) == ["combine_backward"]
    (dot,) = launches_of(moe_ext.route_dot, out.detach(), rows.detach(), plan)
    assert dot["kernel"] == "route_dot"
    if H == 1024:
        kept = int(plan.kept().sum())
        # The incoming gradient and the kept rows are read, every row of the gradient is written.
        assert moved(calls[0]) <= 1.03 * (out.nbytes + kept * rows[0].nbytes + rows.nbytes)
        assert moved(dot) <= 1.03 * (out.nbytes + kept * rows[0].nbytes)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_activation_reads_and_writes_once(launches_of, activation):
    plan = moe_ext.make_plan(random_experts(150, 3, 8), 8, 40)
    kept, R = int(plan.kept().sum()), len(plan.sources)
    pre_activation, weights = torch.randn(R, 1024), torch.rand(150, 3)
    (call,) = launches_of(moe_ext.activate, pre_activation, plan, activation, weights)
    out = moe_ext.activate(pre_activation, plan, activation)
    assert call["kernel"] == "activate"
    assert call["loads"][16] == kept * pre_activation[0].nbytes // 16
    assert call["stores"] == {16: out.nbytes // 16}
    args = torch.randn_like(out), pre_activation, plan.slots, plan.sources, weights, activation
    (call,) = launches_of(torch.ops.moe_ext.activate_backward, *args)
    assert call["kernel"] == "activate_backward"
    assert call["loads"][16] == kept * (pre_activation[0].nbytes + out[0].nbytes) // 16
    assert call["stores"] == {16: (pre_activation.nbytes + out.nbytes) // 16, 4: weights.numel()}


@pytest.mark.parametrize("T", [100, 700])
@pytest.mark.parametrize(("format", "bits"), [("int8", 8), ("int4", 4), ("mxfp4", 4), ("nf4", 4)])
def test_packed_weights_are_read_as_they_are(launches_of, format, bits, T):
    """In vectors, once for each tile of rows; and no weight of the rows' dtype is in memory."""
    E, N, M = 4, 256, 512
    plan = moe_ext.make_plan(random_experts(T, 1, E, "cpu"), E)
    weight = QuantizedWeight.quantize(torch.randn(E, N, M), format)
    rows = torch.randn(T, M).bfloat16()
    (call,) = launches_of(moe_ext.grouped_mm, rows, weight, plan)
    assert call["kernel"] == "quantized_mm"
    of_tile = 64 if T < 96 * E else 128
    tiles = int((plan.load + of_tile - 1).div(of_tile, rounding_mode="floor").sum())
    vectors = of_tile * (N // 128) * M * 2 + N * M * bits // 8
    assert call["loads"][16] == tiles * vectors // 16
    assert call["stores"] == {16: T * N * 2 // 16}
    # The gradient of rows reads the same bytes, by columns.
    grad = torch.randn(T, N).bfloat16()
    rule = plan.offsets, plan.load, format, True, False, None
    args = grad, *weight.codes(), None, *rule
    (call,) = launches_of(torch.ops.moe_ext.quantized_mm, *args)
    vectors = of_tile * (M // 128) * N * 2 + N * M * bits // 8
    assert call["loads"][16] == tiles * vectors // 16


def test_nothing_to_do_is_not_launched(launches_of):
    plan = moe_ext.make_plan(torch.empty(0, 2, dtype=torch.int32), 4)
    assert launches_of(moe_ext.dispatch, torch.empty(0, 8), plan) == []
    assert launches_of(moe_ext.combine, torch.empty(0, 8), plan) == []
    plan = moe_ext.make_plan(random_experts(5, 2, 4), 4)
    assert launches_of(moe_ext.dispatch, torch.empty(5, 0), plan) == []


@each_kernel
def test_the_same_bits_in_every_order(cusim, request, op):
    """Orders of threads and blocks; `make cusim` holds the operators' laws in three of them."""
    args, results = samples.arguments(op, T=900, K=5), []
    request.addfinalizer(partial(cusim.set_order, request.config.getoption("--cusim-order")))
    for order in ORDERS:
        cusim.set_order(order)
        results.append(call_operator(op, args))
    assert all(all_equal(results[0], other) for other in results[1:])


@each_kernel
def test_kernels_have_the_name_of_their_operator(launches_of, op):
    launched = kernels(launches_of(call_operator, op, samples.arguments(op)))
    assert launched[0].startswith(op)
    assert all(name.startswith(op) for name in launched)


def test_experts_are_made_of_other_kernels(launches_of):
    """On tensor cores; else the products are torch's."""
    for dtype, expected in (
        (torch.bfloat16, ["grouped_mm_activate", "grouped_mm", "combine"]),
        (torch.float64, ["dispatch", "activate", "combine"]),
    ):
        arguments = samples.arguments("feed_forward", dtype=dtype)
        assert kernels(launches_of(call_operator, "feed_forward", arguments)) == expected


# They look at memory, or reserve it.
LAUNCH_NOTHING = {"view", "_unsafe_view", "t", "transpose", "detach", "slice", "alias", "expand"}
LAUNCH_NOTHING |= {"unsqueeze", "squeeze", "select", "empty", "new_empty", "empty_like"}


class Computing(TorchDispatchMode):
    """Counts torch's operators that launch a kernel, each as one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        if name in COMPOSED_ON_CUDA:
            with self:
                return registry.COMPOSED[name](*args)
        self.count += namespace == "aten" and name not in LAUNCH_NOTHING
        return func(*args, **(kwargs or {}))


def native_products(monkeypatch) -> None:
    inside = torch_grouped_mm.INSIDE
    monkeypatch.setattr(torch_grouped_mm, "choose", lambda *args: ("native", ""))
    monkeypatch.setattr(registry, "product_inside", lambda name, args: inside.get(name))


def layer_of(E: int, H: int, F: int, k: int, capacity: bool) -> MOELayer:
    gate = TopKGate(H, E, k, drop_tokens=capacity, top2_2nd_expert_sampling=False)
    return MOELayer(gate, GroupedExperts(E, H, F, activation="swiglu", bias=False)).bfloat16()


RECORDS = Path(__file__).parents[2] / "bench" / "results" / "launches.json"


# Forward in training and in evaluation, and backward: with torch's native products, and with ours.
MOST_LAUNCHES = {"native": (14, 12, 22), "own": (10, 10, 16)}


@pytest.mark.parametrize("path", MOST_LAUNCHES)
@pytest.mark.parametrize("mode", ["training", "eval"])
@pytest.mark.parametrize("k", [2, 8])
@pytest.mark.parametrize("capacity", [False, True])
def test_a_layer_is_few_launches(launches_of, monkeypatch, path, mode, k, capacity):
    """In bfloat16, whatever the sizes. On CUDA the router is one product too, which torch does not
    have on the CPU."""
    mm = torch.mm

    def wide_mm(left, right, out_dtype=None):
        if out_dtype is None:
            return mm(left, right)
        with torch._C._DisableTorchDispatch():
            out = mm(left.to(out_dtype), right.to(out_dtype))
        launches.count += 1
        return out

    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr("moe_ext.routing.gate.is_wide_product", lambda *args: True)
    if path == "native":
        native_products(monkeypatch)
    H = 64
    layer = layer_of(16, H, 32, k, capacity).train(mode == "training")
    hidden = torch.randn(100, H, dtype=torch.bfloat16, requires_grad=True)

    def count(function) -> int:
        nonlocal launches
        with Computing() as launches:
            ours = launches_of(function)
        return len(ours) + launches.count

    launches = Computing()
    with torch.set_grad_enabled(mode == "training"):
        forward = count(lambda: layer(hidden))
    backward = None
    if mode == "training":
        out = layer(hidden)
        tensors, grads = [out, layer.l_aux], [torch.randn_like(out), torch.ones(())]
        backward = count(lambda: torch.autograd.backward(tensors, grads))
        assert backward <= MOST_LAUNCHES[path][2]
    assert forward <= MOST_LAUNCHES[path][mode == "eval"]
    found = {"path": path, "mode": mode, "k": k, "capacity": capacity}
    found |= {"forward": forward, "backward": backward}
    records = json.loads(RECORDS.read_text())
    assert found in records, f"{RECORDS} must have {json.dumps(found)}"


ROWS = {"dispatch", "combine", "combine_backward", "activate", "activate_backward"}


@pytest.mark.parametrize("capacity", [False, True])
def test_a_layer_moves_what_its_operators_must(launches_of, monkeypatch, capacity):
    """Beside the products every row is read and written as often as DESIGN's limits say."""
    native_products(monkeypatch)
    T, E, K, H, F = 120, 4, 2, 1024, 512
    layer = layer_of(E, H, F, K, capacity)
    hidden = torch.randn(T, H, dtype=torch.bfloat16, requires_grad=True)
    forward = launches_of(layer, hidden)
    out = layer(hidden)
    backward = launches_of(out.backward, torch.randn_like(out))

    routing = layer.gate.route(hidden)
    R, kept = len(routing.plan.sources), int(routing.plan.kept().sum())
    dispatch, combine = T * H + R * H, kept * H + T * H
    of_forward = {"dispatch": [dispatch], "combine": [combine]}
    of_forward["activate"] = [kept * 2 * F + R * F]
    # The tokens are dispatched once more: their rows are not kept.
    of_backward = {"dispatch": [dispatch, dispatch], "combine": [combine]}
    of_backward["activate_backward"] = [kept * 3 * F + R * 3 * F]
    for launches, limits in ((forward, of_forward), (backward, of_backward)):
        rows = [launch for launch in launches if launch["kernel"] in ROWS]
        assert Counter(kernels(rows)) == {name: len(sizes) for name, sizes in limits.items()}
        assert sum(map(moved, rows)) <= 1.03 * 2 * sum(map(sum, limits.values()))


def test_too_many_experts(unchecked):
    too_many = r"num_experts must be at most 1024 on cuda, got 1025"
    with pytest.raises(RuntimeError, match=f"gate: {too_many}"):
        moe_ext.gate(torch.randn(3, 1025, device=unchecked), 2)
    with pytest.raises(RuntimeError, match=f"plan: {too_many}"):
        moe_ext.make_plan(random_experts(3, 2, 1025, unchecked), 1025)


def test_an_order_that_there_is_not(cusim):
    with pytest.raises(
        ValueError, match="order must be forward, reverse or random<seed>, got rand"
    ):
        cusim.set_order("rand")


def test_ids_out_of_range_count_as_masked(unchecked):
    """The kernels cannot raise; they leave out what no expert is asked by."""
    masked = masked_experts(40, 3, 8, unchecked)
    priority = torch.rand(40, 3, device=unchecked)
    for stray in (-2, 8, torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max):
        strays = torch.where(masked < 0, stray, masked)
        for options in ({}, {"capacity": 5}, {"capacity": 5, "priority": priority}):
            right = moe_ext.make_plan(masked, 8, **options)
            plan = moe_ext.make_plan(strays, 8, **options)
            assert all_equal(plan[:4], right[:4])


def test_a_wrong_plan_writes_every_row_once(unchecked, poisoned):
    """Slots and sources that disagree make no route, as in the reference."""
    T, K, R, H = 30, 3, 64, 8
    generator = torch.Generator().manual_seed(5)
    slots = torch.randint(-3, R + 3, (T, K), generator=generator, dtype=torch.int32)
    sources = torch.randint(-3, T * K + 3, (R,), generator=generator, dtype=torch.int32)
    slots[0, 0], sources[0] = 0, 0
    routes = torch.arange(T * K, dtype=torch.int32).view(T, K)
    agree = (slots >= 0) & (slots < R) & (sources[slots.clamp(0, R - 1).long()] == routes)
    assert agree.any()
    right_slots, right_sources = torch.where(agree, slots, -1), torch.full_like(sources, -1)
    right_sources[slots[agree].long()] = routes[agree]
    for op, x in (("dispatch", torch.randn(T, H)), ("combine", torch.randn(R, H))):
        x, weights, *wrong = (t.to(unchecked) for t in (x, torch.rand(T, K), slots, sources))
        right = [t.to(unchecked) for t in (right_slots, right_sources)]
        results = [call_operator(op, (x, *plan, weights))[0] for plan in (wrong, right)]
        assert torch.equal(*results)
