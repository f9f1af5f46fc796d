"""What is built and used here, whether it computes what it should, and how to mend what is amiss:
`python -m moe_ext doctor`.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import build, contracts, ops, reference

# What _C_cuda holds in its bytes, see csrc/cuda_ops.cpp.
ARCHITECTURES = re.compile(rb"moe_ext built for compute capability ([0-9a-zA-Z.+,]*)")


def _source() -> str:
    """What pip is to install again: the folder of the sources, where that is known."""
    if (build.ROOT / "setup.py").exists():
        return f"-e {build.ROOT}"
    try:
        text = importlib.metadata.distribution("moe_ext").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        text = None
    url = urllib.parse.urlsplit(json.loads(text)["url"]) if text else None
    if url is not None and url.scheme == "file":
        return urllib.request.url2pathname(url.path)
    # A wheel that pip finds is of the CPU.
    return "--no-binary moe_ext moe_ext"


AGAIN = f"pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps {_source()}"
TOLERANCE = 1e-4  # of float32 results, beside their largest number


class Problem(NamedTuple):
    """What is amiss, and what mends it."""

    what: str
    cure: str


class Operator(NamedTuple):
    """What runs an operator on a device.

    backend: as of `ops.backend`; why: why nothing faster, "" where nothing is
    error: the largest of the self-test, over the largest number; None where it raised `failure`
    """

    name: str
    device: str
    backend: str
    why: str
    error: float | None
    failure: str


class Report(NamedTuple):
    """What `examine` finds. Printed for people; `as_dict` is for programs."""

    versions: dict[str, str]
    libraries: dict[str, str]
    operators: list[Operator]
    problems: list[Problem]

    @property
    def is_well(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict:
        return {
            "versions": self.versions,
            "libraries": self.libraries,
            "operators": [operator._asdict() for operator in self.operators],
            "problems": [problem._asdict() for problem in self.problems],
        }

    def __str__(self) -> str:
        facts = {**self.versions, **self.libraries}
        width = max(map(len, facts))
        lines = [f"{name:{width}}  {value}" for name, value in facts.items()]
        head = f"{'operator':18}{'device':8}{'runs':11}{'largest error':15}why nothing faster"
        lines += ["", head]
        for o in self.operators:
            error = o.failure or f"{o.error:.1e}"
            lines.append(f"{o.name:18}{o.device:8}{o.backend:11}{error:15}{o.why}".rstrip())
        lines.append("")
        for problem in self.problems:
            lines += [f"amiss: {problem.what}", f"  mend: {problem.cure}"]
        if not self.problems:
            load = self.versions.get("load")
            lines.append(f"all is well, but for other work: load {load}" if load else "all is well")
        return "\n".join(lines)


def examine() -> Report:
    """Look at this process's installation and run every operator once, on the CPU and on the
    accelerator where there is one."""
    problems: list[Problem] = []
    versions = _versions()
    libraries = _libraries(problems)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    operators = [_operator(name, device) for device in devices for name in ops.NAMES]
    for o in operators:
        if o.failure or o.error is None or not o.error <= TOLERANCE:
            found = o.failure or f"an error of {o.error:.1e}"
            problems.append(
                Problem(
                    f"the self-test of {o.name} on {o.device} gave {found}",
                    f"{AGAIN}; where that does not help, report it with what "
                    "`python -m moe_ext doctor --json` prints",
                )
            )
    return Report(versions, libraries, operators, problems)


def _versions() -> dict[str, str]:
    from . import __version__

    toolkit = build.find_toolkit()
    found = {
        "moe_ext": f"{__version__}, {Path(__file__).parent}",
        "python": f"{platform.python_version()}, {sys.executable}",
        "system": platform.platform(),
        "torch": f"{torch.__version__}, for CUDA {torch.version.cuda or 'none'}",
        "CPU": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "compiler": _compiler(),
        "CUDA toolkit": "none found",
    }
    if toolkit:
        found["CUDA toolkit"] = f"{'.'.join(map(str, toolkit.version))}, {toolkit.root}"
    if load := crowded():
        found["load"] = load
    if torch.version.cuda is None:
        return found
    # torch's usual build has CUDA: without a GPU nothing is amiss.
    found["card"] = "none that torch can use; see what nvidia-smi says if there is one"
    for i in range(_num_cards()):
        major, minor = torch.cuda.get_device_capability(i)
        name = torch.cuda.get_device_name(i)
        found["card" if i == 0 else f"card {i}"] = f"{name}, compute capability {major}.{minor}"
    return found


def crowded() -> str:
    """What other work on this machine's CPUs means for torch's threads; "" without such work."""
    threads, cpus = torch.get_num_threads(), os.cpu_count() or 1
    load, others = _work()
    # What has just ended, as a build before this, is in the mean of a minute still.
    if threads == 1 or load <= cpus or threads + others <= cpus:
        return ""
    return (
        f"{load:.1f} on {cpus} CPUs in the last minute; beside other work threads wait for each "
        "other: start Python with OMP_NUM_THREADS=1, often ten times faster then"
    )


def _work() -> tuple[float, int]:
    """How many threads ran in the last minute, and how many others than this run now."""
    try:
        load, *_, counts, _ = Path("/proc/loadavg").read_text().split()
    except OSError:
        return 0.0, 0
    return float(load), int(counts.split("/")[0]) - 1


def _num_cards() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _compiler() -> str:
    path = build.find_compiler()
    if path is None:
        return "none found; set CXX, or install one"
    run = subprocess.run([path, "--version"], capture_output=True, text=True)
    first = run.stdout.splitlines()[0] if run.stdout else "says no version"
    return f"{path}, {first}"


def _libraries(problems: list[Problem]) -> dict[str, str]:
    registry = ops.registry
    found = {"_C": str(registry.library or registry.load_error)}
    if registry.library is None:
        cure = (
            AGAIN if build.find_compiler() else f"install a C++ compiler or set CXX; then {AGAIN}"
        )
        problems.append(Problem(f"the CPU library is not used: {registry.load_error}", cure))
    if torch.version.cuda is None:
        found["_C_cuda"] = str(registry.cuda_load_error or "not looked for without _C")
        return found
    found["_C_cuda"] = str(registry.cuda_library or registry.cuda_load_error)
    if registry.cuda_library is None:
        if _num_cards():
            problems.append(Problem(*_without_kernels()))
        return found
    built = ARCHITECTURES.search(registry.cuda_library.read_bytes())
    built_for = built.group(1).decode() if built else "compute capabilities it does not tell"
    found["_C_cuda"] += f", for {built_for}"
    for i in range(_num_cards()):
        capability = torch.cuda.get_device_capability(i)
        if built and not serves(built_for, capability):
            name = ".".join(map(str, capability))
            problems.append(
                Problem(
                    f"card {i} has compute capability {name}, the kernels are for {built_for}",
                    f'TORCH_CUDA_ARCH_LIST="{name}" {AGAIN}',
                )
            )
    return found


def _without_kernels() -> tuple[str, str]:
    """What is amiss where torch has CUDA and there are no kernels, and what mends it."""
    what = f"operators on cuda run as plain PyTorch: {ops.registry.cuda_load_error}"
    if os.environ.get("FORCE_CUDA") == "0":
        return what, f"unset FORCE_CUDA, then {AGAIN}"
    try:
        toolkit, note = build.choose_toolkit()
    except RuntimeError as error:
        return what, f"{error}; then {AGAIN}"
    return what, AGAIN if toolkit else f"{note}; then {AGAIN}"


def serves(built_for: str, capability: tuple[int, int]) -> bool:
    """Whether kernels for a TORCH_CUDA_ARCH_LIST run on a card: machine code on its major version
    from its minor one on, PTX on all later ones."""
    for item in built_for.split(","):
        number, _, ptx = item.partition("+")
        specific = number[-1:] in ("a", "f")
        major, _, minor = number.rstrip("af").partition(".")
        if not (major.isdigit() and minor.isdigit()):
            return True  # a name, as Hopper, of which more than this is not known here
        have = int(major), int(minor)
        if capability == have or (not specific and capability[0] == have[0] and capability >= have):
            return True
        if ptx and not specific and capability >= have:
            return True
    return False


def _operator(name: str, device: str) -> Operator:
    backend = ops.backend(name, device)
    why = ""
    if backend == "reference":
        why = ops.why_reference(device)
    elif backend == "torch":
        why = "products of experts are torch's own here; explain(layer, x) says which"
    try:
        return Operator(name, device, backend, why, _error(name, device), "")
    except Exception as error:
        return Operator(name, device, backend, why, None, f"{type(error).__name__}: {error}")


def _error(name: str, device: str) -> float:
    """Of an operator beside the reference in float64: the largest difference over the largest
    number; infinite where integers differ."""
    args = _arguments(device)[name]
    got = getattr(torch.ops.moe_ext, name)(*args)
    # A plan has no numbers to round.
    right = getattr(reference, name)(*(args if name == "plan" else map(_exact, args)))
    pairs = zip(_as_tuple(got), _as_tuple(right), strict=True)
    errors = [_difference(one.cpu(), other.cpu()) for one, other in pairs]
    # max passes over a NaN.
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def _exact(argument):
    """A tensor on the CPU, of numbers in float64."""
    if not isinstance(argument, Tensor):
        return argument
    return argument.cpu().double() if argument.is_floating_point() else argument.cpu()


def _as_tuple(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _difference(got: Tensor, right: Tensor) -> float:
    if got.shape != right.shape:
        return math.inf
    if not right.is_floating_point():
        return 0.0 if torch.equal(got, right) else math.inf
    return float((got.double() - right).abs().max() / right.abs().max())


def _arguments(device: str) -> dict[str, tuple]:
    """For every operator, of a small layer with a capacity."""
    T, K, E, H, F = 61, 2, 8, 24, 16
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    logits, tokens = normal(T, E), normal(T, H)
    weights, experts, probs, _ = reference.gate(logits, None, K, "softmax", True, 1.0)
    C = T * K // E
    slots, sources, offsets, load = reference.plan(experts, weights, E, C, "choice", 1)
    R = len(sources)
    rows, inner, grad = normal(R, H), normal(R, 2 * F), normal(R, F)
    routes, groups = (slots, sources), (offsets, load, C)
    keep = True, 1e-9, 1.0
    return {
        "gate": (logits, None, K, "softmax", True, 1.0),
        "gate_backward": (weights, None, None, probs, experts, "softmax", True, 1.0),
        "plan": (experts, weights, E, C, "choice", 1),
        "keep": (weights, slots, *keep),
        "keep_backward": (normal(T, K), weights, slots, *keep),
        "dispatch": (tokens, *routes, weights),
        "combine": (rows, *routes, weights),
        "route_dot": (tokens, rows, *routes),
        "dispatch_dot": (tokens, rows, *routes, weights),
        "grouped_mm": (rows, normal(E, F, H), normal(E, F), *groups),
        "grouped_outer": (grad, rows, *groups),
        "activate": (inner, *routes, weights, contracts.ACTIVATIONS[0]),
        "activate_backward": (grad, inner, *routes, weights, contracts.ACTIVATIONS[0]),
    }
