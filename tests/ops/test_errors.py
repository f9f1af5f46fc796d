"""Errors that name the argument, the contract and what came: sizes, numbers, names and values.

test_contracts.py has those that follow from a contract's line.
"""

import inspect
import re
from math import inf, nan

import pytest
import torch
from cases import WHERE, operator_error

import moe_ext
from moe_ext import ModuleExperts
from moe_ext.ops import contracts, reference, samples

T, K, E, H = 33, 2, 8, 4
SIZES = {"T": T, "K": K, "E": E, "H": H, "F": 2}
R = 64
SAMPLES = {
    op: {
        argument.name: value
        for argument, value in zip(contract.arguments, samples.arguments(op, **SIZES), strict=True)
    }
    for op, contract in contracts.PARSED.items()
}
LIKE_SLOTS = "like the plan's slots [33, 2], got"
LIKE_SOURCES = "like the plan's sources [64], got"
LIKE_LOAD = "like the plan's load [8], got"
ONE_PLAN = "slots and sources must be of one plan, got"
ACTIVATIONS = "swiglu, geglu, swiglu_oai, gelu, relu or relu2"


def shorter(tensor):
    return tensor[1:]


def narrower(tensor):
    return tensor[:, 1:]


def error_of(op, wrong, where):
    """wrong: values of arguments, or functions of the right ones."""
    right = SAMPLES[op]
    wrong = {name: new(right[name]) if callable(new) else new for name, new in wrong.items()}
    return operator_error(op, tuple({**right, **wrong}.values()), where)


# (operator, what is wrong, the message after "operator: ")
WRONG = [
    ("gate", {"k": 9}, "k must be in 1..E with E = 8, got 9"),
    ("gate", {"k": 0}, "k must be in 1..E with E = 8, got 0"),
    ("gate", {"logits": lambda x: x[:, :0]}, "k must be in 1..E with E = 0, got 2"),
    ("gate", {"scoring": "tanh"}, "scoring must be softmax, sigmoid or sqrtsoftplus, got tanh"),
    ("gate_backward", {"scoring": ""}, "scoring must be softmax, sigmoid or sqrtsoftplus, got"),
    *(
        (op, {name: value}, f"{name} must be finite, got {text}")
        for value, text in ((nan, "nan"), (-nan, "nan"), (inf, "inf"), (-inf, "-inf"))
        for op, right in SAMPLES.items()
        for name in ("eps", "scale")
        if name in right
    ),
    ("plan", {"num_experts": 0}, "num_experts must be at least 1, got 0"),
    ("plan", {"order": "expert"}, "order must be choice or token, got expert"),
    ("plan", {"align": 0, "capacity": None}, "align must be at least 1, got 0"),
    ("plan", {"align": 8}, "align must be 1 where there is a capacity, got 8"),
    ("plan", {"capacity": -1}, "capacity must not be negative, got -1"),
    ("plan", {"capacity": 2**31}, "capacity must be below 2147483648, got 2147483648"),
    ("plan", {"capacity": 2**29}, "rows must be below 2147483648, got 4294967296"),
    ("dispatch", {"tokens": shorter}, f"tokens must be [T, H] with T = 33 {LIKE_SLOTS} [32, 4]"),
    (
        "dispatch",
        {"weights": torch.Tensor.t},
        f"weights must be [T, K] with T = 33, K = 2 {LIKE_SLOTS} [2, 33]",
    ),
    ("dispatch", {"tokens": torch.Tensor.double}, "weights must be float64, got float32"),
    ("combine", {"rows": shorter}, f"rows must be [R, H] with R = 64 {LIKE_SOURCES} [63, 4]"),
    (
        "combine",
        {"rows": torch.Tensor.half, "weights": torch.Tensor.double},
        "weights must be float32, got float64",
    ),
    ("route_dot", {"rows": narrower}, "rows must be [R, H] with R = 64, H = 4, got [64, 3]"),
    ("grouped_mm", {"capacity": 9}, "capacity must be R / E with R = 64, E = 8, got 9"),
    ("grouped_outer", {"capacity": 9}, "capacity must be R / E with R = 64, E = 8, got 9"),
    # Eight times as much is 2 ** 64, of which 64 bits keep 0.
    (
        "grouped_mm",
        {"rows": lambda x: x[:0], "capacity": 2**61},
        f"capacity must be R / E with R = 0, E = 8, got {2**61}",
    ),
    (
        "grouped_mm",
        {"weights": shorter},
        f"weights must be [E, N, M] with E = 8, M = 4 {LIKE_LOAD} [7, 2, 4]",
    ),
    ("grouped_mm", {"offsets": shorter}, f"offsets must be [E+1] with E+1 = 9 {LIKE_LOAD} [8]"),
    ("activate", {"pre_activation": narrower}, "pre_activation must be [R, 2F], got [R, 3]"),
    ("activate", {"activation": "silu"}, f"activation must be {ACTIVATIONS}, got silu"),
]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("op", "wrong", "message"), WRONG)
def test_sizes_numbers_and_names(op, wrong, message, where):
    assert error_of(op, wrong, where) == message


def with_value(index, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


SLOT = int(SAMPLES["dispatch"]["slots"][5, 1])
assert SLOT >= 0
ROUTED = ("dispatch", "combine", "route_dot", "combine_backward", "activate", "activate_backward")
FILLS = ("dispatch", "combine_backward", "activate", "activate_backward")  # they write rows
EXPERT_IDS = "expert_ids must be in -1..E-1 with E = 8, got"
SLOTS = "slots must be in -1..R-1 with R = 64, got"
OFFSETS = "offsets must rise from 0 to at most R = 64, got"

VALUES = [
    ("plan", {"expert_ids": with_value((3, 1), 8)}, f"{EXPERT_IDS} 8 at [3, 1]"),
    ("plan", {"expert_ids": with_value((4, 0), -2)}, f"{EXPERT_IDS} -2 at [4, 0]"),
    (
        "gate_backward",
        {"expert_ids": with_value((3, 1), -1)},
        "expert_ids must be in 0..E-1 with E = 8, got -1 at [3, 1]",
    ),
    *(
        (op, {"slots": with_value((5, 1), slot)}, f"{SLOTS} {slot} at [5, 1]")
        for op in ROUTED
        for slot in (64, -2)
    ),
    *((op, {"slots": torch.Tensor.flipud}, f"{ONE_PLAN} slot") for op in ROUTED),
    *((op, {"slots": with_value((5, 1), -1)}, f"{ONE_PLAN} route 11 at sources[") for op in FILLS),
    ("dispatch", {"sources": with_value(SLOT, 66)}, f"{ONE_PLAN} slot"),
    (
        "dispatch",
        {"slots": with_value((5, 1), -1), "sources": with_value(SLOT, 66)},
        "sources must be in -1..T*K-1 with T*K = 66, got 66 at [",
    ),
    ("grouped_mm", {"offsets": with_value(3, 65)}, f"{OFFSETS} 65 at [3]"),
    ("grouped_mm", {"offsets": with_value(0, 1)}, f"{OFFSETS} 1 at [0]"),
    ("grouped_mm", {"offsets": with_value(3, 0)}, f"{OFFSETS} 0 at [3]"),
    ("grouped_outer", {"load": with_value(2, -1)}, "load must not be negative, got -1 at [2]"),
]


@pytest.mark.parametrize("where", ["compiled", "reference"])
@pytest.mark.checks_values
@pytest.mark.parametrize(("op", "wrong", "message"), VALUES)
def test_values_on_the_cpu(op, wrong, message, where):
    if (op, where) == ("gate_backward", "reference"):
        # It stands in vmap too, where values cannot be read: torch's own indexing checks them.
        args = {**SAMPLES[op], "expert_ids": wrong["expert_ids"](SAMPLES[op]["expert_ids"])}
        with pytest.raises(RuntimeError, match="index -1 is out of bounds"):
            reference.gate_backward(**args)
        return
    assert error_of(op, wrong, where).startswith(message)


# ---- Functions that take a plan ------------------------------------------------------------------

PLAN = moe_ext.make_plan(SAMPLES["plan"]["expert_ids"], E, R // E)
X, ROWS, STACK = torch.randn(T, H), torch.randn(R, H), torch.randn(E, 3, H)


def test_an_argument_that_does_not_fit_its_plan_is_at_fault():
    """The plan was made before: the error names both."""
    modules, too_few = (ModuleExperts(torch.nn.Identity(), number) for number in (E, E - 1))
    of_slots, of_sources = f"T = 33 {LIKE_SLOTS} [5, 4]", f"R = 64 {LIKE_SOURCES} [5, 4]"
    for function, message in (
        (lambda: moe_ext.dispatch(X[:5], PLAN), f"tokens must be [T, H] with {of_slots}"),
        (lambda: moe_ext.route_dot(X[:5], ROWS, PLAN), f"tokens must be [T, H] with {of_slots}"),
        (lambda: moe_ext.combine(ROWS[:5], PLAN), f"rows must be [R, H] with {of_sources}"),
        (lambda: moe_ext.grouped_mm(ROWS[:5], STACK, PLAN), f"[R, M] with {of_sources}"),
        (lambda: modules(ROWS[:5], PLAN), f"rows must be [R, H] with {of_sources}"),
        (lambda: too_few(ROWS, PLAN), "ModuleExperts: load must be [E] with E = 7, got [8]"),
        (lambda: moe_ext.activate(ROWS[:5], PLAN, "relu"), f"[R, G] with {of_sources}"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            function()


@pytest.mark.parametrize(
    "wrong",
    [
        {"offsets": PLAN.offsets.long()},
        {"offsets": PLAN.offsets[1:]},
        {"offsets": with_value(3, 65)(PLAN.offsets)},
        {"offsets": with_value(3, 0)(PLAN.offsets)},
        {"load": PLAN.load.float()},
        {"load": with_value(2, -1)(PLAN.load)},
        {"capacity": 9},
        {"capacity": 2**61},
    ],
)
@pytest.mark.checks_values
def test_module_experts_refuse_the_plans_that_grouped_mm_refuses(wrong):
    plan = PLAN._replace(**wrong)
    args = ROWS, STACK, None, plan.offsets, plan.load, plan.capacity
    text = operator_error("grouped_mm", args, "compiled")
    with pytest.raises(RuntimeError, match=rf"^ModuleExperts: {re.escape(text)}\s*$"):
        ModuleExperts(torch.nn.Identity(), E)(ROWS, plan)


def test_feed_forward_is_told_when_it_scores():
    args = X, PLAN, torch.rand(T, K), STACK, STACK.mT, "relu"
    with pytest.raises(RuntimeError, match="score_before_experts must be True or False, got 'aft"):
        moe_ext.feed_forward(*args, score_before_experts="after")


PARAMETERS = {
    name: list(inspect.signature(function).parameters)
    for name, function in vars(moe_ext).items()
    if inspect.isfunction(function)
}


@pytest.mark.parametrize("name", [name for name in PARAMETERS if "plan" in PARAMETERS[name]])
def test_something_else_in_the_place_of_a_plan_is_named(name):
    x = torch.randn(4, 4)
    args = dict.fromkeys(PARAMETERS[name], x) | {"plan": moe_ext.gate(x, 2)}
    with pytest.raises(RuntimeError, match=f"{name}: plan must be a moe_ext.Plan.* got Choice"):
        getattr(moe_ext, name)(**args)


def test_something_else_in_the_place_of_a_tensor_is_named():
    with pytest.raises(RuntimeError, match="mask_weights: weights must be a tensor, got list"):
        moe_ext.mask_weights([[0.5]], PLAN)
    with pytest.raises(RuntimeError, match="tokens"):
        moe_ext.feed_forward([1.0], PLAN, torch.rand(T, K), STACK, STACK.mT, "relu")
