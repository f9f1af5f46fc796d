"""Python processes that a test starts, and copies of the tree for them to run in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from moe_ext import toolkit

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments, cwd: Path = ROOT, **environment) -> subprocess.CompletedProcess:
    """Run this Python in a folder, with more variables in its environment."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def output_of(*arguments, **options) -> str:
    """What `python` prints, after a process that succeeds."""
    done = python(*arguments, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def quick_compiler(folder: Path) -> str:
    """A C++ compiler, for CXX, that optimizes little: for tests of a build."""
    compiler = folder / "quick-c++"
    compiler.write_text(f'#!/bin/sh\nexec {toolkit.find_compiler()} "$@" -O0\n')
    compiler.chmod(0o755)
    return str(compiler)


def copy_tree(to: Path, *folders: str) -> Path:
    """Copy these folders and what setup.py reads, without a built library."""
    ignore = shutil.ignore_patterns("_C*", "__pycache__")
    for folder in folders:
        shutil.copytree(ROOT / folder, to / folder, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    return to
