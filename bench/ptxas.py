"""Build the CUDA kernels and record their registers and instructions in results/ptxas.json.

    python bench/ptxas.py [--all]

Fails if a kernel spills registers or has a stack, if a kernel that moves 16-byte vectors has no
16-byte load and store in its PTX, if a product has fewer tensor-core instructions in its main loop
or fewer blocks than LEAST_HMMA and LEAST_BLOCKS, or if what the same CUDA recorded before is
different: commit the new file with the change that made it. Needs a CUDA toolkit, NVIDIA's
disassembler and any torch, no GPU.

The record has a digest of what it was made of: compiler, flags, and sources without comments. Where
those are the same, only the architecture ALWAYS is built and compared, and what is recorded of the
others stands: a compiler makes the same of the same. --all builds every architecture.

    loop_instructions   of the loop that moves the data; of the whole kernel where it has none. A
                        loop inside counts once, and so does a path that is seldom taken
    loop_vectors        16-byte accesses to global memory among those, and loop_loads the reads
    hmma_share          tensor-core instructions among those
    blocks_per_sm       what registers and threads leave room for; shared memory may leave less
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import sass
from common import RESULTS, as_json

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cuda"
RESULT = RESULTS / "ptxas.json"
ALWAYS = "9.0"

sys.path.insert(0, str(ROOT / "moe_ext"))
import toolkit  # noqa: E402  the package itself need not be importable

FUNCTION = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>sm_\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
ENTRY = re.compile(r"\.entry (\w+)\(.*?\n\)(?P<bounds>.*?)\{(.*?)\n\}", re.DOTALL)
ASYNCHRONOUS = r"cp\.async\.cg\.shared\.global"
VECTOR = r"\.global[.\w:]*\.(?:v4\.[bfsu]32|v2\.[bfsu]64)"


# Runs setup.py for the CUDA library alone: the other one takes minutes and tells nothing here.
CUDA_ALONE = """
import runpy, setuptools
setup = setuptools.setup
setuptools.setup = lambda ext_modules=(), **options: setup(
    ext_modules=[e for e in ext_modules if e.name == "moe_ext._C_cuda"], **options)
runpy.run_path("setup.py")
"""


def what_decides(found: "toolkit.Toolkit") -> dict[str, str]:
    """All that decides the counts, with a name: compiler, flags, sources and this program."""
    nvcc = [str(found.root / "bin" / "nvcc"), "--version"]
    parts = {"nvcc": subprocess.run(nvcc, check=True, text=True, capture_output=True).stdout}
    # One flag is the digest of all headers, also of those that no kernel includes.
    flags = [flag for flag in toolkit.cuda_flags() if "MOE_EXT_HEADERS" not in flag]
    parts["flags"] = " ".join([*flags, toolkit.architectures(found)])
    for pattern in ("csrc/*.h", "csrc/cuda/**/*.*", "bench/ptxas.py", "bench/sass.py"):
        for path in ROOT.glob(pattern):
            parts[path.relative_to(ROOT).as_posix()] = path.read_text()
    return parts


def digest(parts: dict[str, str]) -> str:
    """The digest of these texts, without C++ comments and without how the code is laid out."""
    hashed = hashlib.sha256()
    for name, text in sorted(parts.items()):
        code = text if name.endswith(".py") else re.sub(r"//.*", "", text)
        hashed.update("\0".join([name, *code.split(), ""]).encode())
    return hashed.hexdigest()


def compile_kernels(found: "toolkit.Toolkit", architectures: str) -> str:
    """Build moe_ext._C_cuda under BUILD, keeping the PTX; return ptxas's output."""
    shutil.rmtree(BUILD, ignore_errors=True)
    (BUILD / "ptx").mkdir(parents=True)
    command = [sys.executable, "-c", CUDA_ALONE, "build_ext"]
    command += ["--build-lib", str(BUILD / "lib"), "--build-temp", str(BUILD / "temp")]
    env = os.environ | {"FORCE_CUDA": "1", "CUDA_HOME": str(found.root)}
    env |= {"TORCH_CUDA_ARCH_LIST": architectures}
    env |= {"NVCC_APPEND_FLAGS": f"-Xptxas -v --keep --keep-dir {BUILD / 'ptx'}"}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    run = subprocess.run(command, cwd=ROOT, env=env, text=True, **both)
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
        name = name.split(">(")[0] + ">" if ">(" in name else name
        return re.sub(r"\((?:int|bool)\)", "", re.sub(r"\(moe_ext::(\w+)\)", r"\1 ", name))

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


# Multiprocessors: warps and blocks that they hold; all have 65,536 registers.
SM = {
    "sm_75": (32, 16),
    "sm_80": (64, 32),
    "sm_89": (48, 24),
    "sm_90": (64, 32),
    "sm_100": (64, 32),
    "sm_120": (48, 24),
}


def blocks_per_sm(arch: str, registers: int, threads: int) -> int:
    warps, blocks = SM[arch]
    of_block = -(-threads // 32)
    # A warp takes its registers 256 at a time, from one of four parts of a multiprocessor.
    of_warp = -(-registers * 32 // 256) * 256
    held = min(warps, 65536 // 4 // of_warp * 4)
    return min(blocks, held // of_block)


def add_instructions(kernels: dict[str, dict], folder: Path, toolkit_root: Path) -> None:
    """Add what the disassembler and the launch bounds say to each architecture's kernels."""
    nvdisasm = sass.disassembler(toolkit_root)
    for path in sorted(folder.glob("*.ptx")):
        text = path.read_text()
        arch = re.search(r"\.target (sm_\w+)", text)[1].removesuffix("a")
        name = path.stem.split(".")[0]
        # nvcc names the architecture in a file's name where there is more than one.
        of_many = folder.glob(f"{name}.*{arch.removeprefix('sm_')}.cubin")
        bodies = sass.functions(nvdisasm, next(of_many, folder / f"{name}.cubin"))
        names = plain_names(set(bodies))
        for mangled, bounds, _ in ENTRY.findall(text):
            kernel = kernels[arch][names[mangled]]
            threads = int(re.search(r"\.maxntid (\d+)", bounds)[1])
            kernel |= sass.counts(bodies[mangled]) | {"threads": threads}
            kernel["blocks_per_sm"] = blocks_per_sm(arch, kernel["registers"], threads)


def committed() -> dict:
    """The last result that was committed; outside of a clone, that of the file."""
    show = ["git", "show", f"HEAD:{RESULT.relative_to(ROOT)}"]
    shown = subprocess.run(show, cwd=ROOT, text=True, capture_output=True)
    text = shown.stdout if shown.returncode == 0 else RESULT.exists() and RESULT.read_text()
    return json.loads(text) if text else {"cuda": None}


def differences(before: dict, now: dict) -> list[str]:
    """Lines that say which kernels came, went, or count something else."""
    found = []
    for arch in sorted({*before, *now}):
        old, new = before.get(arch, {}), now.get(arch, {})
        for name in sorted({*old, *new}):
            if name not in old or name not in new:
                found.append(f"{arch} {name}: {'new' if name in new else 'gone'}")
                continue
            changed = [
                f"{what} {old[name].get(what)} -> {new[name].get(what)}"
                for what in dict.fromkeys([*new[name], *old[name]])
                if old[name].get(what) != new[name].get(what)
            ]
            if changed:
                found.append(f"{arch} {name}: {', '.join(changed)}")
    return found


def moves_vectors(kernel: str) -> bool:
    """Whether a kernel must move 16 bytes at a time: not single elements, integers or weights."""
    element = re.fullmatch(
        r"(?:dispatch|combine|route_dot|activate|activate_backward)_kernel<\w+, 1\b.*>", kernel
    )
    return element is None and not re.match(
        r"(plan|count|place|keep|mask_weights|importance|balance|zero|sum_dots)", kernel
    )


# Tensor-core instructions of a product's main loop: of tiles of 128 rows, and where rows are
# gathered along the loop; of tiles of 64; of floats, which are rounded or split before.
LEAST_HMMA = {
    r"grouped_mm_kernel<Numbers<\w+, 1, 128>": 0.40,
    r"grouped_outer_kernel<Numbers<\w+, 1, 128>, false, false>": 0.40,
    r"grouped_outer_kernel<Numbers<\w+, 1, 128>": 0.30,
    r"grouped_mm_kernel<Numbers<__\w+, 1, 64>": 0.27,
    r"grouped_\w+_kernel<Numbers<float, 3, 64>": 0.19,
    r"grouped_\w+_kernel<Numbers<float, 1, 64>": 0.10,
}
LEAST_BLOCKS = 2


def poor_products(kernels: dict[str, dict]) -> list[str]:
    """Products with fewer tensor-core instructions or blocks than they must have."""
    found = []
    for arch in sorted(kernels.keys() - {"sm_75"}):  # which lacks the products' tensor cores
        for name, use in kernels[arch].items():
            least = [share for text, share in LEAST_HMMA.items() if re.match(text, name)]
            share, blocks = use["hmma_share"], use["blocks_per_sm"]
            if least and (share < least[0] or blocks < LEAST_BLOCKS):
                found.append(f"{arch} {name}: {share} of tensor cores, {blocks} blocks")
    return found


def without_vectors(folder: Path) -> list[str]:
    """Kernels that lack a 16-byte load or store, with their architecture."""
    lacking = []
    for path in sorted(folder.glob("*.ptx")):
        arch = re.search(r"\.target (sm_\w+)", text := path.read_text())[1]
        bodies = {mangled: body for mangled, _, body in ENTRY.findall(text)}
        names = plain_names(set(bodies))
        for mangled, body in bodies.items():
            if arch == "sm_75" and names[mangled].startswith("grouped"):
                continue  # has no tensor cores that the products use
            reads, writes = (re.search(way + VECTOR, body) for way in ("ld", "st"))
            reads = reads or re.search(ASYNCHRONOUS, body)
            only_reads = re.match(r"route_dot_kernel<.*, false>", names[mangled])
            if moves_vectors(names[mangled]) and not (reads and (writes or only_reads)):
                lacking.append(f"{arch} {names[mangled]}")
    return lacking


def faults(kernels: dict[str, dict], ptx: Path) -> list[str]:
    """What must not be: a line that names it, and the kernels."""
    local = [
        f"{arch} {name}: {use['spill_bytes']} bytes of registers, {use['stack_bytes']} of a stack"
        for arch, of_arch in kernels.items()
        for name, use in of_arch.items()
        if use["spill_bytes"] or use["stack_bytes"]
    ]
    for fault, found_in in (
        ("local memory is used by", local),
        ("products below what they must have", poor_products(kernels)),
        ("no 16-byte load and store in", without_vectors(ptx)),
    ):
        if found_in:
            return [fault, *found_in]
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the CUDA kernels and record what they use.")
    parser.add_argument("--all", action="store_true", help="also what has not changed")
    build_all = parser.parse_args().all
    found = toolkit.find_toolkit()
    if found is None:
        sys.exit("no CUDA toolkit found; set CUDA_HOME")
    before, sources = committed(), digest(what_decides(found))
    is_known = before.get("sources") == sources and not build_all
    architectures = ALWAYS if is_known else toolkit.architectures(found)
    print(f"nvcc of {found.root}, for {architectures}", flush=True)
    built = resources(compile_kernels(found, architectures))
    if not built:
        sys.exit("ptxas reported no kernel; is -Xptxas -v still in NVCC_APPEND_FLAGS?")
    add_instructions(built, BUILD / "ptx", found.root)
    for arch, of_arch in built.items():
        most = max(of_arch, key=lambda name: of_arch[name]["registers"])
        print(
            f"{arch}: {len(of_arch)} kernels, most registers {of_arch[most]['registers']}: {most}"
        )
    kernels = (before["kernels"] if is_known else {}) | built
    version = ".".join(map(str, found.version))
    RESULT.write_text(as_json({"cuda": version, "sources": sources, "kernels": kernels}) + "\n")
    if wrong := faults(kernels, BUILD / "ptx"):
        sys.exit("\n".join(wrong))
    if before["cuda"] != version:
        print(f"{RESULT} was of CUDA {before['cuda']}: not compared")
        return
    changes = differences(before["kernels"], kernels)
    if changes or before.get("sources") != sources:
        shown = changes[:40] + [f"and {len(changes) - 40} more"] * (len(changes) > 40)
        sys.exit("\n".join([f"{RESULT} is another now; commit it if that is meant", *shown]))


if __name__ == "__main__":
    main()
