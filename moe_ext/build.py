"""How the C++ sources are built: shared by setup.py and by `jit`.

Nothing here imports the package or torch at module level, so that setup.py can load this file by
its path.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The oldest torch whose stable ABI the library asks for: it runs on this one and every later one.
TARGET = "0x020a000000000000"  # 2.10


def sources(root: Path = ROOT) -> list[str]:
    """The C++ sources of the CPU library, relative to `root`."""
    csrc = root / "csrc"
    paths = [csrc / "ops.cpp", *sorted((csrc / "cpu").glob("*.cpp"))]
    return [path.relative_to(root).as_posix() for path in paths]


def headers(root: Path = ROOT) -> list[str]:
    """The headers that `sources` include, relative to `root`."""
    return [path.relative_to(root).as_posix() for path in sorted((root / "csrc").rglob("*.h"))]


def compile_flags() -> list[str]:
    """Flags for every C++ file. The language standard is torch's choice."""
    if sys.platform == "win32":
        return ["/O2", f"/DTORCH_TARGET_VERSION={TARGET}"]
    # -g0: Python's own flags ask for debug symbols, which make the library ten times larger.
    return ["-O3", "-g0", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TARGET}"]


def find_compiler() -> str | None:
    """The C++ compiler that torch.utils.cpp_extension would call, or None."""
    name = os.environ.get("CXX") or ("cl" if sys.platform == "win32" else "c++")
    return shutil.which(name.split()[0])


def _tree_key(root: Path, torch_version: str) -> str:
    digest = hashlib.sha256()
    for name in [*sources(root), *headers(root)]:
        digest.update(name.encode() + b"\0" + (root / name).read_bytes() + b"\0")
    digest.update(" ".join(compile_flags()).encode())
    return f"torch{torch_version}-{digest.hexdigest()[:16]}"


def jit(verbose: bool = False) -> Path:
    """Build the working tree's csrc and use it from now on; returns the library's path.

    For a source tree whose package has no compiled library. The library is kept under torch's
    extension folder (TORCH_EXTENSIONS_DIR), by torch version and source, and built again when one
    of them changes. It is built in a folder of its own and renamed when done: an interrupted build
    leaves nothing that a later one would wait for.

    Raises RuntimeError where a compiled library is loaded already, where the sources are not there
    (an installed package has none), or where there is no compiler.
    """
    import torch
    from torch.utils import cpp_extension

    from .ops import registry

    if registry.library is not None:
        raise RuntimeError(f"moe_ext.build.jit: {registry.library} is already loaded")
    if not (ROOT / "csrc" / "ops.cpp").exists():
        raise RuntimeError(f"moe_ext.build.jit: no source tree, {ROOT / 'csrc'} is missing")
    if find_compiler() is None:
        raise RuntimeError("moe_ext.build.jit: no C++ compiler; install one or set CXX")

    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    folder = cache / "moe_ext" / _tree_key(ROOT, torch.__version__)
    library = folder / f"_C{cpp_extension.LIB_EXT}"
    if not library.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=folder.parent, prefix="building-"))
        try:
            _compile(building, verbose)
            try:
                os.rename(building, folder)
            except OSError:
                if not library.exists():  # else another process finished the same build first
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    registry.load(library)
    return library


def _compile(folder: Path, verbose: bool) -> None:
    """Build the library into `folder`, in a process of its own: cpp_extension.load also loads it,
    from a path that is about to change."""
    arguments = {
        "name": "_C",
        "sources": [str(ROOT / name) for name in sources()],
        "extra_cflags": compile_flags(),
        "build_directory": str(folder),
        "is_python_module": False,
        "verbose": verbose,
    }
    code = f"from torch.utils import cpp_extension; cpp_extension.load(**{arguments!r})"
    # A virtual environment that is not activated has its ninja beside its python.
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PATH": path},
        stdout=None if verbose else subprocess.PIPE,
        stderr=None if verbose else subprocess.STDOUT,
        text=True,
    )
    if run.returncode != 0:
        raise RuntimeError(f"moe_ext.build.jit: the build failed\n{run.stdout or ''}")
