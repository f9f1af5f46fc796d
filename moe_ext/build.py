"""Build the working tree's C++ and CUDA sources at run time: `jit`, for development."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from . import toolkit as finder
from .toolkit import ROOT, Toolkit


def cmake_prefix_path() -> str:
    """Return CMAKE_PREFIX_PATH for find_package(moe_ext) in a C++ program.

    It names the folders of this package and of torch, separated by a semicolon.
    """
    import torch.utils

    return f"{ROOT};{torch.utils.cmake_prefix_path}"


def jit(verbose: bool = False) -> Path:
    """Build the working tree's csrc and use it from now on.

    For a source tree without a compiled library. Where torch has CUDA the CUDA kernels are built
    too; without a toolkit for this torch they are left out with a RuntimeWarning.

    The libraries are kept in TORCH_EXTENSIONS_DIR, by torch version and source, and built again
    when one of them changes. A build that was interrupted does not block the next one.

    Args:
        verbose: show the compilers' output

    Returns:
        the CPU library's path; in a second call the path of the loaded one

    Raises:
        RuntimeError: a library is loaded already, that of the package or that of other sources; or
            the sources or a compiler are missing; or FORCE_CUDA=1 and no toolkit fits this torch
    """
    import torch
    from torch.utils import cpp_extension

    from .ops.registry import libraries

    if not (ROOT / "csrc" / "ops.cpp").exists():
        raise RuntimeError(
            f"moe_ext.build.jit: no source tree, {ROOT / 'csrc'} is missing; call it from a clone "
            "of the repository"
        )
    loads = [{"name": "_C", "sources": finder.sources(), "extra_cflags": finder.compile_flags()}]
    choice = finder.require_toolkit() if torch.version.cuda else None
    toolkit = choice.toolkit if choice else None
    if toolkit:
        cuda = {"name": "_C_cuda", "sources": finder.cuda_sources()}
        cuda |= {"extra_cflags": finder.cuda_binding_flags(toolkit)}
        cuda |= {"extra_cuda_cflags": finder.cuda_flags()}
        cuda |= {"extra_ldflags": finder.cuda_link_flags(toolkit)}
        loads.append(cuda)
    folder = _folder([*finder.sources(), *finder.cuda_sources(), *finder.headers()], loads, toolkit)
    library = folder / f"_C{cpp_extension.LIB_EXT}"
    if libraries.library is None:
        if choice and toolkit is None and os.environ.get("FORCE_CUDA") != "0":
            warnings.warn(f"moe_ext.build.jit: {choice}", RuntimeWarning, stacklevel=2)
        _build_once(folder, loads, toolkit, verbose)
        libraries.load(library)
    elif libraries.library != library:
        raise RuntimeError(
            f"moe_ext.build.jit: {libraries.library} is already loaded, and a process can load "
            "one; use these sources in a new process, without that file if it is the package's own"
        )
    return library


def _folder(files: list[str], loads: list[dict], toolkit: Toolkit | None) -> Path:
    """The folder for the libraries of these calls of cpp_extension.load."""
    import torch
    from torch.utils import cpp_extension

    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    flags = [repr(loads), str(toolkit), os.environ.get("TORCH_CUDA_ARCH_LIST", "")]
    digest = hashlib.sha256(" ".join(flags).encode())
    for name in files:
        digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes() + b"\0")
    return cache / "moe_ext" / f"torch{torch.__version__}-{digest.hexdigest()[:16]}"


def _build_once(folder: Path, loads: list[dict], toolkit: Toolkit | None, verbose: bool) -> None:
    """Build into a folder that is renamed to `folder` when done, so that no lock is waited for."""
    if folder.exists():
        return
    if finder.find_compiler() is None:
        raise RuntimeError(f"moe_ext.build: {finder.NO_COMPILER}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix="building-"))
    try:
        for load in loads:
            _compile(load, building, toolkit, verbose)
        try:
            os.rename(building, folder)
        except OSError:
            if not folder.exists():  # else another process finished the same build first
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _compile(load: dict, folder: Path, toolkit: Toolkit | None, verbose: bool) -> None:
    """Build a library into `folder`.

    In a process of its own: cpp_extension.load would load the library from a path that changes.
    """
    flags = load.get("extra_ldflags", [])
    environment = {}
    if toolkit:
        environment["CUDA_HOME"] = str(toolkit.root)
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
        environment["TORCH_CUDA_ARCH_LIST"] = listed or finder.architectures(toolkit)
        # cpp_extension.load links -lcudart too, which some toolkits lack. An empty archive of that
        # name serves, and the static runtime is used.
        (folder / "libcudart.a").write_bytes(b"!<arch>\n")
        flags = [f"-L{folder}", *flags]
    arguments = load | {
        "extra_ldflags": flags,
        "sources": [str(ROOT / name) for name in load["sources"]],
        "build_directory": str(folder),
        "is_python_module": False,
        "verbose": verbose,
    }
    code = f"from torch.utils import cpp_extension; cpp_extension.load(**{arguments!r})"
    # ninja is beside Python, also in a virtual environment that is not activated.
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment | {"PATH": path},
        stdout=None if verbose else subprocess.PIPE,
        stderr=None if verbose else subprocess.STDOUT,
        text=True,
    )
    if run.returncode != 0:
        raise RuntimeError(f"moe_ext.build: the build failed\n{run.stdout or ''}")
