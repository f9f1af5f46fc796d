"""Check the installation, `python -m moe_ext doctor`: what is built, which code runs, whether its
results are right, and how to fix each problem.
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

from .. import build
from ..ops import reference, registry, samples

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
    """A problem of the installation, and what fixes it.

    Attributes:
        problem: what is wrong
        fix: a command or change
    """

    problem: str
    fix: str


class Operator(NamedTuple):
    """What runs an operator on a device.

    Attributes:
        name: of the operator
        device: its type
        backend: as of `registry.backend`
        why: why nothing faster, "" where nothing is
        error: the largest of the self-test, over the largest number; None where it raised `failure`
        failure: what the self-test raised, or ""
    """

    name: str
    device: str
    backend: str
    why: str
    error: float | None
    failure: str

    @property
    def is_right(self) -> bool:
        return self.error is not None and self.error <= TOLERANCE

    def as_dict(self) -> dict:
        error = self.error if self.error is not None and math.isfinite(self.error) else None
        return {**self._asdict(), "error": error, "ok": self.is_right}


class Report(NamedTuple):
    """What `examine` finds. Printed for people; `as_dict` is for programs.

    Attributes:

        facts: versions, paths and hardware; a field by name, None for what is not there
        libraries: path, or the error, of the libraries _C and _C_cuda; fix of _C_cuda: how a torch
            with CUDA gets the kernels that it lacks, a problem on a machine with a GPU alone
        operators: one for every operator and device
        problems: what `examine` found wrong
    """

    facts: dict
    libraries: dict[str, dict]
    operators: list[Operator]
    problems: list[Problem]

    @property
    def is_well(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict:
        """As numbers, strings, lists and dicts; an error that is not finite is None."""
        return {
            "ok": self.is_well,
            **self.facts,
            "libraries": self.libraries,
            "operators": [operator.as_dict() for operator in self.operators],
            "problems": [problem._asdict() for problem in self.problems],
        }

    def __str__(self) -> str:
        table = {**_table(self.facts), **{k: _library(v) for k, v in self.libraries.items()}}
        width = max(map(len, table))
        lines = [f"{name:{width}}  {value}" for name, value in table.items()]
        head = f"{'operator':18}{'device':8}{'runs':11}{'largest error':15}why nothing faster"
        lines += ["", head]
        for o in self.operators:
            error = o.failure or f"{o.error:.1e}"
            lines.append(f"{o.name:18}{o.device:8}{o.backend:11}{error:15}{o.why}".rstrip())
        lines.append("")
        for problem in self.problems:
            lines += [f"problem: {problem.problem}", f"    fix: {problem.fix}"]
        if self.libraries["_C_cuda"]["fix"] and not self.facts["cards"]:
            lines += [
                "note: no CUDA kernels are used; they matter on a machine with a GPU",
                f" fix: {self.libraries['_C_cuda']['fix']}",
            ]
        busy = _busy(self.facts["cpu"])
        if self.is_well:
            lines.append(f"OK (CPU is busy: load {busy})" if busy else "OK")
        elif busy:
            lines.append(f"CPU is busy: load {busy}")
        return "\n".join(lines)


def _table(facts: dict) -> dict[str, str]:
    """The facts as lines for people."""
    cpu, compiler, toolkit = facts["cpu"], facts["compiler"], facts["toolkit"]
    cuda = facts["torch"]["cuda"]
    table = {
        "moe_ext": "{version}, {path}".format(**facts["moe_ext"]),
        "python": "{version}, {path}".format(**facts["python"]),
        "platform": facts["platform"],
        "torch": f"{facts['torch']['version']}, {f'for CUDA {cuda}' if cuda else 'without CUDA'}",
        "CPU": f"{cpu['capability']}, {cpu['cores']} cores, number of threads {cpu['threads']}",
        "compiler": "{path}, {version}".format(**compiler) if compiler else "none that works",
        "CUDA toolkit": "{cuda}, {path}".format(**toolkit) if toolkit else "none found",
    }
    if cuda and not facts["cards"]:
        table["card"] = "none that torch can use; see what nvidia-smi says if there is one"
    for i, card in enumerate(facts["cards"]):
        text = f"{card['name']}, compute capability {card['compute_capability']}"
        table[f"card {i}" if i else "card"] = text
    return table


def _library(library: dict) -> str:
    built_for = library.get("built_for")
    text = library["path"] or library["error"]
    return f"{text}, for {','.join(built_for)}" if built_for else text


def examine() -> Report:
    """Look at this process's installation and run every operator once, on the CPU and on the
    accelerator where there is one."""
    problems: list[Problem] = []
    libraries = _libraries(problems)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    operators = [_operator(name, device) for device in devices for name in registry.NAMES]
    for o in operators:
        if not o.is_right:
            found = o.failure or f"an error of {o.error:.1e}"
            problems.append(
                Problem(
                    f"the self-test of {o.name} on {o.device} gave {found}",
                    f"{AGAIN}; where that does not help, report it with what "
                    "`python -m moe_ext doctor --json` prints",
                )
            )
    return Report(_facts(), libraries, operators, problems)


def _facts() -> dict:
    from .. import __version__

    toolkit = build.choose_toolkit().toolkit or build.find_toolkit()
    return {
        "moe_ext": {"version": __version__, "path": str(Path(__file__).parents[1])},
        "python": {"version": platform.python_version(), "path": sys.executable},
        "platform": platform.platform(),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "cpu": _cpu(),
        "compiler": _compiler(),
        "toolkit": {"cuda": toolkit.name, "path": str(toolkit.root)} if toolkit else None,
        "cards": [
            {"name": torch.cuda.get_device_name(i), "compute_capability": _capability_name(i)}
            for i in range(_num_cards())
        ],
    }


def _cpu() -> dict:
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    load, others = _work()
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "cores": cores,
        "load": load,
        # A build, as the one before this, brings the load a little over the cores, and when it has
        # ended it is in the mean of a minute still.
        "is_busy": threads > 1 and load >= 1.5 * cores and threads + others > cores,
    }


def crowded() -> str:
    """What other work on this machine's CPUs means for torch's threads; "" without such work."""
    return _busy(_cpu())


def _busy(cpu: dict) -> str:
    if not cpu["is_busy"]:
        return ""
    return (
        f"{cpu['load']:.1f} on {cpu['cores']} cores in the last minute; beside other work torch's "
        "threads wait for each other: start Python with OMP_NUM_THREADS=1, often ten times faster"
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


def _capability_name(card: int) -> str:
    return ".".join(map(str, torch.cuda.get_device_capability(card)))


def _compiler() -> dict | None:
    path = build.find_compiler()
    if path is None:
        return None
    run = subprocess.run([path, "--version"], capture_output=True, text=True)
    return {"path": path, "version": run.stdout.splitlines()[0] if run.stdout else "unknown"}


def _libraries(problems: list[Problem]) -> dict[str, dict]:
    libraries = registry.libraries
    found: dict[str, dict] = {
        "_C": {"path": _text(libraries.library), "error": libraries.load_error},
        "_C_cuda": {
            "path": _text(libraries.cuda_library),
            "error": libraries.cuda_load_error,
            "fix": None,
            "built_for": None,
        },
    }
    if libraries.library is None:
        found["_C_cuda"]["error"] = "not looked for without _C"
        has_compiler = build.find_compiler() is not None
        fix = AGAIN if has_compiler else f"install a C++ compiler or set CXX to one; then {AGAIN}"
        problems.append(Problem(f"the CPU library is not used: {libraries.load_error}", fix))
    elif libraries.cuda_library is None and torch.version.cuda is not None:
        problem = _without_kernels()
        found["_C_cuda"]["fix"] = problem.fix
        problems += [problem] if _num_cards() else []
    if libraries.cuda_library is not None:
        built_for = _built_for(libraries.cuda_library)
        found["_C_cuda"]["built_for"] = built_for
        problems += [p for p in (_unserved(i, built_for) for i in range(_num_cards())) if p]
    return found


def _text(path: Path | None) -> str | None:
    return str(path) if path else None


def _built_for(library: Path) -> list[str]:
    """The TORCH_CUDA_ARCH_LIST of a library's kernels; empty where it does not tell."""
    built = ARCHITECTURES.search(library.read_bytes())
    return built.group(1).decode().split(",") if built else []


def _unserved(card: int, built_for: list[str]) -> Problem | None:
    if not built_for or serves(built_for, torch.cuda.get_device_capability(card)):
        return None
    name = _capability_name(card)
    return Problem(
        f"card {card} has compute capability {name}, the kernels are for {','.join(built_for)}",
        f'TORCH_CUDA_ARCH_LIST="{name}" {AGAIN}',
    )


def _without_kernels() -> Problem:
    """torch has CUDA and there are no kernels."""
    choice = build.choose_toolkit()
    fix = f"{choice.fix}; then {AGAIN}" if choice.fix else AGAIN
    return Problem(
        f"operators on cuda run as plain PyTorch: {registry.libraries.cuda_load_error}", fix
    )


def serves(built_for: list[str], capability: tuple[int, int]) -> bool:
    """Whether kernels for a TORCH_CUDA_ARCH_LIST run on a card: machine code on its major version
    from its minor one on, PTX on all later ones."""
    for item in built_for:
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
    backend = registry.backend(name, device)
    why = ""
    if backend == "reference":
        why = registry.why_reference(device)
    elif backend == "torch":
        why = "products of experts are torch's own here; explain(layer, x) says which"
    try:
        return Operator(name, device, backend, why, _error(name, device), "")
    except Exception as error:
        return Operator(name, device, backend, why, None, f"{type(error).__name__}: {error}")


def _error(name: str, device: str) -> float:
    """Of an operator beside the reference in float64: the largest difference over the largest
    number; infinite where integers differ."""
    args = samples.arguments(name, device)
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
