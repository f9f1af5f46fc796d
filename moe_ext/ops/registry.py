"""Which code runs: the one place that decides it.

Every operator is `torch.ops.moe_ext.<name>`. Compiled libraries register kernels for a device;
`reference.py` is registered for all devices that have none, and `torch_grouped_mm.py` before it for
expert GEMMs, so torch's dispatcher makes the choice per call. The schemas come from the contracts,
in the library too.

The operators are private; the functions of the package say what they take. Their gradients are
autograd.Functions (autograd.py), which also stand behind the raw operators: a program from
torch.export, which calls those, can be trained. torch.func does not reach through them.
"""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import memory, toolkit
from . import checks, composed, contracts, reference, tensor_cores, torch_grouped_mm
from .checks import is_exporting as is_exporting
from .contracts import CONTRACTS

NAMES = tuple(CONTRACTS)


def inside(name: str, *args):
    """An operator that another one is made of."""
    product = product_inside(name, args)
    return product(*args) if product else getattr(torch.ops.moe_ext, name).default(*args)


def product_inside(name: str, args: tuple) -> Callable | None:
    """A product by torch for an operator that is made of others. Inside of it, rows without a route
    are zero, and nobody reads what a product makes of them: it needs no copies."""
    is_torchs = name in torch_grouped_mm.INSIDE and backend(name, args[0].device) != "compiled"
    return torch_grouped_mm.INSIDE[name] if is_torchs else None


def whole(name: str, args: tuple) -> Callable | None:
    """The kernels of a whole operator that is else made of others, where they take its products."""
    if name not in tensor_cores.NAMES:
        return None
    names = [argument.name for argument in contracts.PARSED[name].arguments]
    tokens, up, down = (args[names.index(it)] for it in ("tokens", "up", "down"))
    widths = (*up.shape[1:], down.shape[2])
    # A product alone is widened with zeros; rows of no token are left to what checks them.
    if 1 in widths or not len(tokens):
        return None
    path, _ = torch_grouped_mm.choose(tokens, widths, up.shape[0], None)
    return tensor_cores.operator(name) if path == "own" else None


def _composed(name: str) -> Callable:
    def run(*args):
        contracts.check(name, args)
        kernels = whole(name, args)
        return kernels(*args) if kernels else composed.OPERATORS[name](inside, *args)

    return run


COMPOSED = {name: _composed(name) for name in composed.OPERATORS}
_IN_PYTHON = torch_grouped_mm.OPERATORS | COMPOSED


def _in_onnx(name: str) -> Callable:
    """An operator as torch operators. It checks no values: an ONNX graph cannot raise."""
    if name == "grouped_mm":
        return torch_grouped_mm.of_all_rows
    if name in composed.OPERATORS:
        return functools.partial(composed.OPERATORS[name], lambda op, *args: _IN_ONNX[op](*args))
    return inspect.unwrap(getattr(reference, name))


# Without quantized_mm: ONNX has no form for packed weights, and the export's error names it.
_IN_ONNX = {
    name: _in_onnx(name)
    for name in (
        *("gate", "plan", "balance", "mask_weights", "dispatch", "combine", "route_dot"),
        *("grouped_mm", "activate", "feed_forward"),
    )
}

# Operators beside the contracts: the schema, and the kernel for devices that have none.
BESIDE: dict[str, tuple[str, Callable]] = {
    "products": ("(Tensor rows) -> str", torch_grouped_mm.products),
    "zero_empty_groups": (
        "(Tensor(a!) sums, Tensor offsets) -> ()",
        torch_grouped_mm.zero_empty_groups,
    ),
    "keep_memory": ("(Tensor like, int? limit) -> (int, int)", memory.keep_none),
    "cpu_features": ("(Tensor like) -> (str, str)", lambda like: ("", "")),
}

# Operators of the contracts that a library also has for tensor cores.
_ON_TENSOR_CORES = {
    f"tensor_{name}": contracts.PARSED[name].schema.replace(") -> ", ", bool allow_tf32) -> ")
    for name in tensor_cores.NAMES
}


def _empty_like(argument: Tensor | None, first: Tensor) -> Tensor:
    if argument is None:
        return first.new_empty(0)
    if argument.dim() == 3 and checks.is_transposed(argument):
        return argument.new_empty(argument.mT.shape).mT
    return argument.new_empty(argument.shape)


def fake(op: str) -> Callable:
    """An operator that gives shapes and dtypes alone."""
    contract = contracts.PARSED[op]
    names = [argument.name for argument in contract.arguments]
    like = next(i for i, argument in enumerate(contract.arguments) if not argument.is_optional)

    def operator(*args):
        sizes = contracts.check(op, args)
        values = dict(zip(names, args, strict=True))

        def empty(result: contracts.Result) -> Tensor:
            if result.flag and not values[result.flag]:
                return args[like].new_empty(0)
            if result.dims is None:
                return _empty_like(values[result.kind], args[like])
            shape = [sizes["E"] + 1 if letter == "E+1" else sizes[letter] for letter in result.dims]
            if result.kind in values:
                dtype = values[result.kind].dtype
            elif result.kind == "acc":
                dtype = checks.accumulate_dtype(args[like].dtype)
            else:
                dtype = getattr(torch, result.kind)
            return args[like].new_empty(shape, dtype=dtype)

        results = tuple(map(empty, contract.results))
        return results[0] if len(results) == 1 else results

    return operator


class Libraries:
    """The registrations of this process: the compiled libraries, if any, and the reference."""

    _python: torch.library.Library

    def __init__(self) -> None:
        self.library: Path | None = None
        self.load_error: str | None = None
        self.cuda_library: Path | None = None
        self.cuda_load_error: str | None = None
        self._gradients: dict[str, type[torch.autograd.Function]] = {}

    def load_installed(self) -> None:
        """Register the library that was built with the package, else the reference alone."""
        folder = Path(__file__).parents[1]
        built = [p for p in folder.glob("_C.*") if p.suffix in (".so", ".pyd", ".dylib")]
        self.load_error = "no compiled library was built with this package"
        fix = "install it again where there is a C++ compiler; python -m moe_ext doctor says how"
        for path in built:
            try:
                self._load(path)
                break
            except OSError as error:
                self.load_error = f"{path.name} could not be loaded: {error.__cause__ or error}"
                fix = "install it again; python -m moe_ext doctor says how"
        self._register_python()
        if self.library is None:
            warnings.warn(
                f"moe_ext runs on its plain-PyTorch reference, which is slower: {self.load_error}. "
                f"To fix it, {fix}. In a source tree run pip install -e ., or call "
                "moe_ext.build.jit().",
                RuntimeWarning,
                stacklevel=3,
            )

    def load(self, path: Path) -> None:
        """Load a compiled library and use it from now on.

        Raises RuntimeError where one is loaded already: a second library with the same operators
        would end the process.
        """
        if self.library is not None:
            raise RuntimeError(f"moe_ext: a compiled library is already loaded, {self.library}")
        # The library defines the schemas that the reference's registration has defined.
        self._python._destroy()
        try:
            self._load(path)
        finally:
            self._register_python()

    def _load(self, path: Path) -> None:
        torch.ops.load_library(str(path))
        self.library, self.load_error = path, None
        self._load_cuda(path)
        for name in (*NAMES, *BESIDE, *_ON_TENSOR_CORES):
            operator = getattr(torch.ops.moe_ext, name, None)
            if operator is None or operator.default._schema != _schema(name):
                raise ImportError(
                    f"moe_ext: {path} was built from other sources than this package (operator "
                    f"{name}); build it again, with pip install or by removing it and jit()"
                )

    def _load_cuda(self, library: Path) -> None:
        """Load the CUDA kernels beside the CPU library, where torch has CUDA."""
        path = library.with_name(library.name.replace("_C", "_C_cuda", 1))
        if torch.version.cuda is None:
            self.cuda_load_error = "this torch has no CUDA"
        elif not path.exists():
            choice = toolkit.choose_toolkit()
            why = "" if choice.toolkit else f"; on this machine: {choice.why}"
            self.cuda_load_error = f"no CUDA kernels were built with this package{why}"
        else:
            try:
                if why := _why_not_for(torch.version.cuda, path):
                    self.cuda_load_error = why
                    warnings.warn(f"moe_ext: {why}", RuntimeWarning, stacklevel=5)
                    return
                torch.ops.load_library(str(path))
                self.cuda_library, self.cuda_load_error = path, None
            except OSError as error:
                self.cuda_load_error = (
                    f"{path.name} could not be loaded: {error.__cause__ or error}"
                )

    def _register_python(self) -> None:
        self._python = torch.library.Library("moe_ext", "FRAGMENT")
        for name in (*NAMES, *BESIDE, *_ON_TENSOR_CORES) if self.library is None else ():
            self._python.define(str(_schema(name)).removeprefix("moe_ext::"))
        for name in (*NAMES, *BESIDE):
            _, beside = BESIDE.get(name, (None, None))
            kernel = _IN_PYTHON.get(name) or beside or _loud_on_cuda(getattr(reference, name))
            self._python.impl(name, _without_autocast(kernel), "CompositeExplicitAutograd")
            shapes = fake(name) if name in CONTRACTS else kernel
            torch.library.register_fake(f"moe_ext::{name}", shapes, lib=self._python)
        self.register_gradients(dict(self._gradients))

    def register_gradients(self, functions: Mapping[str, type[torch.autograd.Function]]) -> None:
        """Stand autograd.Functions of the operators' arguments behind them, beside earlier ones."""
        self._gradients |= functions
        for name, function in functions.items():
            self._python.impl(name, _differentiable(name, function), "Autograd")


def _why_not_for(cuda: str, library: Path) -> str:
    """Why a CUDA library is not for a torch of this CUDA version, "" where it may be."""
    built = toolkit.cuda_build(library)
    if built is None or built.cuda.split(".")[0] == cuda.split(".")[0]:
        return ""
    return (
        f"{library.name} was built by CUDA {built.cuda}, torch {torch.__version__} is for CUDA "
        f"{cuda}; build it for this torch: {toolkit.install_again()}"
    )


def _schema(name: str) -> torch.FunctionSchema:
    beside, _ = BESIDE.get(name, (None, None))
    schema = beside or _ON_TENSOR_CORES.get(name) or contracts.PARSED[name].schema
    return torch._C.parse_schema(f"moe_ext::{name}{schema}")


def _loud_on_cuda(kernel: Callable) -> Callable:
    """The reference stands in on cuda where kernels could run: Python shows a warning once."""

    @functools.wraps(kernel)
    def loud(*args):
        if libraries.cuda_load_error and any(getattr(arg, "is_cuda", False) for arg in args):
            warnings.warn(
                "moe_ext runs on its plain-PyTorch reference on cuda, which is slower: "
                f"{libraries.cuda_load_error}; `python -m moe_ext doctor` says how to fix it",
                RuntimeWarning,
                stacklevel=2,
            )
        return kernel(*args)

    return loud


def _without_autocast(kernel: Callable) -> Callable:
    """The products inside take the operands' dtype: a backward may run where autocast is on and its
    forward's was off."""

    @functools.wraps(kernel)
    def plain(*args):
        # The first argument may be None.
        device_type = next(arg.device.type for arg in args if isinstance(arg, torch.Tensor))
        if not torch.is_autocast_enabled(device_type):
            return kernel(*args)
        with torch.autocast(device_type, enabled=False):
            return kernel(*args)

    return plain


def _differentiable(name: str, function: type[torch.autograd.Function]) -> Callable:
    def kernel(*args):
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        is_forward_mode = forward_ad._current_level >= 0
        if is_forward_mode and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(
                f"moe_ext::{name} has no jvp: forward-mode is not implemented"
            )
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            with torch._C._AutoDispatchBelowAutograd():
                return getattr(torch.ops.moe_ext, name).default(*args)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise NotImplementedError(
                f"moe_ext::{name}: torch.func does not differentiate raw operators, nor programs "
                "from torch.export; use the functions and modules of moe_ext"
            )
        return function.apply(*args)

    return kernel


def below_autograd() -> contextlib.AbstractContextManager:
    """For the forward of an autograd.Function: its operators skip the Functions behind them. What
    is traced does without, as a forward has no gradients."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


def operator(name: str) -> Callable:
    """What an autograd.Function calls: the operator; in an export to ONNX, torch's operators."""
    if checks.is_exporting_to_onnx() and name in _IN_ONNX:
        return _IN_ONNX[name]
    return getattr(torch.ops.moe_ext, name).default


def run(name: str, *args):
    """Call an operator from its autograd.Function."""
    with below_autograd():
        return operator(name)(*args)


def backend(name: str, device: torch.device | str) -> str:
    """What runs operator `name` on a device: "compiled", "torch" (torch_grouped_mm.py),
    "operators" (composed.py, of smaller ones), "reference", or "fake" on meta."""
    kind = torch.device(device).type
    if kind == "meta":
        return "fake"
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(kind)
    if key and torch._C._dispatch_has_kernel_for_dispatch_key(f"moe_ext::{name}", key):
        return "compiled"
    if kind == "cpu" or name not in _IN_PYTHON:
        return "reference"
    return "torch" if name in torch_grouped_mm.OPERATORS else "operators"


def why_reference(device: torch.device | str) -> str:
    """Why no compiled kernel runs on a device, "" where one does."""
    kind = torch.device(device).type
    errors = {
        "cpu": libraries.load_error,
        "cuda": libraries.cuda_load_error or libraries.load_error,
    }
    return errors.get(kind, f"there are no kernels for {kind}") or ""


libraries = Libraries()
libraries.load_installed()
