"""The package is a house of floors: imports run downwards, and every floor is small."""

import ast
import re
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import moe_ext

PACKAGE = Path(moe_ext.__file__).parent

# From the bottom. A module imports from lower floors, and from its own floor.
FLOORS = [
    {"memory", "options", "toolkit", "formats", "ops"},
    {"routing", "experts"},
    {"process_group", "parallel"},
    {"layer"},
    {"deepspeed", "monitor"},
    {"hf", "build", "__init__"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
# These know nothing of DeepSpeed, whose names and habits live in moe_ext/deepspeed.
CORE = {"formats", "ops", "routing", "experts", "parallel", "monitor", "layer"}
# The layout of DeepSpeed's weights is named after it.
NAMED_AFTER_IT = {"experts.convert"}
MOST_MODULES = 12

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def unit_of(module: str) -> str:
    """The package, or the module at the top, that a module belongs to."""
    return module.split(".")[0]


def imported(module: str, tree: ast.Module) -> Iterator[str]:
    """The units that a module imports, in functions too."""
    package = f"moe_ext.{module}".rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, *rest = name.split(".")
            if root == "moe_ext":
                yield rest[0] if rest and rest[0] in FLOOR_OF else "__init__"


IMPORTS = {
    module: set(imported(module, ast.parse(path.read_text()))) - {unit_of(module)}
    for module, path in MODULES.items()
}


def names_deepspeed(text: str) -> bool:
    """Whether code, a comment or a string that is no docstring has the word."""
    return "deepspeed" in re.sub(r'(?ms)^ *""".*?"""$', "", text).lower()


def test_every_module_stands_on_a_floor():
    assert {unit_of(module) for module in MODULES} == set(FLOOR_OF)


def test_imports_run_downwards():
    upward = {
        f"{module} imports {unit}"
        for module, units in IMPORTS.items()
        for unit in units
        if FLOOR_OF[unit] > FLOOR_OF[unit_of(module)]
    }
    assert upward == set()


def test_the_core_does_not_name_deepspeed():
    core = {m for m in MODULES if unit_of(m) in CORE}
    assert {m for m in core if names_deepspeed(MODULES[m].read_text())} == NAMED_AFTER_IT


@pytest.mark.parametrize("floor", FLOORS, ids=lambda floor: " ".join(sorted(floor)))
def test_no_two_packages_of_a_floor_import_each_other(floor):
    edges = {
        (unit_of(module), unit)
        for module, units in IMPORTS.items()
        for unit in units
        if {unit_of(module), unit} <= floor
    }
    assert not edges & {(b, a) for a, b in edges}


def test_a_package_has_at_most_a_dozen_modules():
    counts: dict[Path, int] = {}
    for path in MODULES.values():
        counts[path.parent] = counts.get(path.parent, 0) + (path.name != "__init__.py")
    assert {str(folder): n for folder, n in counts.items() if n > MOST_MODULES} == {}
