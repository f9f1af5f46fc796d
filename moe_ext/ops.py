"""Which code runs: the one place that decides it.

Every operator is `torch.ops.moe_ext.<name>`. Compiled libraries register kernels for a device;
`reference.py` is registered for all devices that have none, so torch's dispatcher makes the choice
per call. Where no library is built at all, the schemas come from the reference's signatures.

The operators are private; the functions of the package say what they take. Their gradients are
autograd.Functions (functional.py), which also stand behind the raw operators: a program from
torch.export, which calls those, can be trained.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from . import contracts, reference

NAMES = (
    "gate",
    "gate_backward",
    "plan",
    "dispatch",
    "combine",
    "route_dot",
    "grouped_mm",
    "grouped_outer",
)

_FAKES: dict[str, Callable] = {}


def _fake(function: Callable) -> Callable:
    _FAKES[function.__name__] = function
    return function


@_fake
def gate(logits, choice_scores, k, scoring, renormalise, scale):
    contracts.gate(logits, choice_scores, k, scoring, renormalise, scale)
    T, E = logits.shape
    dtype = contracts.accumulate_dtype(logits.dtype)
    return (
        logits.new_empty(T, k, dtype=dtype),
        logits.new_empty(T, k, dtype=torch.int32),
        logits.new_empty(T, E, dtype=dtype),
        logits.new_empty(E, dtype=dtype),
    )


@_fake
def gate_backward(
    grad_weights, grad_probs, grad_importance, probs, experts, scoring, renormalise, scale
):
    contracts.gate_backward(
        grad_weights, grad_probs, grad_importance, probs, experts, scoring, renormalise, scale
    )
    return probs.new_empty(probs.shape)


@_fake
def plan(experts, priority, num_experts, capacity, order, align):
    contracts.plan(experts, priority, num_experts, capacity, order, align)
    T, K = experts.shape
    rows = (
        contracts.dropless_rows(T * K, num_experts, align)
        if capacity is None
        else num_experts * capacity
    )
    return (
        experts.new_empty(T, K),
        experts.new_empty(rows),
        experts.new_empty(num_experts + 1),
        experts.new_empty(num_experts),
    )


@_fake
def dispatch(tokens, slots, sources, weights):
    contracts.dispatch(tokens, slots, sources, weights)
    return tokens.new_empty(sources.shape[0], tokens.shape[1])


@_fake
def combine(rows, slots, sources, weights):
    contracts.combine(rows, slots, sources, weights)
    return rows.new_empty(slots.shape[0], rows.shape[1])


@_fake
def route_dot(tokens, rows, slots, sources):
    contracts.route_dot(tokens, rows, slots, sources)
    return tokens.new_empty(slots.shape, dtype=contracts.accumulate_dtype(tokens.dtype))


@_fake
def grouped_mm(rows, weights, offsets, load):
    contracts.grouped_mm(rows, weights, offsets, load)
    return rows.new_empty(rows.shape[0], weights.shape[1])


@_fake
def grouped_outer(left, right, offsets, load):
    contracts.grouped_outer(left, right, offsets, load)
    return left.new_empty(load.shape[0], left.shape[1], right.shape[1])


class Registry:
    """The registrations of this process: a compiled library, if any, and the reference."""

    def __init__(self) -> None:
        self.library: Path | None = None
        self.load_error: str | None = None
        self._python: torch.library.Library | None = None
        self._gradients: dict[str, type[torch.autograd.Function]] = {}

    def load_installed(self) -> None:
        """Register the library that was built with the package, else the reference alone."""
        for path in sorted(Path(__file__).parent.glob("_C.*")):
            if path.suffix in (".so", ".pyd", ".dylib"):
                try:
                    self.load(path)
                    return
                except OSError as error:
                    self.load_error = f"{path.name} could not be loaded: {error}"
        if self.load_error is None:
            self.load_error = "no compiled library was built with this package"
        warnings.warn(
            f"moe_ext runs on its plain-PyTorch reference, which is slower: {self.load_error}. "
            "Install with a C++ compiler at hand, or call moe_ext.build.jit() in a source tree.",
            RuntimeWarning,
            stacklevel=3,
        )
        self._register_python()

    def load(self, path: Path) -> None:
        """Load a compiled library and use it from now on.

        Raises RuntimeError where one is loaded already: a second library with the same operators
        would end the process.
        """
        if self.library is not None:
            raise RuntimeError(f"moe_ext: a compiled library is already loaded, {self.library}")
        if self._python is not None:
            self._python._destroy()
            self._python = None
        try:
            torch.ops.load_library(str(path))
            self.library = path
            self.load_error = None
        finally:
            self._register_python()

    def _register_python(self) -> None:
        self._python = torch.library.Library("moe_ext", "FRAGMENT")
        for name in NAMES:
            function = getattr(reference, name)
            if self.library is None:
                schema = torch.library.infer_schema(function, mutates_args=())
                self._python.define(name + schema)
            self._python.impl(name, function, "CompositeExplicitAutograd")
            torch.library.register_fake(f"moe_ext::{name}", _FAKES[name], lib=self._python)
        self.register_gradients(self._gradients)

    def register_gradients(self, functions: dict[str, type[torch.autograd.Function]]) -> None:
        """Stand autograd.Functions of the operators' arguments behind them."""
        self._gradients = functions
        for name, function in functions.items():
            self._python.impl(name, _differentiable(name, function), "Autograd")


def _differentiable(name: str, function: type[torch.autograd.Function]) -> Callable:
    def kernel(*args):
        # A Function calls the operator with gradients off: that call goes on to the kernels.
        if torch.is_grad_enabled() and any(
            isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args
        ):
            return function.apply(*args)
        return _below_autograd(name, *args)

    return kernel


def _below_autograd(name: str, *args):
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.moe_ext, name).default(*args)


def run(name: str, *args):
    """Call an operator from its autograd.Function."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.moe_ext, name).default(*args)
    # Not by way of the Function again.
    return _below_autograd(name, *args)


def backend(name: str, device: torch.device | str) -> str:
    """What runs operator `name` on a device: "compiled" or "reference"."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(torch.device(device).type)
    if key and torch._C._dispatch_has_kernel_for_dispatch_key(f"moe_ext::{name}", key):
        return "compiled"
    return "reference"


registry = Registry()
registry.load_installed()
