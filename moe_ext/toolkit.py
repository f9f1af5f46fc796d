"""Find the CUDA toolkit and the C++ compiler; list sources and flags.

setup.py loads this file by its path, before torch and the package are there: so nothing here
imports them at module level.
"""

import hashlib
import mmap
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# The library uses the stable ABI of this torch, so it runs on this one and on every later one.
TARGET = "0x020a000000000000"  # 2.10

NO_COMPILER = "no working C++ compiler found; install one, or set CXX to one"

USUAL_PLACES = ("/usr/local/cuda", "/opt/cuda")

# Folders of the headers and of the static runtime, relative to a toolkit's root: they differ
# between the toolkits of NVIDIA, conda, Debian and PyPI.
_TARGETS = ("targets/x86_64-linux/", "targets/sbsa-linux/")
_INCLUDES = ("include", *(f"{target}include" for target in _TARGETS))
_LIBRARIES = (
    *("lib64", "lib", *(f"{target}lib" for target in _TARGETS)),
    *("lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu"),
)


class Toolkit(NamedTuple):
    """A CUDA toolkit.

    root: the folder that has bin/nvcc
    include: the folder of its headers
    version: (major, minor)
    """

    root: Path
    include: Path
    version: tuple[int, int]

    @property
    def name(self) -> str:
        """The version as text: 13.0."""
        return ".".join(map(str, self.version))

    @property
    def libraries(self) -> Path | None:
        """The folder of the static runtime library; None if it is missing."""
        folders = (self.root / name for name in _LIBRARIES)
        return next((f for f in folders if (f / "libcudart_static.a").exists()), None)


def _toolkit_candidates() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    nvcc = shutil.which("nvcc")
    if nvcc:
        yield Path(nvcc).resolve().parent.parent
        # An nvcc on PATH may be a script that calls the nvcc of a toolkit.
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
    """Return the first CUDA toolkit that has nvcc and headers; None if there is none.

    Searched in this order: CUDA_HOME, CUDA_PATH, nvcc on PATH, the usual places, site-packages.
    torch accepts the folder above any nvcc on PATH, also one without headers.

    major: the CUDA major version; toolkits of other versions are skipped
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
    """The toolkit that builds the CUDA kernels, and the reason.

    toolkit: None where the CUDA kernels are left out
    why: a phrase without a full stop
    fix: how to get another choice, a phrase without a full stop; "" if there is no way
    """

    toolkit: Toolkit | None
    why: str
    fix: str

    def __str__(self) -> str:
        if self.toolkit:
            return f"CUDA kernels with {self.why}"
        return f"{self.why}: CPU kernels only" + (f"; {self.fix}" if self.fix else "")


def choose_toolkit() -> ToolkitChoice:
    """Choose the toolkit for the CUDA kernels: the first with the CUDA major version of torch.

    FORCE_CUDA=1 builds the kernels for a torch without CUDA too; FORCE_CUDA=0 leaves them out.
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
    """Call `choose_toolkit`; raise RuntimeError if FORCE_CUDA=1 is set and it finds none."""
    choice = choose_toolkit()
    if choice.toolkit is None and os.environ.get("FORCE_CUDA") == "1":
        raise RuntimeError(f"FORCE_CUDA=1, but {choice.why}; {choice.fix}")
    return choice


def _found(root: Path, pattern: str) -> list[str]:
    return [path.relative_to(root).as_posix() for path in sorted(root.glob(pattern))]


def sources(root: Path = ROOT) -> list[str]:
    """List the C++ sources of the CPU library, relative to `root`."""
    return ["csrc/ops.cpp", *_found(root, "csrc/cpu/**/*.cpp")]


def cuda_sources(root: Path = ROOT) -> list[str]:
    """List the sources of the CUDA library, relative to `root`."""
    return [*_found(root, "csrc/cuda_*.cpp"), *_found(root, "csrc/cuda/**/*.cu")]


def headers(root: Path = ROOT) -> list[str]:
    """List the headers that these sources include, relative to `root`."""
    return [*_found(root, "csrc/**/*.h"), *_found(root, "csrc/**/*.cuh")]


def compile_flags() -> list[str]:
    """Flags for every C++ file. torch adds the language standard."""
    if sys.platform == "win32":
        return ["/O2", f"/DTORCH_TARGET_VERSION={TARGET}"]
    # -g0: Python's own flags ask for debug symbols, which make the library ten times larger.
    return ["-O3", "-g0", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TARGET}"]


def cuda_binding_flags(toolkit: Toolkit) -> list[str]:
    """Flags for the C++ file of the CUDA library.

    The list of architectures becomes a string in the library, which `doctor` reads.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or architectures(toolkit)
    wanted = re.split(r"[; ]+", listed.strip())
    # Commas, because a shell ends a command at a semicolon.
    built_by = f"-DMOE_EXT_TOOLKIT={toolkit.name}"
    return [*compile_flags(), built_by, f"-DMOE_EXT_ARCHITECTURES={','.join(wanted)}"]


# A text that csrc/cuda_ops.cpp puts into the CUDA library.
_BUILT = re.compile(rb"moe_ext built by CUDA ([0-9.]+) for compute capability ([0-9a-zA-Z.+,]*)")


class CudaBuild(NamedTuple):
    """How a CUDA library was built.

    cuda: the toolkit's version: 13.0
    architectures: the items of its TORCH_CUDA_ARCH_LIST
    """

    cuda: str
    architectures: list[str]


def cuda_build(library: Path) -> CudaBuild | None:
    """Read from a CUDA library how it was built; None if it does not say, as an empty file."""
    if not library.stat().st_size:
        return None
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        found = _BUILT.search(text)
        return found and CudaBuild(found[1].decode(), found[2].decode().split(","))


def source() -> str:
    """The argument of pip install: the folder of the sources, where it is known."""
    import importlib.metadata
    import json
    import urllib.parse
    import urllib.request

    if (ROOT / "setup.py").exists():
        return f"-e {ROOT}"
    try:
        text = importlib.metadata.distribution("moe_ext").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        text = None
    origin: dict = json.loads(text) if text else {"url": ""}
    url = urllib.parse.urlsplit(origin["url"])
    # A wheel has the CPU library alone.
    if not origin["url"] or url.path.endswith(".whl"):
        return "--no-binary moe_ext moe_ext"
    if url.scheme == "file" and "subdirectory" not in origin:
        return urllib.request.url2pathname(url.path)
    source = origin["url"]
    if "vcs_info" in origin:
        source = f"{origin['vcs_info']['vcs']}+{source}@{origin['vcs_info']['commit_id']}"
    folder = origin.get("subdirectory")
    return f"'{source}#subdirectory={folder}'" if folder else source


def install_again() -> str:
    """The command that builds and installs the package again, beside the torch that is there."""
    return f"pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps {source()}"


def cuda_flags() -> list[str]:
    """Flags for every CUDA file.

    The digest of the headers is one of them: a torch without CUDA does not tell ninja which headers
    nvcc read, so a changed header has to change the command to compile again.
    """
    digest = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in headers()))
    headers_flag = f"-DMOE_EXT_HEADERS=0x{digest.hexdigest()[:15]}"
    # Two architectures at a time: one file takes longer than most others together.
    return ["-O3", "--threads=2", "-Xcompiler=-fvisibility=hidden", headers_flag]


def architectures(toolkit: Toolkit) -> str:
    """The default of TORCH_CUDA_ARCH_LIST: every card from Turing on that the toolkit compiles for.

    It does not depend on the card in this machine. The PTX of 8.0 serves the cards that run none of
    the compiled kernels, as Jetson's.
    """
    known = ["7.5", "8.0+PTX", "9.0"] + (["10.0", "12.0"] if toolkit.version >= (12, 8) else [])
    return ";".join(known) + "+PTX"


def prepare_cuda(toolkit: Toolkit) -> None:
    """Let torch.utils.cpp_extension compile with this toolkit, also if torch has no CUDA."""
    from torch.utils import cpp_extension

    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):  # torch rejects an empty list
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(toolkit)
    cpp_extension.CUDA_HOME = str(toolkit.root)


def cuda_link_flags(toolkit: Toolkit) -> list[str]:
    """Flags that link the runtime statically.

    One library then serves every torch of this CUDA major version.
    """
    return [
        f"-L{toolkit.libraries}",
        *("-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"),
        *("-Wl,--no-as-needed", "-ltorch_cuda", "-Wl,--as-needed"),
    ]


def make_stub(folder: Path) -> None:
    """Create an empty libtorch_cuda.so to link against, for a torch that has none."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "libtorch_cuda.so"
    compiler = os.environ.get("CXX", "c++").split()
    command = [*compiler, "-shared", "-x", "c++", os.devnull, f"-Wl,-soname,{name}", "-o"]
    subprocess.run([*command, str(folder / name)], check=True)


def find_compiler() -> str | None:
    """Return the C++ compiler that torch.utils.cpp_extension calls; None if it cannot compile."""
    name = os.environ.get("CXX") or ("cl" if sys.platform == "win32" else "c++")
    command = name.split()
    path = shutil.which(command[0])
    if path is None or sys.platform == "win32":
        return path
    check = [*command, "-x", "c++", "-fsyntax-only", "-"]
    try:
        run = subprocess.run(check, input=b"#include <vector>\n", capture_output=True)
    except OSError:  # the file is not a program
        return None
    return path if run.returncode == 0 else None


if __name__ == "__main__":  # for CMake: print the toolkit's root and headers as a CMake list
    found = find_toolkit()
    sys.exit("no CUDA toolkit found") if found is None else print(f"{found.root};{found.include}")
