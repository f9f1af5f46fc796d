"""Faults in the CUDA kernels, which kernel_tests must notice: a module for each of its tests.

A module's MUTANTS has, for each file, the other fields of its mutants: (old, new[, after[,
equivalent]]). TESTS names the kernel tests that look at them, [] for all; by default the module's
own name.
"""

import importlib
import pkgutil
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[3] / "csrc"
BARRIER = "__syncthreads();"


class Mutant(NamedTuple):
    """A change: the one `old` of a source, or the first behind `after`, becomes `new`."""

    file: str
    old: str
    new: str
    after: str = ""
    equivalent: str = ""  # why no test can notice

    def __str__(self) -> str:
        change = f"{self.old.strip()} -> {self.new.strip() or 'nothing'}"
        where = f" after {self.after.strip()}" if self.after else ""
        return f"{self.file}: {' '.join((change + where).split())}"

    def applied(self, text: str) -> str:
        if self.after and text.count(self.after) != 1:
            raise ValueError(f"{self}: the text before is there {text.count(self.after)} times")
        start = text.index(self.after) + len(self.after) if self.after else 0
        if not self.after and text.count(self.old) != 1:
            raise ValueError(f"{self}: the text is there {text.count(self.old)} times")
        at = text.find(self.old, start)
        if at < 0:
            raise ValueError(f"{self}: the text is not there")
        return text[:at] + self.new + text[at + len(self.old) :]

    @property
    def path(self) -> Path:
        """The path of the source, below csrc."""
        return Path(self.file if self.file.endswith(".h") else f"cuda/{self.file}")


def load() -> list[tuple[Mutant, list[str]]]:
    """Every mutant with its tests."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return [
        (Mutant(file, *fields), getattr(module, "TESTS", [name]))
        for name, module in zip(names, modules, strict=True)
        for file, mutants in module.MUTANTS.items()
        for fields in mutants
    ]
