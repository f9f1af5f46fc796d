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
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# The oldest torch whose stable ABI the library asks for: it runs on this one and every later one.
TARGET = "0x020a000000000000"  # 2.10


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
    def libraries(self) -> Path:
        """The folder of its static runtime library. Raises RuntimeError where it has none."""
        for name in _LIBRARIES:
            if (self.root / name / "libcudart_static.a").exists():
                return self.root / name
        raise RuntimeError(f"the CUDA toolkit at {self.root} has no libcudart_static.a")


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


def find_toolkit() -> Toolkit | None:
    """The CUDA toolkit: CUDA_HOME, nvcc on PATH, the usual places, PyPI's; None if there is none.

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
            return Toolkit(root, headers[0], (number // 1000, number % 1000 // 10))
    return None


def choose_toolkit() -> tuple[Toolkit | None, str]:
    """The toolkit to build the CUDA kernels with, or None, and a line that says why.

    FORCE_CUDA=1 asks for the kernels beside a torch without CUDA too, FORCE_CUDA=0 forbids them.
    Raises RuntimeError where they are asked for, or torch has CUDA, and the toolkit is none for it.
    """
    import torch

    force = os.environ.get("FORCE_CUDA", "")
    if force == "0":
        return None, "FORCE_CUDA=0: CPU kernels only"
    name = f"torch {torch.__version__}"
    if torch.version.cuda is None and force != "1":
        return None, f"{name} has no CUDA: CPU kernels only (FORCE_CUDA=1 builds both)"
    if sys.platform == "win32":
        return None, "the CUDA kernels are built on Linux: CPU kernels only"
    toolkit = find_toolkit()
    if toolkit is None:
        cure = "set CUDA_HOME, or pip install 'cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]"
        cure += f"=={torch.version.cuda}.*'" if torch.version.cuda else "'"
        if force == "1":
            raise RuntimeError(f"FORCE_CUDA=1, but no CUDA toolkit found; {cure}")
        return None, f"no CUDA toolkit found: CPU kernels only; {cure}, and --no-build-isolation"
    version = ".".join(map(str, toolkit.version))
    if torch.version.cuda and int(torch.version.cuda.split(".")[0]) != toolkit.version[0]:
        raise RuntimeError(
            f"{name} is for CUDA {torch.version.cuda}, the toolkit at {toolkit.root} is CUDA "
            f"{version}; set CUDA_HOME to one of torch's major version, build beside the torch in "
            "use with --no-build-isolation, or set FORCE_CUDA=0 for CPU kernels only"
        )
    return toolkit, f"CUDA kernels with the toolkit at {toolkit.root}, CUDA {version}"


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
    """The C++ compiler that torch.utils.cpp_extension would call, or None."""
    name = os.environ.get("CXX") or ("cl" if sys.platform == "win32" else "c++")
    return shutil.which(name.split()[0])


def _tree_key(root: Path, torch_version: str, files: list[str], flags: list[str]) -> str:
    digest = hashlib.sha256()
    for name in files:
        digest.update(name.encode() + b"\0" + (root / name).read_bytes() + b"\0")
    digest.update(" ".join(flags).encode())
    return f"torch{torch_version}-{digest.hexdigest()[:16]}"


def jit(verbose: bool = False) -> Path:
    """Build the working tree's csrc and use it from now on; returns the CPU library's path.

    For a source tree whose package has no compiled library. Where torch has CUDA and a toolkit is
    found, the CUDA kernels are built too. The libraries are kept under torch's extension folder
    (TORCH_EXTENSIONS_DIR), by torch version and source, and built again when one of them changes.
    They are built in a folder of their own that is renamed when done: an interrupted build leaves
    nothing that a later one would wait for.

    Raises RuntimeError where a compiled library is loaded already, where the sources are not there
    (an installed package has none), where there is no compiler, or where torch has CUDA and the
    toolkit is none for it (`choose_toolkit`).
    """
    import torch
    from torch.utils import cpp_extension

    from .ops import registry

    if registry.library is not None:
        raise RuntimeError(f"moe_ext.build.jit: {registry.library} is already loaded")
    _check_tree("jit")
    loads = [{"name": "_C", "sources": sources(), "extra_cflags": compile_flags()}]
    toolkit = choose_toolkit()[0] if torch.version.cuda else None
    if toolkit:
        cuda = {"name": "_C_cuda", "sources": cuda_sources()}
        cuda |= {"extra_cflags": cuda_binding_flags(toolkit)}
        cuda |= {"extra_cuda_cflags": cuda_flags(), "extra_ldflags": cuda_link_flags(toolkit)}
        loads.append(cuda)
    files = [*sources(), *cuda_sources(), *headers()]
    folder = _build_once(files, loads, toolkit, verbose)
    library = folder / f"_C{cpp_extension.LIB_EXT}"
    registry.load(library)
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
    folder = _build_once(files, [module], None, verbose)
    return folder / f"moe_ext_dev{cpp_extension.LIB_EXT}"


def _check_tree(function: str) -> None:
    if not (ROOT / "csrc" / "ops.cpp").exists():
        raise RuntimeError(f"moe_ext.build.{function}: no source tree, {ROOT / 'csrc'} is missing")
    if find_compiler() is None:
        raise RuntimeError(f"moe_ext.build.{function}: no C++ compiler; install one or set CXX")


def _build_once(
    files: list[str], loads: list[dict], toolkit: Toolkit | None, verbose: bool
) -> Path:
    """The folder with the libraries of these cpp_extension.load calls, built if need be."""
    import torch
    from torch.utils import cpp_extension

    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    flags = [repr(loads), str(toolkit), os.environ.get("TORCH_CUDA_ARCH_LIST", "")]
    folder = cache / "moe_ext" / _tree_key(ROOT, torch.__version__, files, flags)
    if folder.exists():
        return folder
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
    return folder


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
    code = f"""
import importlib.util, pathlib
from torch.utils import cpp_extension
spec = importlib.util.spec_from_file_location("build", {str(Path(__file__).resolve())!r})
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
toolkit = build.find_toolkit() if {toolkit is not None} else None
if toolkit:
    build.prepare_cuda(toolkit)
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
