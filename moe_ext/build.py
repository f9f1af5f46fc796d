"""How the C++ and CUDA sources are built, by setup.py and by `jit`; and where the toolkit is.

Nothing here imports the package or torch at module level, so that setup.py can load this file by
its path, and `python moe_ext/build.py toolkit` can tell CMake where the CUDA toolkit is.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# The oldest torch whose stable ABI the library asks for: it runs on this one and every later one.
TARGET = "0x020a000000000000"  # 2.10


NO_COMPILER = "no working C++ compiler found; install one, or set CXX to one"

# Where toolkits are installed.
USUAL_PLACES = ("/usr/local/cuda", "/opt/cuda")

# Where a toolkit keeps its headers and its static runtime: NVIDIA's, conda's, Debian's, PyPI's.
_TARGETS = ("targets/x86_64-linux/", "targets/sbsa-linux/")
_INCLUDES = ("include", *(f"{target}include" for target in _TARGETS))
_LIBRARIES = (
    *("lib64", "lib", *(f"{target}lib" for target in _TARGETS)),
    *("lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu"),
)


class Toolkit(NamedTuple):
    """A CUDA toolkit: its root folder, which has bin/nvcc, its headers, and its version."""

    root: Path
    include: Path
    version: tuple[int, int]

    @property
    def name(self) -> str:
        """Its version, as 13.0."""
        return ".".join(map(str, self.version))

    @property
    def libraries(self) -> Path | None:
        """The folder of its static runtime library, None where it has none."""
        folders = (self.root / name for name in _LIBRARIES)
        return next((f for f in folders if (f / "libcudart_static.a").exists()), None)


def _toolkit_candidates() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    nvcc = shutil.which("nvcc")
    if nvcc:
        yield Path(nvcc).resolve().parent.parent
        # An nvcc on PATH may be a script that calls the toolkit's own.
        with open(nvcc, "rb") as file:
            script = file.read(4096)
        if script.startswith(b"#!"):
            for match in re.findall(rb"[^\s\"']*/bin/nvcc", script):
                yield Path(os.fsdecode(match)).parent.parent
    yield from map(Path, USUAL_PLACES)
    # PyPI's cuda-toolkit[nvcc,crt,nvvm,cudart,cccl].
    site = Path(sysconfig.get_path("purelib"))
    yield from sorted(site.glob("nvidia/cu*"), reverse=True)


def find_toolkit(major: int | None = None) -> Toolkit | None:
    """The CUDA toolkit: CUDA_HOME, nvcc on PATH, the usual places, PyPI's; None if there is none.

    major: passes over toolkits of other CUDA major versions

    torch takes the folder above any nvcc on PATH for one; here it has to have the headers too.
    """
    for root in _toolkit_candidates():
        nvcc = root / "bin" / ("nvcc.exe" if sys.platform == "win32" else "nvcc")
        includes = [root / name for name in _INCLUDES]
        headers = [path for path in includes if (path / "cuda_runtime_api.h").exists()]
        if not (headers and nvcc.exists()):
            continue
        header = (headers[0] / "cuda_runtime_api.h").read_text()
        version = re.search(r"#define CUDART_VERSION\s+(\d+)", header)
        if version:
            number = int(version.group(1))
            toolkit = Toolkit(root, headers[0], (number // 1000, number % 1000 // 10))
            if major in (None, toolkit.version[0]):
                return toolkit
    return None


class ToolkitChoice(NamedTuple):
    """The toolkit to build the CUDA kernels with, or None; why; and how to get another choice.

    why, fix: phrases without a full stop; fix is "" where there is nothing to do
    """

    toolkit: Toolkit | None
    why: str
    fix: str

    def __str__(self) -> str:
        if self.toolkit:
            return f"CUDA kernels with {self.why}"
        return f"{self.why}: CPU kernels only" + (f"; {self.fix}" if self.fix else "")


def choose_toolkit() -> ToolkitChoice:
    """The toolkit to build the CUDA kernels with: the first of the CUDA major version of torch.

    FORCE_CUDA=1 asks for the kernels beside a torch without CUDA too, FORCE_CUDA=0 forbids them.
    """
    import torch

    force, wanted = os.environ.get("FORCE_CUDA", ""), torch.version.cuda
    if force == "0":
        return ToolkitChoice(None, "FORCE_CUDA=0", "unset FORCE_CUDA to build both")
    if wanted is None and force != "1":
        why = f"torch {torch.__version__} has no CUDA"
        return ToolkitChoice(None, why, "set FORCE_CUDA=1 to build both")
    if sys.platform == "win32":
        return ToolkitChoice(None, "the CUDA kernels are built on Linux", "")
    major = int(wanted.split(".")[0]) if wanted else None
    toolkit = find_toolkit(major)
    if toolkit and toolkit.libraries:
        return ToolkitChoice(toolkit, f"the toolkit at {toolkit.root}, CUDA {toolkit.name}", "")
    if toolkit:
        why = f"the CUDA toolkit at {toolkit.root} has no libcudart_static.a"
        return ToolkitChoice(None, why, "install its runtime's development files (cudart)")
    fix = f"set CUDA_HOME to a toolkit{f' of CUDA {major}' if major else ''}"
    if major is None or major >= 13:  # PyPI has no nvcc of an older one
        release = f"=={wanted}.*" if wanted else ""
        fix += f" or pip install 'cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]{release}'"
    other = find_toolkit()
    if other is None:
        return ToolkitChoice(None, "no CUDA toolkit found", fix)
    why = f"torch {torch.__version__} is for CUDA {wanted}, the toolkit at {other.root} is CUDA "
    fix = f"install a torch for CUDA {other.version[0]}, or {fix}"
    return ToolkitChoice(None, why + other.name, fix)


def require_toolkit() -> ToolkitChoice:
    """`choose_toolkit`; raises RuntimeError where FORCE_CUDA=1 asks for one and there is none."""
    choice = choose_toolkit()
    if choice.toolkit is None and os.environ.get("FORCE_CUDA") == "1":
        raise RuntimeError(f"FORCE_CUDA=1, but {choice.why}; {choice.fix}")
    return choice


def _relative(root: Path, paths: list[Path]) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def sources(root: Path = ROOT) -> list[str]:
    """The C++ sources of the CPU library, relative to `root`."""
    csrc = root / "csrc"
    return _relative(root, [csrc / "ops.cpp", *sorted((csrc / "cpu").glob("*.cpp"))])


def cuda_sources(root: Path = ROOT) -> list[str]:
    """The sources of the CUDA library, relative to `root`."""
    csrc = root / "csrc"
    return _relative(root, [csrc / "cuda_ops.cpp", *sorted((csrc / "cuda").glob("*.cu"))])


def headers(root: Path = ROOT) -> list[str]:
    """The headers that `sources` and `cuda_sources` include, relative to `root`."""
    csrc = root / "csrc"
    return _relative(root, [*sorted(csrc.rglob("*.h")), *sorted(csrc.rglob("*.cuh"))])


def compile_flags() -> list[str]:
    """Flags for every C++ file. The language standard is torch's choice."""
    if sys.platform == "win32":
        return ["/O2", f"/DTORCH_TARGET_VERSION={TARGET}"]
    # -g0: Python's own flags ask for debug symbols, which make the library ten times larger.
    return ["-O3", "-g0", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TARGET}"]


def cuda_binding_flags(toolkit: Toolkit) -> list[str]:
    """Flags for the C++ file of the CUDA library. Its bytes tell `doctor` which cards it is for."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or architectures(toolkit)
    wanted = re.split(r"[; ]+", listed.strip())
    # A shell would take a semicolon for its own.
    return [*compile_flags(), f"-DMOE_EXT_ARCHITECTURES={','.join(wanted)}"]


def cuda_flags() -> list[str]:
    """Flags for every CUDA file. A torch without CUDA does not tell ninja which headers nvcc read:
    with their digest here, a change of one is a change of the command, and compiles again."""
    digest = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in headers()))
    headers_flag = f"-DMOE_EXT_HEADERS=0x{digest.hexdigest()[:15]}"
    return ["-O3", "-Xcompiler=-fvisibility=hidden", headers_flag]


def architectures(toolkit: Toolkit) -> str:
    """TORCH_CUDA_ARCH_LIST where it is not set: every card from Turing on that the toolkit knows,
    whichever is in this machine; 8.0's PTX is for those between and for small ones."""
    known = ["7.5", "8.0+PTX", "9.0"] + (["10.0", "12.0"] if toolkit.version >= (12, 8) else [])
    return ";".join(known) + "+PTX"


def prepare_cuda(toolkit: Toolkit) -> None:
    """Make torch.utils.cpp_extension compile with this toolkit, beside a torch without CUDA too."""
    from torch.utils import cpp_extension

    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):  # an empty one is no list to torch
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(toolkit)
    cpp_extension.CUDA_HOME = str(toolkit.root)


def cuda_link_flags(toolkit: Toolkit) -> list[str]:
    """The runtime goes into the library: one file serves every torch of this CUDA major version."""
    return [
        f"-L{toolkit.libraries}",
        *("-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"),
        *("-Wl,--no-as-needed", "-ltorch_cuda", "-Wl,--as-needed"),
    ]


def make_stub(folder: Path) -> None:
    """An empty libtorch_cuda.so, to link against where torch has none."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "libtorch_cuda.so"
    compiler = os.environ.get("CXX", "c++").split()
    command = [*compiler, "-shared", "-x", "c++", os.devnull, f"-Wl,-soname,{name}", "-o"]
    subprocess.run([*command, str(folder / name)], check=True)


def find_compiler() -> str | None:
    """The C++ compiler that torch.utils.cpp_extension would call; None where there is none, or one
    that does not compile."""
    name = os.environ.get("CXX") or ("cl" if sys.platform == "win32" else "c++")
    command = name.split()
    path = shutil.which(command[0])
    if path is None or sys.platform == "win32":
        return path
    check = [*command, "-x", "c++", "-fsyntax-only", "-"]
    try:
        run = subprocess.run(check, input=b"#include <vector>\n", capture_output=True)
    except OSError:  # no program
        return None
    return path if run.returncode == 0 else None


def cmake_prefix_path() -> str:
    """CMAKE_PREFIX_PATH for a C++ program's find_package(moe_ext): the folders where CMake finds
    this package and torch."""
    import torch.utils

    return f"{ROOT};{torch.utils.cmake_prefix_path}"


def _tree_key(root: Path, torch_version: str, files: list[str], flags: list[str]) -> str:
    digest = hashlib.sha256()
    for name in files:
        digest.update(name.encode() + b"\0" + (root / name).read_bytes() + b"\0")
    digest.update(" ".join(flags).encode())
    return f"torch{torch_version}-{digest.hexdigest()[:16]}"


def jit(verbose: bool = False) -> Path:
    """Build the working tree's csrc and use it from now on; returns the CPU library's path.

    For a source tree whose package has no compiled library. Where torch has CUDA the CUDA kernels
    are built too; without a toolkit for this torch a RuntimeWarning says so, and with FORCE_CUDA=1
    it is an error. The libraries are kept under torch's extension folder (TORCH_EXTENSIONS_DIR), by
    torch version and source, and built again when one of them changes. They are built in a folder
    of their own that is renamed when done: an interrupted build leaves nothing that a later one
    would wait for. A second call returns the path of what the first one loaded.

    Args:
        verbose: show the compilers' output

    Raises:
        RuntimeError: the library in use was built from other sources, or not by `jit`; the sources
            are not there (an installed package has none); there is no compiler; or FORCE_CUDA=1
            and there is no toolkit for this torch
    """
    import torch
    from torch.utils import cpp_extension

    from .ops.registry import libraries

    _check_tree("jit")
    loads = [{"name": "_C", "sources": sources(), "extra_cflags": compile_flags()}]
    choice = require_toolkit() if torch.version.cuda else None
    toolkit = choice.toolkit if choice else None
    if toolkit:
        cuda = {"name": "_C_cuda", "sources": cuda_sources()}
        cuda |= {"extra_cflags": cuda_binding_flags(toolkit)}
        cuda |= {"extra_cuda_cflags": cuda_flags(), "extra_ldflags": cuda_link_flags(toolkit)}
        loads.append(cuda)
    folder = _folder([*sources(), *cuda_sources(), *headers()], loads, toolkit)
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


def jit_dev(verbose: bool = False) -> Path:
    """Build moe_ext_dev, the CUDA kernels run on the CPU, for tests; returns the module's path.

    Kept like what `jit` builds. Needs a CUDA toolkit's headers. Raises RuntimeError where they, the
    sources or a compiler are missing.
    """
    from torch.utils import cpp_extension

    _check_tree("jit_dev")
    toolkit = find_toolkit()
    if toolkit is None:
        raise RuntimeError("moe_ext.build.jit_dev: no CUDA toolkit found; set CUDA_HOME")
    kernels = [name for name in cuda_sources() if name.endswith(".cu")]
    others = ["csrc/cuda_ops.cpp", "csrc/dev/bindings.cpp", "tests/cusim/cusim.cpp"]
    includes = [f"-I{ROOT / name}" for name in ("csrc/cuda", "tests/cusim")]
    flags = [*compile_flags(), "-DMOE_EXT_EMULATED", "-fno-strict-aliasing", *includes]
    module = {
        "name": "moe_ext_dev",
        "sources": [*kernels, *others],
        "extra_cflags": [*flags, "-isystem", str(toolkit.include)],
    }
    files = [*kernels, *others, "tests/cusim/cusim.h", "tests/cusim/fiber.h", *headers()]
    folder = _folder(files, [module], None)
    _build_once(folder, [module], None, verbose)
    return folder / f"moe_ext_dev{cpp_extension.LIB_EXT}"


def _check_tree(function: str) -> None:
    if not (ROOT / "csrc" / "ops.cpp").exists():
        raise RuntimeError(f"moe_ext.build.{function}: no source tree, {ROOT / 'csrc'} is missing")


def _folder(files: list[str], loads: list[dict], toolkit: Toolkit | None) -> Path:
    """Where the libraries of these cpp_extension.load calls are kept."""
    import torch
    from torch.utils import cpp_extension

    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    flags = [repr(loads), str(toolkit), os.environ.get("TORCH_CUDA_ARCH_LIST", "")]
    return cache / "moe_ext" / _tree_key(ROOT, torch.__version__, files, flags)


def _build_once(folder: Path, loads: list[dict], toolkit: Toolkit | None, verbose: bool) -> None:
    """Build the libraries of these cpp_extension.load calls into `folder`, if it is not there."""
    if folder.exists():
        return
    if find_compiler() is None:
        raise RuntimeError(f"moe_ext.build: {NO_COMPILER}")
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
    """Build a library into `folder`, in a process of its own: cpp_extension.load also loads it,
    from a path that is about to change."""
    flags = load.get("extra_ldflags", [])
    if toolkit:
        # cpp_extension.load asks for the shared runtime too, which not every toolkit has under that
        # name: an archive of nothing comes first.
        (folder / "libcudart.a").write_bytes(b"!<arch>\n")
        flags = [f"-L{folder}", *flags]
    arguments = load | {
        "extra_ldflags": flags,
        "sources": [_compiled_as(ROOT / name, folder, toolkit) for name in load["sources"]],
        "build_directory": str(folder),
        "is_python_module": False,
        "verbose": verbose,
    }
    prepare = f"build.prepare_cuda(build.{toolkit!r})" if toolkit else ""
    code = f"""
import importlib.util
from pathlib import PosixPath
from torch.utils import cpp_extension
spec = importlib.util.spec_from_file_location("build", {str(Path(__file__).resolve())!r})
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
{prepare}
cpp_extension.load(**{arguments!r})
"""
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
        raise RuntimeError(f"moe_ext.build: the build failed\n{run.stdout or ''}")


def _compiled_as(source: Path, folder: Path, toolkit: Toolkit | None) -> str:
    """The path to compile: where no nvcc is to see a .cu file, a C++ file that includes it."""
    if source.suffix != ".cu" or toolkit:
        return str(source)
    wrapper = folder / f"{source.stem}_cu.cpp"
    wrapper.write_text(f'#include "{source}"\n')
    return str(wrapper)


if __name__ == "__main__" and sys.argv[1:] == ["toolkit"]:
    # For CMake: the root and the headers, as a list.
    found = find_toolkit()
    sys.exit("no CUDA toolkit found") if found is None else print(f"{found.root};{found.include}")
