"""Show which code a call of a layer runs, and why not a faster one."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from ..layer import Layer
from ..ops import composed, reference, registry, torch_grouped_mm
from .patching import entry, is_of_transformers, named_layers, replaced

# Operators that copy values of a tensor, or their number, to the host.
_READS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive"),
}
_HOST = "cpu"


class Call(NamedTuple):
    """One call of an operator of moe_ext.

    Attributes:
        operator: the operator's name
        operands: the dtype of its first tensor, and the shapes of all
        backend: "compiled", "torch" or "reference", as `registry.backend` returns it
        how: the path that ran, and why not a faster one; "" if there is only one path
        synchronisations: how often the host waited for the device
        layer: the name of the calling layer, "" outside of layers
    """

    operator: str
    operands: str
    backend: str
    how: str
    synchronisations: int
    layer: str = ""


class Explanation(NamedTuple):
    """The operators that a call ran. Prints as a table.

    Attributes:
        calls: operators of moe_ext, in order
        others: how often each other operator ran, without those inside of `calls`
        synchronisations: how often the host waited for the device outside of `calls`
        notes: layers whose experts run one after the other, or without moe_ext
        is_away: whether anything ran on another device than the CPU
    """

    calls: list[Call]
    others: dict[str, int]
    synchronisations: int
    notes: list[str]
    is_away: bool

    def __str__(self) -> str:
        lines = [*_table(self.calls), *self.notes]
        names = (f"{name} {n}" for name, n in Counter(self.others).most_common())
        lines.append(f"other operators: {', '.join(names) or 'none'}")
        waits = self.synchronisations + sum(call.synchronisations for call in self.calls)
        often = f"{waits} times" if waits else "never"
        often = often if self.is_away else "never, all ran on the CPU"
        lines.append(f"the host waits for the device: {often}")
        return "\n".join(lines)


def _table(calls: list[Call]) -> Iterator[str]:
    """Lines for the calls of every layer; adjacent layers with equal calls are shown once."""
    if not calls:
        yield "no operator of moe_ext ran"
        return
    of_layers = [
        (name, [(c.operator, c.operands, c.backend + (c.how and f": {c.how}")) for c in group])
        for name, group in groupby(calls, key=lambda call: call.layer)
    ]
    head = ("operator", "operands", "runs")
    rows = [head, *(row for _, group in of_layers for row in group)]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]

    def line(row: tuple[str, str, str]) -> str:
        return f"  {row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}"

    yield line(head)
    for group, alike in groupby(of_layers, key=lambda of_layer: of_layer[1]):
        first, *others = [name for name, _ in alike]
        more = f" to {others[-1]}, {1 + len(others)} alike" if others else ""
        yield f"{first or 'outside of layers'}{more}:"
        yield from map(line, group)


def explain(layer: nn.Module, /, *args: Any, **kwargs: Any) -> Explanation:
    """Call `layer(*args, **kwargs)` once, and return which operators it ran.

    The call is eager and without gradients. Random generators, buffers and the layers are restored:
    later calls give the results that they would have given.

        print(moe_ext.explain(layer, hidden))

    Args:
        layer: a MOELayer, or any module, as a model of transformers
        *args: arguments of the call
        **kwargs: keyword arguments of the call
    """
    trace = _Trace()
    layers = list(named_layers(layer))
    with (
        torch.no_grad(),
        # Compiled code would hide its operators.
        torch.compiler.set_stance("force_eager"),
        _random_state_restored(layer),
        _buffers_restored(layer),
        replaced(_watched(layers, trace)),
        trace,
    ):
        layer(*args, **kwargs)
    notes = [note for name, module in layers for note in _notes(name, module)]
    notes += _other_implementations(layer)
    if not layers and not notes:
        notes.append(f"{type(layer).__name__} has no MOELayer, nor experts of transformers")
    return Explanation(trace.calls, dict(trace.others), trace.reads, notes, trace.is_away)


def _random_state_restored(module: nn.Module) -> AbstractContextManager[None]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.random.fork_rng([])
    kind = accelerator.type
    devices = {p.device.index for p in module.parameters() if p.device.type == kind}
    here = torch.accelerator.current_device_index()
    return torch.random.fork_rng(devices | {here}, device_type=kind)


@contextmanager
def _buffers_restored(module: nn.Module) -> Iterator[None]:
    """Those of a BatchNorm change in training."""
    before = [
        (part, name, buffer, buffer.clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if part.training and buffer is not None and not (is_lazy(buffer) or buffer.is_meta)
    ]
    try:
        yield
    finally:
        for part, name, buffer, old in before:
            part._buffers[name] = buffer
            if not torch.equal(buffer, old):
                buffer.copy_(old)


def _watched(layers: list, trace: "_Trace") -> Iterator[tuple[nn.Module, str, object]]:
    for name, module in layers:
        method = entry(module)
        yield module, method, _in_layer(name, trace)(getattr(module, method))
        yield module, "observer", None
        for part in module.modules():
            if hasattr(part, "wall_clock_breakdown"):
                yield part, "wall_clock_breakdown", False
            # Modules of others may have an attribute of this name.
            unobserved = getattr(part, "unobserved", None)
            if callable(unobserved):
                yield from ((part, attribute, value) for attribute, value in unobserved().items())


@contextmanager
def _in_layer(name: str, trace: "_Trace") -> Iterator[None]:
    outer, trace.layer = trace.layer, name
    try:
        yield
    finally:
        trace.layer = outer


def _notes(name: str, layer: nn.Module) -> Iterator[str]:
    """Note experts that run one after the other."""
    if not isinstance(layer, Layer):
        return
    for module in layer.experts.modules():
        # ExpertParallel does not hold its experts as a submodule.
        here = getattr(module, "experts_here", None)
        experts = here() if callable(here) else module
        for attribute in getattr(experts, "expert_lists", ()):
            count = len(getattr(experts, attribute))
            if count > 1:
                yield (
                    f"{name}: {type(experts).__name__} runs {count} experts one after the other; "
                    "GroupedExperts runs feed-forward ones together (weights: moe_ext.convert)"
                )


def _other_implementations(model: nn.Module) -> Iterator[str]:
    """Note experts of transformers that moe_ext could compute and another implementation does."""
    implementations = Counter(
        getattr(getattr(module, "config", None), "_experts_implementation", None)
        for module in model.modules()
        if is_of_transformers(module)
    )
    for name, count in implementations.items():
        if name != "moe_ext":
            yield (
                f"{count} experts modules of transformers have experts_implementation={name!r}: "
                'where moe_ext.hf.check(model) passes, model.set_experts_implementation("moe_ext")'
            )


_OWN = "on tensor cores"
_PRODUCTS = torch_grouped_mm.OPERATORS | composed.OPERATORS


class _Trace(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.others: Counter[str] = Counter()
        self.reads = 0
        self.is_away = False
        self.is_inside = False  # of a product, which has a trace of its own
        self.layer = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.is_inside:
            return func(*args, **(kwargs or {}))
        if not isinstance(func, torch._ops.OpOverload):  # as torch.cond
            self.others[func.name()] += 1
            return func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        devices = {arg.device.type for arg in args if isinstance(arg, Tensor)}
        self.is_away |= not devices <= {_HOST, "meta"}
        if func.namespace == "moe_ext":
            return self._called(name, func, args)
        self.others[name] += 1
        result = func(*args, **(kwargs or {}))
        self.reads += _waits(name, args, result)
        return result

    def _inside(self, name: str, *args):
        product = registry.product_inside(name, args)
        if product is None:
            return registry.inside(name, *args)
        return self._python(_call(name, args, self.layer), product, args)

    def _called(self, name: str, func, args: tuple):
        call = _call(name, args, self.layer)
        if call.backend == "operators":
            if kernels := registry.whole(name, args):
                self.calls.append(call._replace(backend="compiled", how=_OWN))
                return kernels(*args)
            with self:
                return composed.OPERATORS[name](self._inside, *args)
        # These backends consist of other operators: the function itself is called to see them.
        in_python = {
            "torch": torch_grouped_mm.OPERATORS.get(name),
            "reference": getattr(reference, name, None),
        }
        function = in_python.get(call.backend)
        if function is None:
            self.calls.append(call)
            return func(*args)
        return self._python(call, function, args)

    def _python(self, call: Call, function: Callable, args: tuple):
        inside = _Trace()
        self.is_inside = True
        try:
            with inside:
                result = function(*args)
        finally:
            self.is_inside = False
        self.calls.append(call._replace(synchronisations=inside.reads))
        return result


def _waits(name: str, args: tuple, result) -> bool:
    """Whether the host waited for a device: for a value, or for a copy to the host."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    is_away = [tensor.device.type != _HOST for tensor in tensors]
    has_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
    if name in _READS or has_mask:
        return is_away[0]
    if name == "copy_":
        return is_away == [False, True]
    return name == "_to_copy" and is_away[0] and result.device.type == _HOST


def _call(name: str, args: tuple, layer: str) -> Call:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    shapes = " ".join(str(list(tensor.shape)) for tensor in tensors)
    device = tensors[0].device
    backend, how = registry.backend(name, device), ""
    if backend == "reference":
        how = registry.why_reference(device)
    elif backend == "torch":
        path, why = torch_grouped_mm.path_of(name, args)
        how = f"{path}, as {why}" if why else path
        if path == "own":
            backend, how = "compiled", _OWN
    elif name in _PRODUCTS:
        how = torch.ops.moe_ext.products(args[0])
    return Call(name, f"{dtype} {shapes}", backend, how, 0, layer)
