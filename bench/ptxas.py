"""Build the CUDA kernels and record their registers and spills in results/ptxas.json.

    python bench/ptxas.py

Fails if a kernel spills registers, or if a kernel that moves 16-byte vectors has no 16-byte load
and store in its PTX. Needs a CUDA toolkit and any torch, no GPU. Dynamic shared memory is not
recorded: tests/ops/test_launches.py bounds it.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from common import RESULTS, as_json

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cuda"
RESULT = RESULTS / "ptxas.json"

sys.path.insert(0, str(ROOT / "moe_ext"))
import toolkit  # noqa: E402  the package itself need not be importable

FUNCTION = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>sm_\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
ENTRY = re.compile(r"\.entry (\w+)\(.*?\n\{(.*?)\n\}", re.DOTALL)
VECTOR = r"\.global[.\w:]*\.(?:v4\.[bfsu]32|v2\.[bfsu]64)"


def compile_kernels(found: "toolkit.Toolkit") -> str:
    """Build moe_ext._C_cuda under BUILD, keeping the PTX; return ptxas's output."""
    shutil.rmtree(BUILD, ignore_errors=True)
    (BUILD / "ptx").mkdir(parents=True)
    flags = f"-Xptxas -v --keep --keep-dir {BUILD / 'ptx'}"
    command = [sys.executable, "setup.py", "build_ext"]
    command += ["--build-lib", str(BUILD / "lib"), "--build-temp", str(BUILD / "temp")]
    env = os.environ | {"FORCE_CUDA": "1", "CUDA_HOME": str(found.root)}
    env |= {"TORCH_CUDA_ARCH_LIST": toolkit.architectures(found)}
    run = subprocess.run(
        command,
        cwd=ROOT,
        env=env | {"NVCC_APPEND_FLAGS": flags},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if run.returncode != 0:
        sys.exit(run.stdout)
    return run.stdout


def plain_names(mangled: set[str]) -> dict[str, str]:
    """_ZN7moe_ext4cuda... -> dispatch_kernel<float, 4>"""
    names = sorted(mangled)
    run = subprocess.run(
        ["c++filt"], input="\n".join(names), text=True, capture_output=True, check=True
    )

    def short(full: str) -> str:
        name = full.replace("(anonymous namespace)::", "").removeprefix("void ")
        return re.sub(r"\(int\)", "", name.split(">(")[0] + ">" if ">(" in name else name)

    plain = [short(name).replace("moe_ext::cuda::", "") for name in run.stdout.splitlines()]
    return dict(zip(names, plain, strict=True))


def resources(said: str) -> dict[str, dict]:
    """{arch: {kernel: what ptxas reserved for it}}"""
    found = list(FUNCTION.finditer(said))
    names = plain_names({match["name"] for match in found})
    of_arch: dict[str, dict] = defaultdict(dict)
    for match in found:
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        of_arch[match["arch"]][names[match["name"]]] = {
            "registers": int(match["registers"]),
            "static_shared_bytes": int(shared[1]) if shared else 0,
            "stack_bytes": int(match["stack"]),
            "spill_bytes": int(match["stores"]) + int(match["loads"]),
        }
    return {arch: dict(sorted(kernels.items())) for arch, kernels in sorted(of_arch.items())}


def moves_vectors(kernel: str) -> bool:
    """Whether a kernel must move 16 bytes at a time: not single elements, integers or weights."""
    element = re.fullmatch(
        r"(?:dispatch|combine|route_dot|activate|activate_backward)_kernel<.*, 1>", kernel
    )
    return element is None and not re.match(
        r"(plan|count|place|keep|mask_weights|importance|balance|zero)", kernel
    )


def without_vectors(folder: Path) -> list[str]:
    """Kernels that lack a 16-byte load or store, with their architecture."""
    lacking = []
    for path in sorted(folder.glob("*.ptx")):
        arch = re.search(r"\.target (sm_\w+)", text := path.read_text())[1]
        bodies = dict(ENTRY.findall(text))
        names = plain_names(set(bodies))
        for mangled, body in bodies.items():
            complete = re.search("ld" + VECTOR, body) and re.search("st" + VECTOR, body)
            if moves_vectors(names[mangled]) and not complete:
                lacking.append(f"{arch} {names[mangled]}")
    return lacking


def main() -> None:
    found = toolkit.find_toolkit()
    if found is None:
        sys.exit("no CUDA toolkit found; set CUDA_HOME")
    print(f"nvcc of {found.root}, for {toolkit.architectures(found)}", flush=True)
    kernels = resources(compile_kernels(found))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    version = ".".join(map(str, found.version))
    RESULT.write_text(as_json({"cuda": version, "kernels": kernels}) + "\n")
    for arch, of_arch in kernels.items():
        most = max(of_arch, key=lambda name: of_arch[name]["registers"])
        print(
            f"{arch}: {len(of_arch)} kernels, most registers {of_arch[most]['registers']}: {most}"
        )
    spills = [
        f"{arch} {name}: {use['spill_bytes']} bytes"
        for arch, of_arch in kernels.items()
        for name, use in of_arch.items()
        if use["spill_bytes"]
    ]
    lacking = without_vectors(BUILD / "ptx")
    if not kernels:
        sys.exit("ptxas reported no kernel; is -Xptxas -v still in NVCC_APPEND_FLAGS?")
    if spills:
        sys.exit("\n".join(["registers spill in", *spills]))
    if lacking:
        sys.exit("\n".join(["no 16-byte load and store in", *lacking]))


if __name__ == "__main__":
    main()
