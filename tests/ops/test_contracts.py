"""Laws that hold for every operator; the arguments follow from the contracts."""

import ast
import itertools
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import DTYPES, WHERE, assert_near, call_operator, operator_error

from moe_ext.ops import contracts, registry, samples

TENSORS = [
    (op, i, argument)
    for op, contract in contracts.PARSED.items()
    for i, argument in enumerate(contract.arguments)
    if argument.dims is not None
]
GEMMS = ("grouped", "quantized", "feed_forward")
each_operator = pytest.mark.parametrize("op", registry.NAMES)
each_tensor = pytest.mark.parametrize(
    ("op", "i", "argument"), TENSORS, ids=lambda value: getattr(value, "name", value)
)


def same_error(op, args):
    """The error that all backends raise alike."""
    (text,) = {operator_error(op, args, where) for where in WHERE}
    return text


def replaced(args, i, value):
    return (*args[:i], value, *args[i + 1 :])


def assert_same(results, others):
    for one, other in zip(results, others, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_the_kernels_have_the_same_contracts():
    header = Path(__file__).parents[2] / "csrc" / "contracts.h"
    table = re.search(r"kContracts\[\] = \{(.*?)\n\};", header.read_text(), re.DOTALL).group(1)
    lines = dict(re.findall(r'\{"(\w+)",\s*((?:"[^"]*"\s*)+)\}', table))
    assert {op: ast.literal_eval(f"({text})") for op, text in lines.items()} == contracts.CONTRACTS


@each_operator
@pytest.mark.parametrize("dtype", DTYPES)
def test_fakes_have_the_shapes_and_dtypes_of_results(op, dtype, device):
    args = samples.arguments(op, device, dtype)
    forms = [[(r.shape, r.dtype) for r in call_operator(op, args, where)] for where in WHERE]
    assert forms == [forms[0]] * len(WHERE)


@each_operator
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_again(op, dtype, device, poisoned, request):
    """On any number of threads, or in any order of emulated ones; a GEMM's rounding may depend on
    how many threads there are."""
    is_gemm, cusim = op.startswith(GEMMS), request.config.cusim
    T = 100 if is_gemm and cusim else 2000  # emulated products take long
    args = samples.arguments(op, device, dtype, T=T, K=3, E=16, H=100, F=300)
    change, values = torch.set_num_threads, (1, 2, 3)
    usual, calls = torch.get_num_threads(), 7 if is_gemm else 1
    if cusim:
        change, values = cusim.set_order, ("forward", "reverse", "random1")
        usual, calls = request.config.getoption("--cusim-order"), 1
    request.addfinalizer(partial(change, usual))
    first = None
    for value in values:
        change(value)
        if first is None or (is_gemm and not cusim):
            first = [result.clone() for result in call_operator(op, args)]
        for _ in range(calls):
            assert_same(call_operator(op, args), first)


def turned(tensor):
    return tensor.mT.contiguous().mT


def spaced(tensor):
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


@each_operator
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lay_out", [turned, spaced])
def test_strides_do_not_matter(op, dtype, device, lay_out):
    """Every argument laid out another way gives the same bits, but for GEMMs' rounding."""
    args = samples.arguments(op, device, dtype, K=3)
    others = tuple(lay_out(a) if isinstance(a, torch.Tensor) and a.dim() > 1 else a for a in args)
    assert any(not tensor.is_contiguous() for tensor in samples.tensors(others))
    results = call_operator(op, args), call_operator(op, others)
    if op.startswith(GEMMS):
        assert_near(*results, 10 * torch.finfo(dtype).eps)
    else:
        assert_same(*results)


def other_arguments(op):
    """No optional tensors, and other names."""
    other = {"scoring": "sigmoid", "activation": "geglu", "normalize": False, "order": "token"}
    other |= {"score_before_experts": True, "keeps": False, "needs_up": False}
    arguments = contracts.PARSED[op].arguments
    return tuple(
        None if argument.dims and argument.is_optional else other.get(argument.name, value)
        for argument, value in zip(arguments, samples.arguments(op), strict=True)
    )


@each_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "float32, other arguments"])
def test_opcheck(op, dtype):
    is_dtype = isinstance(dtype, torch.dtype)
    args = samples.arguments(op, dtype=dtype) if is_dtype else other_arguments(op)
    operator = getattr(torch.ops.moe_ext, op).default
    torch.library.opcheck(operator, args)
    leaves = tuple(
        a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in args
    )
    if op != "plan":
        torch.library.opcheck(operator, leaves)


@pytest.mark.parametrize("align", [1, 4])
def test_opcheck_of_a_plan_without_capacity(align):
    expert_ids = samples.arguments("plan")[0]
    args = expert_ids, None, 8, None, "token", align
    torch.library.opcheck(torch.ops.moe_ext.plan.default, args)


# ---- Wrong tensors: all backends raise the same error --------------------------------------------


@each_tensor
def test_a_wrong_rank(op, i, argument):
    args = samples.arguments(op)
    letters = ", ".join(argument.dims)
    wrong = args[i].unsqueeze(0)
    text = same_error(op, replaced(args, i, wrong))
    assert text.startswith(f"{argument.name} must be [{letters}]")
    assert text.endswith(f", got {list(wrong.shape)}")


@each_tensor
def test_a_wrong_size(op, i, argument):
    """An argument that has the size is named, and both sizes."""
    args = samples.arguments(op)
    shapes = {a.name: a.dims for a in contracts.PARSED[op].arguments if a.dims}
    for dim, letter in enumerate(argument.dims):
        sharing = [name for name, dims in shapes.items() if letter[0] in "".join(dims)]
        if len(sharing) == 1:
            continue
        size = args[i].shape[dim]
        text = same_error(op, replaced(args, i, args[i].narrow(dim, 0, size - 1)))
        assert re.match(rf"({'|'.join(sharing)}|k|capacity) must be ", text)
        assert f"{letter[0]} = " in text or f"{letter[0]}+1 = " in text or "2F" in text


WRONG_NUMBERS = {
    "scoring": ["tanh"],
    "order": ["expert"],
    "activation": ["silu"],
    "eps": [float("nan")],
    "scale": [float("inf")],
    "k": [0, 99],
    "num_experts": [0, 2**31],
    "capacity": [-1, 3, 2**31],
    "align": [0, 2, 2**31],
}


def wrong_values(argument, value):
    if argument.dims is None:
        return WRONG_NUMBERS.get(argument.name, [])
    other = torch.int64 if value.is_floating_point() else torch.int16
    return [value.unsqueeze(0), value[1:], value[..., 1:], value.to(other)]


def outcome(op, args, where):
    """The first line of the error; "" where two changes make other arguments that are right."""
    try:
        call_operator(op, args, where)
    except RuntimeError as error:
        return str(error).split("\n")[0]
    return ""


@pytest.mark.checks_values
@each_operator
def test_of_two_faults_the_same_one_is_named(op):
    args, arguments = samples.arguments(op), contracts.PARSED[op].arguments
    faults = [
        (i, wrong)
        for i, (argument, value) in enumerate(zip(arguments, args, strict=True))
        for wrong in wrong_values(argument, value)
    ]
    for (i, wrong), (j, other) in itertools.combinations(faults, 2):
        if i != j:
            changed = replaced(replaced(args, i, wrong), j, other)
            texts = [outcome(op, changed, where) for where in ("compiled", "reference")]
            assert texts[0] == texts[1]


KINDS = {
    "floating": "float32, float64, bfloat16 or float16",
    "float32": "float32",
    "int32": "int32",
    "uint8": "uint8",
    "scale": "float32, bfloat16 or uint8",
}


@each_tensor
def test_a_wrong_dtype(op, i, argument):
    args = samples.arguments(op)
    wrong = torch.int64 if argument.kind in ("floating", "int32") else torch.float16
    text = same_error(op, replaced(args, i, args[i].to(wrong)))
    has_operand = any(a.kind == "floating" for a in contracts.PARSED[op].arguments)
    acc = "float32" if has_operand else "float32 or float64"
    expected = KINDS.get(argument.kind, acc if argument.kind == "acc" else "float32")
    like = f" like {argument.kind}" if argument.kind not in (*KINDS, "acc") else ""
    got = str(wrong).removeprefix("torch.")
    assert text == f"{argument.name} must be {expected}{like}, got {got}"


@each_tensor
def test_a_wrong_device(op, i, argument):
    args = samples.arguments(op)
    text = operator_error(op, replaced(args, i, args[i].to("meta")), "compiled")
    assert re.match(r"\w+ must be on (cpu|meta) like \w+, got (cpu|meta)$", text)


@pytest.mark.parametrize("where", ["compiled", "reference"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dtypes_have_their_names_in_python(where):
    args = samples.arguments("plan")
    dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    assert len(dtypes) > 40
    newer = getattr(torch, "bcomplex32", None)  # of torch 2.15: older headers have no name for it
    for dtype in dtypes - {torch.int32}:
        name = str(dtype).removeprefix("torch.")
        if dtype is newer and where == "compiled":
            name = f"({name}|unknown_scalar)"
        wrong = torch.empty(args[0].shape, dtype=dtype)
        text = operator_error("plan", replaced(args, 0, wrong), where)
        assert re.match(rf"expert_ids must be int32, got {name}\b", text)
