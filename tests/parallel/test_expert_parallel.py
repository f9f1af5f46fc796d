"""Expert parallelism gives the outputs and gradients of one process."""

import itertools
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from cases import relative_error
from processes import gathered, on_ranks
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from moe_ext import (
    ExpertParallel,
    GroupedExperts,
    ModuleExperts,
    MOELayer,
    SharedExperts,
    TopKGate,
    make_plan,
)
from moe_ext.parallel import make_groups
from moe_ext.parallel.places import to_places, without_gap

H, F, E = 10, 6, 8


@dataclass(frozen=True)
class Case:
    """A layer whose experts are divided among all ranks.

    experts: E
    tokens: the number on each rank
    nodes: 0, or the number of nodes of a mesh
    """

    tokens: tuple[int, ...] = (9, 5)
    k: int = 2
    drop_tokens: bool = False
    kind: str = "grouped"
    nodes: int = 0
    options: dict = field(default_factory=dict)
    score_before_experts: bool = False
    experts: int = E

    def __str__(self) -> str:
        drop = "capacity" if self.drop_tokens else "dropless"
        how = ",".join(f"{name}={value}" for name, value in self.options.items())
        nodes = f"{self.nodes} nodes," if self.nodes else ""
        experts = "" if self.experts == E else f"{self.experts} experts,"
        return f"{list(self.tokens)},k={self.k},{drop},{self.kind},{experts}{nodes}{how}"


def layer_of(case: Case) -> MOELayer:
    torch.manual_seed(1)
    gate = TopKGate(
        *(H, case.experts, case.k),
        capacity_factor=0.8,
        min_capacity=2,
        drop_tokens=case.drop_tokens,
        drop_policy="position",
        top2_2nd_expert_sampling=False,
    )
    if case.kind == "grouped":
        experts = GroupedExperts(
            *(case.experts, H, F, "geglu"),
            bias=True,
            score_before_experts=case.score_before_experts,
        )
    else:
        network = nn.Sequential(nn.Linear(H, F), nn.Tanh(), nn.Linear(F, H))
        experts = ModuleExperts(network, case.experts)
        for parameter in experts.parameters():
            nn.init.normal_(parameter)
    return MOELayer(gate, experts).double()


def inputs_of(case: Case, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 + rank)
    tokens, grad = torch.randn(2, case.tokens[rank], H, generator=generator, dtype=torch.float64)
    return tokens.requires_grad_(), grad


def step(layer: MOELayer, case: Case, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, grad = inputs_of(case, rank)
    out = layer(tokens)
    ((out * grad).sum() + layer.l_aux).backward()
    return out.detach(), tokens.grad


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters()}


def divided_layer(case: Case, **options) -> MOELayer:
    layer, world = layer_of(case), dist.get_world_size()
    group = make_groups((case.nodes, world // case.nodes) if case.nodes else world).ep
    layer.experts = ExpertParallel.of(layer.experts, group, **case.options, **options)
    return layer


def assert_same(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def assert_like_one_process(
    rank: int, case: Case, layer: MOELayer, *, run=step, copies: int = 1
) -> None:
    """run: a function as `step`. copies: ranks that hold the same tokens."""
    part, alone = rank // copies, layer_of(case)
    expected = [step(alone, case, tokens) for tokens in range(len(case.tokens))]
    assert_same(run(layer, case, part), expected[part])
    gates = gathered(gradients(layer.gate))[::copies]
    for name, grad in gradients(alone.gate).items():
        assert_same(sum(gate[name] for gate in gates), grad)
    mine = torch.arange(case.experts).tensor_split(dist.get_world_size())[rank].tolist()
    for name, actual in gradients(layer.experts).items():
        assert_same(actual, expected_part(gradients(alone.experts), name, mine))


def expected_part(gradients: dict, name: str, mine: list[int]) -> torch.Tensor:
    """mine: the ids of the rank's experts"""
    if not name.startswith("experts."):
        return gradients[name][mine]
    _, number, rest = name.split(".", 2)
    return gradients[f"experts.{mine[int(number)]}.{rest}"]


CASES = [
    Case((7,)),
    *(Case(k=k) for k in (1, 2, 3, 4)),
    *(Case((6, 6), k=k, drop_tokens=True) for k in (1, 2, 3, 4)),
    Case((9, 0)),
    Case((9, 5), drop_tokens=True, options={"uneven_tokens": True}),
    Case((0, 5), drop_tokens=True, options={"uneven_tokens": True}),
    Case((0, 0)),
    Case(k=4, options={"dedup": True}),
    Case((9, 0), k=3, options={"dedup": True}, score_before_experts=True),
    Case((9, 0), k=1, options={"dedup": True}),
    Case((1, 2), k=1, options={"dedup": True, "overlap": 2}),
    Case((6, 6), k=3, drop_tokens=True, options={"dedup": True}),
    Case(options={"overlap": 3}),
    Case((1, 5), options={"overlap": 3}),
    Case((6, 6), drop_tokens=True, options={"overlap": 2}),
    Case(k=3, options={"overlap": 2, "dedup": True}),
    Case(kind="modules"),
    Case((6, 6), drop_tokens=True, kind="modules"),
    Case((5, 3, 0, 7), k=3),
    Case((5, 3, 0, 7), k=3, nodes=2),
    Case((5, 3, 0, 7), k=4, nodes=2, options={"dedup": True, "overlap": 2}),
    Case((5, 3, 0, 7), k=3, nodes=2, kind="modules", options={"dedup": True}),
    Case((4, 4, 4, 4), drop_tokens=True),
    Case((4, 4, 4, 4), drop_tokens=True, nodes=2, options={"overlap": 2}),
    Case((4, 4, 4, 4), drop_tokens=True, nodes=2, kind="modules"),
    Case((4, 4, 4, 4), drop_tokens=True, nodes=1),
    Case((5, 3, 0, 7), nodes=4),
    # Experts that do not divide evenly.
    Case((5, 0, 7), k=3),
    Case((6, 6, 6), k=3, drop_tokens=True, options={"overlap": 2}),
    Case((5, 0, 7), k=3, drop_tokens=True, options={"uneven_tokens": True}),
    Case((5, 0, 7), k=4, options={"dedup": True, "overlap": 2}, score_before_experts=True),
    Case((5, 0, 7), kind="modules"),
    Case((6, 6, 6), drop_tokens=True, kind="modules"),
    Case((5, 3), k=3, experts=3, options={"overlap": 2}),
    Case((4, 4, 4, 4), k=4, drop_tokens=True, nodes=2, experts=10),
    Case((5, 3, 0, 7), k=4, nodes=2, experts=10),
    Case((5, 3, 0, 7), k=4, nodes=2, experts=10, options={"dedup": True, "overlap": 2}),
    Case((5, 3, 0, 7), k=4, nodes=2, experts=6, kind="modules", options={"dedup": True}),
]


on_ranks_of_case = on_ranks(lambda case, **_: len(case.tokens))


@pytest.mark.parametrize("case", CASES, ids=str)
@on_ranks_of_case
def test_ranks_compute_what_one_process_computes(rank, case):
    assert_like_one_process(rank, case, divided_layer(case))


@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize(
    ("size", "places"),
    [(4, [0, 1, 2, 3, 4, 5, 6, 7, 9, 10]), (7, [0, 1, 2, 3, 4, 5, 6, 8, 10, 12])],
)
def test_a_plan_of_places_is_that_of_their_numbers(size, places, capacity):
    """10 experts on 4 ranks are 3, 3, 2 and 2; on 7 ranks the last 4 have one each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 10, (30, 3), generator=generator, dtype=torch.int32)
    of_places = torch.tensor([*places, -1], dtype=torch.int32)[ids.long()]
    n = -(-10 // size)
    expected = make_plan(of_places, size * n, capacity)
    assert_same(to_places(make_plan(ids, 10, capacity), size), expected)
    mine = make_plan(ids % 5, 5, capacity)
    assert_same(without_gap(mine, 5), mine)
    with_gap = make_plan(ids % 5, 6, capacity)
    assert_same(without_gap(with_gap, 5), mine)


@pytest.mark.parametrize(
    ("case", "before"),
    [
        (Case((4, 16), drop_tokens=True, options={"uneven_tokens": True}), {}),
        (Case((4, 16), drop_tokens=True, options={"dedup": True}), {}),
        (Case((6, 6), drop_tokens=True, kind="modules", options={"dedup": False}), {"dedup": True}),
        (Case((5, 3, 0, 17), nodes=2, drop_tokens=True, options={"dedup": True}), {}),
        (Case((5, 3, 0, 7), nodes=2, options={"dedup": False}), {"dedup": True}),
        (Case((4, 4, 4, 4), nodes=2, drop_tokens=True, options={"dedup": False}), {"dedup": True}),
    ],
    ids=str,
)
@on_ranks_of_case
def test_options_may_change_between_calls(rank, case, before):
    layer = divided_layer(replace(case, options=before))
    for name, value in case.options.items():
        setattr(layer.experts, name, value)
    assert_like_one_process(rank, case, layer)


class RecordCollectives(TorchDispatchMode):
    """Record collectives, their waits, and the shared experts' linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith(("_c10d_functional::", "c10d::", "aten::addmm")):
            self.names.append(name)
        return func(*args, **kwargs or {})


class CountReads(TorchFunctionMode):
    """Count how often the host reads values of tensors: on a GPU it would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        reads = ("tolist", "item", "cpu", "numpy", "nonzero", "unique", "__bool__", "__int__")
        is_masked = name == "__getitem__" and getattr(args[1], "dtype", None) == torch.bool
        is_sized = name == "repeat_interleave" and "output_size" not in kwargs
        self.reads += name in reads or is_masked or is_sized
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("case", "reads"),
    [
        (Case((4,)), 0),
        (Case((6, 6), drop_tokens=True), 0),
        (Case((6, 6), drop_tokens=True, options={"overlap": 3}), 0),
        (Case(), 1),
        (Case(options={"overlap": 3}), 1),
        (Case(k=3, options={"dedup": True, "overlap": 2}), 1),
        (Case((4, 4, 4, 4), nodes=2), 1),
        (Case((4, 4, 4, 4), nodes=2, options={"dedup": True}), 2),
        (Case((4, 4, 4), drop_tokens=True), 0),
        (Case((4, 4, 4)), 1),
    ],
    ids=str,
)
@on_ranks_of_case
def test_the_host_reads_counts_once_per_level(rank, case, reads):
    """A group of one runs no collective."""
    layer = divided_layer(case)
    step(layer, case, rank)
    with RecordCollectives() as seen, CountReads() as read:
        step(layer, case, rank)
    assert read.reads == reads
    assert any("c10d" in name for name in seen.names) == (len(case.tokens) > 1)


def _with_shared(layer: MOELayer) -> MOELayer:
    torch.manual_seed(2)
    layer.experts = SharedExperts(layer.experts, nn.Linear(H, H), nn.Linear(H, 1))
    return layer.double()


@pytest.mark.parametrize("case", [Case(), Case((6, 6), drop_tokens=True)], ids=str)
@on_ranks_of_case
def test_shared_experts_run_between_launch_and_wait(rank, case):
    layer, alone = _with_shared(divided_layer(case)), _with_shared(layer_of(case))
    with RecordCollectives() as seen:
        found = step(layer, case, rank)
    launched_then_shared = "_c10d_functional::all_to_all_single", "aten::addmm"
    assert launched_then_shared in itertools.pairwise(seen.names)
    expected = [step(alone, case, part) for part in range(2)]
    assert_same(found, expected[rank])
    grads = gathered(gradients(layer.experts.shared))
    for name, grad in gradients(alone.experts.shared).items():
        assert_same(sum(of_rank[name] for of_rank in grads), grad)


@pytest.mark.parametrize(
    "case",
    [
        Case((5, 4)),
        Case((6, 6), k=3, drop_tokens=True),
        Case((5, 4), k=3, options={"dedup": True}),
        Case((5, 5), k=3, drop_tokens=True, experts=10),
    ],
    ids=str,
)
@on_ranks(4)
def test_ranks_of_a_tensor_group_send_a_share_and_get_the_sum(rank, case):
    """Ranks 0 and 1 hold the same tokens, and ranks 2 and 3."""
    layer = divided_layer(case, tensor_group=make_groups(2).ep)
    assert_like_one_process(rank, case, layer, copies=2)


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case((6, 6), drop_tokens=True),
        Case(k=3, options={"dedup": True, "overlap": 2}),
        Case((5, 3, 0, 7), nodes=2),
        Case((6, 6, 6), drop_tokens=True),
    ],
    ids=str,
)
@on_ranks_of_case
def test_second_gradients_are_those_of_one_process(rank, case):
    tokens, grad = inputs_of(case, rank)

    def second_gradient(layer: MOELayer) -> tuple[torch.Tensor, ...]:
        loss = (layer(tokens) * grad).sin().sum()
        (first,) = torch.autograd.grad(loss, tokens, create_graph=True)
        return torch.autograd.grad(first.square().sum(), tokens)

    assert_same(second_gradient(divided_layer(case)), second_gradient(layer_of(case)))


# The same sums of the same rows, where a GEMM's last bit may depend on the number of rows; with
# dedup a sum of two sums, each rounded.
@pytest.mark.parametrize(("dedup", "roundings"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@on_ranks(2)
def test_rows_keep_their_dtype(rank, dtype, dedup, roundings):
    case = Case((6, 6), k=3, options={"dedup": dedup})
    tokens = inputs_of(case, rank)[0].to(dtype)
    out, expected = (layer.to(dtype)(tokens) for layer in (divided_layer(case), layer_of(case)))
    assert out.dtype == dtype
    assert relative_error(out, expected) < roundings * torch.finfo(dtype).eps


def _checkpointed(layer: MOELayer, case: Case, rank: int, **options):
    tokens, grad = inputs_of(case, rank)
    out, aux = checkpoint(layer.forward_with_aux, tokens, use_reentrant=False, **options)
    ((out * grad).sum() + aux.l_aux).backward()
    return out.detach(), tokens.grad


@pytest.mark.parametrize(
    "case", [Case(), Case((6, 6), drop_tokens=True), Case(options={"overlap": 2})], ids=str
)
@pytest.mark.parametrize("saves_exchange", [False, True])
@on_ranks_of_case
def test_activation_checkpointing_recomputes_or_saves_the_exchange(rank, saves_exchange, case):
    options = {}
    if saves_exchange:
        saved = [torch.ops._c10d_functional.all_to_all_single.default]
        options["context_fn"] = partial(create_selective_checkpoint_contexts, saved)
    run = partial(_checkpointed, **options)
    assert_like_one_process(rank, case, divided_layer(case), run=run)


@on_ranks(4)
def test_equal_inputs_give_bitwise_equal_results(rank):
    case = Case((5, 3, 0, 7), k=3, nodes=2, options={"dedup": True})
    layers = divided_layer(case), divided_layer(case)
    found = [(step(layer, case, rank), gradients(layer)) for layer in layers]
    torch.testing.assert_close(*found, rtol=0, atol=0)
