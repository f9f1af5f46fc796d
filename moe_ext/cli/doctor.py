"""Check the installation: which libraries are built, which code runs, and whether it is right.

`python -m moe_ext doctor` prints it, with a fix for each problem.
"""

import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import __version__, toolkit
from ..experts.pages import why_not_here
from ..memory import keep_memory
from ..ops import reference, registry, samples

AGAIN = toolkit.install_again()
# Why instructions that the CPU has are not used, by their state in csrc/cpu/features.cpp.
NOT_USED = {
    "unused": "moe_ext has no such loops",
    "limited": "ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA or the system does not allow it",
    "unbuilt": "not in this build, by {built_by}",
}
TOLERANCE = 1e-4  # largest error of a float32 result over its largest number


class Problem(NamedTuple):
    """A problem of the installation and its fix.

    Attributes:
        problem: a sentence
        fix: a command or change
    """

    problem: str
    fix: str


class Operator(NamedTuple):
    """The code that runs an operator on a device, and the result of its self-test.

    Attributes:
        name: of the operator
        device: type of the device
        backend: result of `registry.backend`
        why: why no faster backend runs, or ""
        error: largest error over the largest number; None where the self-test raised
        failure: the error that the self-test raised, or ""
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
    """The result of `examine`. str() is for people, `as_dict` for programs.

    Attributes:
        facts: versions, paths and hardware by name; None where something is missing
        libraries: path or error of _C and _C_cuda. The fix of _C_cuda says how a torch with CUDA
            gets the missing kernels; without a GPU that is not a problem.
        operators: one for every operator and device
        problems: all problems found
    """

    facts: dict
    libraries: dict[str, dict]
    operators: list[Operator]
    problems: list[Problem]

    @property
    def is_well(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict:
        """Numbers, strings, lists and dicts, for JSON; an infinite or NaN error is None."""
        return {
            "ok": self.is_well,
            **self.facts,
            "libraries": self.libraries,
            "operators": [operator.as_dict() for operator in self.operators],
            "problems": [problem._asdict() for problem in self.problems],
        }

    def __str__(self) -> str:
        table = _table(self.facts)
        table["CPU library"] = _library(self.libraries["_C"])
        table["CUDA library"] = _library(self.libraries["_C_cuda"])
        width = max(map(len, table))
        lines = [f"{name:{width}}  {value}" for name, value in table.items()]
        why = "why no faster backend" if any(o.why for o in self.operators) else ""
        limit = f"error (at most {TOLERANCE:.0e})"
        lines += ["", f"{'operator':23}{'device':8}{'backend':11}{limit:24}{why}".rstrip()]
        for o in self.operators:
            error = o.failure or (f"{o.error:.1e}" if o.error else "none")
            lines.append(f"{o.name:23}{o.device:8}{o.backend:11}{error:24}{o.why}".rstrip())
        lines.append("")
        for problem in self.problems:
            lines += [f"problem: {problem.problem}", f"    fix: {problem.fix}"]
        if self.libraries["_C_cuda"]["fix"] and not self.facts["cards"]:
            lines += [
                "note: no CUDA kernels are built; they matter on a machine with a GPU",
                f" fix: {self.libraries['_C_cuda']['fix']}",
            ]
        if unbuilt := _instructions(self.facts["cpu"], "unbuilt"):
            built_by = self.facts["cpu"]["built_by"]
            lines += [
                f"note: {built_by} left out the faster loops for {unbuilt}; GCC 11 has them",
                f" fix: apt-get install g++; CXX=g++ {AGAIN}",
            ]
        if self.is_well:
            devices = " and ".join(dict.fromkeys(o.device for o in self.operators))
            lines.append(f"OK: every operator is right on {devices}")
        lines.append(crowded(self.facts["cpu"]))
        return "\n".join(lines).rstrip()


def _table(facts: dict) -> dict[str, str]:
    """The facts as text by name."""
    cpu, compiler, found = facts["cpu"], facts["compiler"], facts["toolkit"]
    threads = f"{cpu['threads']} thread{'s' * (cpu['threads'] > 1)}"
    cuda = facts["torch"]["cuda"]
    not_used = [
        f"{names} ({why.format(**cpu)})"
        for state, why in NOT_USED.items()
        if (names := _instructions(cpu, state))
    ]
    table = {
        "moe_ext": "{version}, {path}".format(**facts["moe_ext"]),
        "python": "{version}, {path}".format(**facts["python"]),
        "platform": facts["platform"],
        "torch": f"{facts['torch']['version']}, {f'for CUDA {cuda}' if cuda else 'without CUDA'}",
        "CPU": f"{_instructions(cpu, 'used')}; {cpu['cores']} cores, torch uses {threads}",
        **({"not used": "; ".join(not_used)} if not_used else {}),
        "huge pages": facts["huge_pages"],
        "kept memory": facts["kept_memory"],
        "compiler": "{path}, {version}".format(**compiler) if compiler else "none works",
        "CUDA toolkit": "{cuda}, {path}".format(**found) if found else "none found",
    }
    if cuda and not facts["cards"]:
        table["card"] = "none that torch can use; if there is one, run nvidia-smi"
    for i, card in enumerate(facts["cards"]):
        text = f"{card['name']}, compute capability {card['compute_capability']}"
        table[f"card {i}" if i else "card"] = text
    return table


def _instructions(cpu: dict, state: str) -> str:
    """The CPU's instructions that are in a state of csrc/cpu/features.cpp, as a list."""
    return ", ".join(name for name, found in cpu["instructions"].items() if found == state)


def _library(library: dict) -> str:
    built_for = library.get("built_for")
    text = library["path"] or library["error"]
    return f"{text}, for {','.join(built_for)}" if built_for else text


def examine() -> Report:
    """Examine the installation and test every operator once, on the CPU and the accelerator."""
    libraries, problems = _libraries()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    operators = [_operator(name, device) for device in devices for name in registry.NAMES]
    for o in operators:
        if not o.is_right:
            found = o.failure or f"an error of {o.error:.1e}"
            problem = f"the self-test of {o.name} on {o.device} gave {found}"
            report = "report it with the output of `python -m moe_ext doctor --json`"
            problems.append(Problem(problem, f"{AGAIN}; if that does not help, {report}"))
    return Report(_facts(), libraries, operators, problems)


def _facts() -> dict:
    found = toolkit.choose_toolkit().toolkit or toolkit.find_toolkit()
    return {
        "moe_ext": {"version": __version__, "path": str(Path(__file__).parents[1])},
        "python": {"version": platform.python_version(), "path": sys.executable},
        "platform": platform.platform(),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "cpu": _cpu(),
        "huge_pages": why_not_here() or "for weights, by moe_ext.huge_pages(model)",
        "kept_memory": _kept_memory(),
        "compiler": _compiler(),
        "toolkit": {"cuda": found.name, "path": str(found.root)} if found else None,
        "cards": [
            {"name": torch.cuda.get_device_name(i), "compute_capability": _capability_name(i)}
            for i in range(_num_cards())
        ],
    }


def _kept_memory() -> str:
    found = keep_memory()
    return (
        str(found)
        if found.limit
        else "none: it needs the compiled library, Linux and torch 2.11 or later"
    )


def _cpu() -> dict:
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    load, others = _work()
    # Without the compiled library, and elsewhere than on x86, torch's word for its own kernels.
    features, built_by = torch.ops.moe_ext.cpu_features.default(torch.empty(0, device="cpu"))
    features = features or f"{torch.backends.cpu.get_cpu_capability()}=used"
    return {
        "instructions": dict(feature.split("=") for feature in features.split(" ")),
        "built_by": built_by,
        "threads": threads,
        "cores": cores,
        "load": load,
        # A build raises the load slightly above the number of cores, and for a minute after its
        # end: the load alone would report an installation that has just been built.
        "is_busy": threads > 1 and load >= 1.5 * cores and threads + others > cores,
    }


def crowded(cpu: dict | None = None) -> str:
    """Load and advice if other work keeps the CPU busy, else "". cpu: the facts; None measures."""
    cpu = cpu or _cpu()
    if not cpu["is_busy"]:
        return ""
    return (
        f"CPU is busy: load {cpu['load']:.1f} on {cpu['cores']} cores in the last minute; torch's "
        "threads then wait for each other, so set OMP_NUM_THREADS=1"
    )


def _work() -> tuple[float, int]:
    """The load of the last minute, and the number of other threads that run now."""
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
    path = toolkit.find_compiler()
    if path is None:
        return None
    run = subprocess.run([path, "--version"], capture_output=True, text=True)
    return {"path": path, "version": run.stdout.splitlines()[0] if run.stdout else "unknown"}


def _libraries() -> tuple[dict[str, dict], list[Problem]]:
    """The libraries as in `Report`, and their problems."""
    libraries, problems = registry.libraries, []
    path, cuda_path = (p and str(p) for p in (libraries.library, libraries.cuda_library))
    cuda: dict = {"path": cuda_path, "error": libraries.cuda_load_error}
    cuda |= {"fix": None, "built_for": None}
    if libraries.library is None:
        cuda["error"] = "not looked for without _C"
        has_compiler = toolkit.find_compiler() is not None
        fix = AGAIN if has_compiler else f"install a C++ compiler or set CXX to one; then {AGAIN}"
        problems.append(Problem(f"the CPU library is not used: {libraries.load_error}", fix))
    elif libraries.cuda_library is None and torch.version.cuda is not None:
        choice = toolkit.choose_toolkit()
        cuda["fix"] = f"{choice.fix}; then {AGAIN}" if choice.fix else AGAIN
        problem = f"operators on cuda run as plain PyTorch: {libraries.cuda_load_error}"
        problems += [Problem(problem, cuda["fix"])] if _num_cards() else []
    if libraries.cuda_library is not None:
        built = toolkit.cuda_build(libraries.cuda_library)
        cuda["built_for"] = built.architectures if built else []
        problems += _unserved(cuda["built_for"])
    return {"_C": {"path": path, "error": libraries.load_error}, "_C_cuda": cuda}, problems


def _unserved(built_for: list[str]) -> Iterator[Problem]:
    """A problem for each card that the kernels do not run on."""
    for card in range(_num_cards()):
        if built_for and not serves(built_for, torch.cuda.get_device_capability(card)):
            name, kernels = _capability_name(card), ",".join(built_for)
            problem = f"card {card} has compute capability {name}, the kernels are for {kernels}"
            yield Problem(problem, f'TORCH_CUDA_ARCH_LIST="{name}" {AGAIN}')


def serves(built_for: list[str], capability: tuple[int, int]) -> bool:
    """Whether kernels for a TORCH_CUDA_ARCH_LIST run on a card.

    Machine code runs on its major version from its minor version on, PTX on all later versions.
    """
    for item in built_for:
        number, _, ptx = item.partition("+")
        specific = number[-1:] in ("a", "f")
        major, _, minor = number.rstrip("af").partition(".")
        if not (major.isdigit() and minor.isdigit()):
            return True  # a name such as Hopper, whose versions are not known here
        have = int(major), int(minor)
        is_later = capability >= have and not specific
        if capability == have or (is_later and (ptx or capability[0] == have[0])):
            return True
    return False


def _operator(name: str, device: str) -> Operator:
    backend = registry.backend(name, device)
    why = "torch's grouped_mm is used; explain(layer, x) says where" if backend == "torch" else ""
    if backend == "reference":
        why = registry.why_reference(device)
    try:
        return Operator(name, device, backend, why, _error(name, device), "")
    except Exception as error:
        return Operator(name, device, backend, why, None, f"{type(error).__name__}: {error}")


def _error(name: str, device: str) -> float:
    """The largest difference to the reference in float64, over the largest number; infinite where
    integers differ."""
    args = samples.arguments(name, device)
    got = getattr(torch.ops.moe_ext, name)(*args)
    # A plan has integers alone.
    right = getattr(reference, name)(*(args if name == "plan" else map(_exact, args)))
    outputs = ((out,) if isinstance(out, Tensor) else tuple(out) for out in (got, right))
    errors = [_difference(one.cpu(), other.cpu()) for one, other in zip(*outputs, strict=True)]
    # max would ignore a NaN.
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def _exact(argument):
    """The argument on the CPU, real numbers in float64; scales of a weight stay bfloat16."""
    if not isinstance(argument, Tensor):
        return argument
    return argument.cpu().double() if argument.dtype == torch.float32 else argument.cpu()


def _difference(got: Tensor, right: Tensor) -> float:
    if got.shape != right.shape:
        return math.inf
    if not right.is_floating_point():
        return 0.0 if torch.equal(got, right) else math.inf
    return float((got.double() - right).abs().max() / right.abs().max())
