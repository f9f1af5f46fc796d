"""The operators' contracts, a line for each: schemas, checks, output shapes and fakes follow.

    dispatch: "tokens[T,H]:floating slots[T,K]:int32 ... weights[T,K]?:acc -> [R,H]:tokens"

Letters are sizes: T tokens, K choices, E experts, R rows, H hidden, N and M the widths of an
expert's weight, F an expert's inner size, G = 2F where its activation has a gate, else F. A weight
in a format has B bytes, S scales and Z bytes of zero points for a row of M numbers; rows of I
numbers become rows of O. A tensor has a shape and a dtype:

    floating    float32, float64, bfloat16 or float16
    acc         float64 beside float64 operands, else float32: the dtype of sums
    scale       of a format's scales: float32, bfloat16 or uint8
    int32, float32, uint8, or the name of the argument whose dtype it has

`?` marks what may be None. The other arguments have a schema's types. A result that is an
argument's name is laid out like it, and empty where that is None; `?flag` makes a result empty
unless the flag is set. csrc/contracts.h holds the same lines for the kernels; both raise the same
errors, so that a wrong argument fails alike on every backend and at compile time.
"""

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats import codes
from . import checks

CONTRACTS = {
    "gate": "logits[T,E]:floating choice_scores[T,E]?:logits k:SymInt scoring:str normalize:bool"
    " scale:float -> [T,K]:acc [T,K]:int32 [T,E]:acc [E]:acc",
    "gate_backward": "grad_weights[T,K]?:probs grad_probs[T,E]?:probs grad_importance[E]?:probs"
    " probs[T,E]:acc expert_ids[T,K]:int32 scoring:str normalize:bool scale:float -> [T,E]:probs",
    "plan": "expert_ids[T,K]:int32 priority[T,K]?:float32 num_experts:SymInt capacity:SymInt?"
    " order:str align:SymInt -> [T,K]:int32 [R]:int32 [E+1]:int32 [E]:int32",
    "balance": "importance[E]:acc load[E]:int32 expert_ids[T,K]:int32 choices:SymInt"
    " -> []:importance [E]:importance",
    "mask_weights": "weights[T,K]:acc slots[T,K]:int32 normalize:bool eps:float scale:float"
    " -> [T,K]:weights",
    "mask_weights_backward": "grad[T,K]:weights weights[T,K]:acc slots[T,K]:int32 normalize:bool"
    " eps:float scale:float -> [T,K]:weights",
    "dispatch": "tokens[T,H]:floating slots[T,K]:int32 sources[R]:int32 weights[T,K]?:acc"
    " -> [R,H]:tokens",
    "combine": "rows[R,H]:floating slots[T,K]:int32 sources[R]:int32 weights[T,K]?:acc"
    " -> [T,H]:rows",
    "route_dot": "tokens[T,H]:floating rows[R,H]:tokens slots[T,K]:int32 sources[R]:int32"
    " -> [T,K]:acc",
    "combine_backward": "tokens[T,H]:floating rows[R,H]:tokens slots[T,K]:int32 sources[R]:int32"
    " weights[T,K]:acc -> [R,H]:rows [T,K]:weights",
    "grouped_mm": "rows[R,M]:floating weights[E,N,M]:rows bias[E,N]?:rows offsets[E+1]:int32"
    " load[E]:int32 capacity:SymInt? -> [R,N]:rows",
    "grouped_outer": "left[R,N]:floating right[R,M]:left offsets[E+1]:int32 load[E]:int32"
    " capacity:SymInt? -> [E,N,M]:left",
    "quantized_mm": "rows[R,I]:floating values[E,N,B]:uint8 scales[E,N,S]:scale zeros[E,N,Z]?:uint8"
    " bias[E,O]?:rows offsets[E+1]:int32 load[E]:int32 format:str transposed:bool int8_rows:bool"
    " capacity:SymInt? -> [R,O]:rows",
    "activate": "pre_activation[R,G]:floating slots[T,K]:int32 sources[R]:int32 weights[T,K]?:acc"
    " activation:str -> [R,F]:pre_activation",
    "activate_backward": "grad[R,F]:pre_activation pre_activation[R,G]:floating slots[T,K]:int32"
    " sources[R]:int32 weights[T,K]:acc activation:str"
    " -> [R,G]:pre_activation [R,F]:pre_activation [T,K]:weights",
    "feed_forward": "tokens[T,H]:floating slots[T,K]:int32 sources[R]:int32 offsets[E+1]:int32"
    " load[E]:int32 weights[T,K]:acc up[E,G,H]:floating down[E,H,F]:tokens up_bias[E,G]?:tokens"
    " down_bias[E,H]?:tokens activation:str score_before_experts:bool capacity:SymInt? keeps:bool"
    " -> [T,H]:tokens [R,G]:tokens?keeps",
    "feed_forward_backward": "grad[T,H]:tokens tokens[T,H]:floating pre_activation[R,G]:tokens"
    " slots[T,K]:int32 sources[R]:int32 offsets[E+1]:int32 load[E]:int32 weights[T,K]:acc"
    " up[E,G,H]:floating down[E,H,F]:tokens up_bias[E,G]?:tokens down_bias[E,H]?:tokens"
    " activation:str score_before_experts:bool capacity:SymInt? needs_tokens:bool needs_up:bool"
    " needs_down:bool -> [T,H]:tokens?needs_tokens up?needs_up down?needs_down up_bias?needs_up"
    " down_bias?needs_down [T,K]:weights",
}

SCALES = (torch.float32, torch.bfloat16, torch.uint8)

# The tensors of a plan, which was made before: what does not fit them is at fault.
PLAN = ("slots", "sources", "load")

Sizes = dict[str, int]


class Argument(NamedTuple):
    """A word of a contract.

    Attributes:
        name: as in the schema
        dims: the letters of a tensor's shape; None for a number, a name or a flag
        kind: the dtype of a tensor, the schema's type of another argument
        is_optional: may be None
    """

    name: str
    dims: tuple[str, ...] | None
    kind: str
    is_optional: bool

    @property
    def schema(self) -> str:
        kind = self.kind if self.dims is None else "Tensor"
        return f"{kind}{'?' if self.is_optional else ''} {self.name}"

    @property
    def turn(self) -> int:
        """When it is checked: a tensor after those that give its sizes and its dtype."""
        if self.is_optional:
            return 5
        if self.kind == "int32":
            return 1 if "E+1" in (self.dims or ()) else 0
        return {"floating": 2, "acc": 3, "uint8": 3, "scale": 3}.get(self.kind, 4)


class Result(NamedTuple):
    """A word after the arrow.

    Attributes:
        dims: the letters of its shape; None where it is laid out like an argument
        kind: its dtype, or the argument it is like
        flag: the argument without which it is empty; None if it never is
    """

    dims: tuple[str, ...] | None
    kind: str
    flag: str | None


class Contract(NamedTuple):
    """A parsed line."""

    arguments: tuple[Argument, ...]
    results: tuple[Result, ...]

    @property
    def schema(self) -> str:
        taken = ", ".join(argument.schema for argument in self.arguments)
        given = ", ".join("Tensor" for _ in self.results)
        return f"({taken}) -> {given if len(self.results) == 1 else f'({given})'}"


_WORD = re.compile(r"(\w+)(?:\[([\w+,]+)\])?(\?)?:(\w+)(\?)?")
_RESULT = re.compile(r"(?:\[([\w+,]*)\]:)?(\w+)(?:\?(\w+))?")


def parse(line: str) -> Contract:
    def argument(word: str) -> Argument:
        match = _WORD.fullmatch(word)
        assert match, f"not a word of a contract: {word}"
        name, dims, optional_tensor, kind, optional = match.groups()
        letters = tuple(dims.split(",")) if dims else None
        return Argument(name, letters, kind, bool(optional_tensor or optional))

    def result(word: str) -> Result:
        match = _RESULT.fullmatch(word)
        assert match, f"not a result of a contract: {word}"
        dims, kind, flag = match.groups()
        letters = None if dims is None else tuple(filter(None, dims.split(",")))
        return Result(letters, kind, flag)

    taken, given = line.split(" -> ")
    return Contract(tuple(map(argument, taken.split())), tuple(map(result, given.split())))


PARSED = {name: parse(line) for name, line in CONTRACTS.items()}


def check(op: str, args: Sequence) -> Sizes:
    """Raise a RuntimeError that names the argument that breaks the contract; return all sizes."""
    arguments = PARSED[op].arguments
    values = dict(zip((argument.name for argument in arguments), args, strict=True))
    tensors = sorted(
        (argument for argument in arguments if argument.dims is not None),
        key=lambda argument: argument.turn,
    )
    checking = _Checking(op, values, next(a.name for a in arguments if not a.is_optional))
    for argument in tensors:
        if values[argument.name] is not None or not argument.is_optional:
            checking.is_tensor(argument.name, values[argument.name])
    for argument in tensors:
        if argument.turn < 4:
            checking.tensor(argument)
    for name, value in values.items():
        if name in checks.NAMES:
            checking.one_of(name, value, checks.NAMES[name])
        elif name in ("eps", "scale"):
            checking.finite(name, value)
    _RULES.get(op, lambda checking: None)(checking)
    for argument in tensors:
        if argument.turn >= 4 and values[argument.name] is not None:
            checking.tensor(argument)
    # Routes and rows are numbered in int32.
    if "T" in checking.sizes:
        checking.int32_size("T * K", checking.sizes["T"] * checking.sizes["K"])
    if "R" in checking.sizes:
        checking.int32_size("rows", checking.sizes["R"])
    return checking.sizes


class _Checking(checks.Check):
    """The arguments of one call, and the sizes that they have given so far."""

    def __init__(self, op: str, values: dict, first: str) -> None:
        super().__init__(op)
        self.values = values
        self.first = first  # gives the device
        self.sizes: Sizes = {}
        self.givers: dict[str, str] = {}  # of a plan: the tensor that gave a letter's size

    def tensor(self, argument: Argument) -> None:
        name, value = argument.name, self.values[argument.name]
        assert argument.dims is not None
        dims = [(letter, self.size(letter)) for letter in argument.dims]
        if not checks.fits(value, dims):
            self.wrong_shape(name, value, dims, self._giver(value, dims))
        for letter, size in zip(argument.dims, value.shape, strict=True):
            if letter not in self.sizes and letter != "E+1":
                self.sizes[letter] = size
                if name in PLAN:
                    self.givers[letter] = name
        self._dtype(argument, value)
        self.same_device(name, value, self.first, self.values[self.first])

    def size(self, letter: str) -> int | None:
        if letter == "E+1":
            return self.sizes["E"] + 1
        return self.sizes.get(letter)

    def _giver(self, value: Tensor, dims: checks.Dims) -> tuple[str, Tensor] | None:
        """The plan's tensor that `value` does not fit, for the error."""
        for i, (letter, size) in enumerate(dims):
            giver = self.givers.get(letter[0])
            if giver and (value.dim() != len(dims) or value.shape[i] != size):
                return giver, self.values[giver]
        return None

    def _dtype(self, argument: Argument, value: Tensor) -> None:
        name, kind = argument.name, argument.kind
        if kind == "floating":
            self.floating(name, value)
        elif kind == "acc":
            self.dtype(name, value, *self.acc())
        elif kind == "scale":
            self.dtype(name, value, *SCALES)
        elif kind in self.values:
            self.same_dtype(name, value, kind, self.values[kind])
        else:
            self.dtype(name, value, getattr(torch, kind))

    def acc(self) -> tuple[torch.dtype, ...]:
        """The dtypes that sums may have beside these operands."""
        floating = (a.name for a in PARSED[self.op].arguments if a.kind == "floating")
        operand = next(floating, None)
        if operand is None:
            return torch.float32, torch.float64
        return (checks.accumulate_dtype(self.values[operand].dtype),)


# ---- What a line cannot say: sizes that follow from numbers and names ----------------------------


def _gate(call: _Checking) -> None:
    k, E = call.values["k"], call.sizes["E"]
    if k < 1 or k > E:
        call.fail(f"k must be in 1..E with E = {E}, got {k}")
    call.sizes["K"] = k


def _plan(call: _Checking) -> None:
    E, capacity, align = (call.values[name] for name in ("num_experts", "capacity", "align"))
    if E < 1:
        call.fail(f"num_experts must be at least 1, got {E}")
    call.int32_size("num_experts", E)
    if align < 1:
        call.fail(f"align must be at least 1, got {align}")
    call.int32_size("align", align)
    if capacity is not None:
        if capacity < 0:
            call.fail(f"capacity must not be negative, got {capacity}")
        call.int32_size("capacity", capacity)
        if align != 1:
            call.fail(f"align must be 1 where there is a capacity, got {align}")
    num_routes = call.sizes["T"] * call.sizes["K"]
    call.sizes["E"] = E
    call.sizes["R"] = (
        checks.dropless_rows(num_routes, E, align) if capacity is None else E * capacity
    )


def _balance(call: _Checking) -> None:
    K, choices = call.sizes["K"], call.values["choices"]
    if choices < 1 or choices > K:
        call.fail(f"choices must be in 1..K with K = {K}, got {choices}")


def _activate(call: _Checking) -> None:
    activation, G = call.values["activation"], call.sizes["G"]
    if activation not in checks.GATED:
        call.sizes["F"] = G
        return
    if G % 2 != 0:
        call.fail(f"pre_activation must be [R, 2F], got [R, {G}]")
    call.sizes["F"] = G // 2


def _feed_forward(call: _Checking) -> None:
    up, G = call.values["up"], call.sizes["G"]
    call.same_dtype("up", up, "tokens", call.values["tokens"])
    has_gate = call.values["activation"] in checks.GATED
    if has_gate and G % 2 != 0:
        call.fail(f"up must be [E, 2F, H], got {list(up.shape)}")
    call.sizes["F"] = G // 2 if has_gate else G
    _grouped(call)


def _quantized_mm(call: _Checking) -> None:
    format, (B, S, N) = call.values["format"], (call.sizes[letter] for letter in "BSN")
    call.dtype("scales", call.values["scales"], codes.FORMATS[format].scales)
    M = B * 8 // codes.FORMATS[format].bits
    if not codes.has_groups(format, M, S):
        sizes = codes.group_sizes(format)
        call.fail(f"scales must be one for {sizes} numbers of a row, got {S} for {M}")
    if call.values["zeros"] is not None and format != "int4":
        call.fail(f"zeros must be None for {format}")
    if call.values["transposed"] and call.values["bias"] is not None:
        call.fail("bias must be None for transposed weights")
    call.sizes["Z"] = (S + 1) // 2
    taken, call.sizes["O"] = (N, M) if call.values["transposed"] else (M, N)
    if call.sizes["I"] != taken:
        call.fail(f"rows must be [R, {taken}] for such a weight, got [R, {call.sizes['I']}]")
    _grouped(call)


def _grouped(call: _Checking) -> None:
    checks.planned_capacity(call, call.values["capacity"], call.sizes["R"], call.sizes["E"])


_RULES: dict[str, Callable[[_Checking], None]] = {
    "gate": _gate,
    "plan": _plan,
    "balance": _balance,
    "activate": _activate,
    "activate_backward": _activate,
    "grouped_mm": _grouped,
    "quantized_mm": _quantized_mm,
    "grouped_outer": _grouped,
    "feed_forward": _feed_forward,
    "feed_forward_backward": _feed_forward,
}


def checked(function: Callable) -> Callable:
    """An operator in Python that checks its arguments first, on the CPU a plan's values too."""
    op, signature = function.__name__, inspect.signature(function)
    names = list(signature.parameters)
    has_routes = {"slots", "sources"} <= set(names)
    writes_rows = any(result.dims and result.dims[0] == "R" for result in PARSED[op].results)

    @functools.wraps(function)
    def operator(*args, **kwargs):
        args = signature.bind(*args, **kwargs).args
        check(op, args)
        if has_routes:
            slots, sources = (args[names.index(name)] for name in ("slots", "sources"))
            if slots.device.type == "cpu":
                checks.route_values(op, slots, sources)
                if writes_rows:
                    checks.source_values(op, slots, sources)
        return function(*args)

    return operator
