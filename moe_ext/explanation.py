"""What runs in a call of a layer, and why nothing faster."""

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import grouped, ops, reference
from .layer import MOELayer

# What reads a tensor's values back to the host.
_READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}
_HOST = "cpu"


class Call(NamedTuple):
    """One operator of moe_ext in a call.

    operator: its name
    operands: shapes of its tensors, and the dtype of the first
    backend: as of `ops.backend`
    how: the path that was taken, and why none before it; "" where there is nothing to say
    synchronisations: how often the host waited for the device in it
    """

    operator: str
    operands: str
    backend: str
    how: str
    synchronisations: int


class Explanation(NamedTuple):
    """What `explain` found. Printed as a table.

    calls: operators of moe_ext, in order
    others: how often each other operator ran, those inside the calls left out
    synchronisations: how often the host waited for the device outside of the calls
    """

    calls: list[Call]
    others: dict[str, int]
    synchronisations: int

    def __str__(self) -> str:
        rows = [("operator", "operands", "runs")] if self.calls else []
        rows += [(c.operator, c.operands, c.backend + (c.how and f": {c.how}")) for c in self.calls]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows]
        if not self.calls:
            lines.append("no operator of moe_ext ran")
        waits = self.synchronisations + sum(call.synchronisations for call in self.calls)
        names = (f"{name} {n}" for name, n in Counter(self.others).most_common())
        lines.append(f"other operators: {', '.join(names) or 'none'}")
        lines.append(f"the host waits for the device: {f'{waits} times' if waits else 'never'}")
        return "\n".join(lines)


def explain(layer: nn.Module, *args, **kwargs) -> Explanation:
    """Call `layer(*args, **kwargs)` once, without gradients, and say what ran.

    layer: a MOELayer, or any module with one in it

    What is said is what was seen: operators, and on another device than the CPU every read of a
    value. `print(moe_ext.explain(layer, hidden))` shows it.
    """
    trace = _Trace()
    # What a layer keeps of its last call is not of this one, which nobody else is to see.
    kept = [(m, m.l_aux, m.exp_counts) for m in layer.modules() if isinstance(m, MOELayer)]
    observed = [(m, m.observer) for m in layer.modules() if vars(m).get("observer") is not None]
    try:
        for module, _ in observed:
            module.observer = None  # type: ignore[assignment]
        with torch.no_grad(), trace:
            layer(*args, **kwargs)
    finally:
        for module, l_aux, exp_counts in kept:
            module.l_aux, module.exp_counts = l_aux, exp_counts
        for module, observer in observed:
            module.observer = observer
    return Explanation(trace.calls, dict(trace.others), trace.reads)


class _Trace(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.others: Counter[str] = Counter()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if func.namespace == "moe_ext":
            return self._called(name, func, args)
        self.others[name] += 1
        result = func(*args, **(kwargs or {}))
        self.reads += _waits(name, args, result)
        return result

    def _called(self, name: str, func, args: tuple):
        call = _call(name, args)
        # What is made of other operators is called without the dispatcher, to see them.
        made = {"torch": grouped.OPERATORS.get(name), "reference": getattr(reference, name)}
        if call.backend not in made:
            self.calls.append(call)
            return func(*args)
        inside = _Trace()
        with inside:
            result = made[call.backend](*args)
        self.calls.append(call._replace(synchronisations=inside.reads))
        return result


def _waits(name: str, args: tuple, result) -> bool:
    """Whether the host waited for a device: for a value, or for a copy of a tensor."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    is_away = [tensor.device.type != _HOST for tensor in tensors]
    if name in _READS:
        return is_away[0]
    if name == "copy_":
        return is_away == [False, True]
    return name == "_to_copy" and is_away[0] and result.device.type == _HOST


def _call(name: str, args: tuple) -> Call:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    shapes = " ".join(str(list(tensor.shape)) for tensor in tensors)
    backend = ops.backend(name, tensors[0].device)
    return Call(name, f"{dtype} {shapes}", backend, _how(name, args, backend), 0)


def _how(name: str, args: tuple, backend: str) -> str:
    first = args[0]
    if backend == "reference":
        return _why_reference(first.device.type)
    if name not in grouped.OPERATORS:
        return ""
    if backend == "torch":
        second = args[1]
        widths = second.shape[1:] if name == "grouped_mm" else (first.shape[1], second.shape[1])
        path, why = grouped.choose(first, tuple(widths), args[-1])
        return f"{path}, as {why}" if why else path
    if backend == "compiled" and torch.ops.moe_ext.widens(first):
        dtype = str(first.dtype).removeprefix("torch.")
        return f"in float32, as this CPU's torch has no {dtype} instructions"
    return ""


def _why_reference(device: str) -> str:
    if device == "cpu":
        return ops.registry.load_error or ""
    if device == "cuda":
        return ops.registry.cuda_load_error or ""
    return f"there are no kernels for {device}"
