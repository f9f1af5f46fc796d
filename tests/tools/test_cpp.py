"""The C++ library: CMake builds it, C++ programs find it, and its results are those of Python."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import ROOT, copy_tree, output_of

import moe_ext
from moe_ext import build
from moe_ext.ops import registry

CPP = ROOT / "examples" / "cpp"
# The laws of operators that a build must obey, at sizes that end amid a vector or exceed a tile.
OPERATORS = ("rows", "plan", "gate", "activate", "grouped", "quantized_mm")
LAWS = (
    "matches_reference and 127-8-8-13",
    "matches_reference and 9-2-4-1501",
    "matches_reference and 40-100-33",
    "matches_reference and 300-64-6",
    "is_the_definition and 300-4-5-40",
    "more_than_a_tile",
    "outer_products and 130-77",
    "outgrow_the_caches and 1024",
    "products_are_those and size1",
)


def cmake(*command: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which("cmake", path=path)
    assert program, "cmake is in the extra `test`"
    done = subprocess.run([program, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run_cpp(source: Path, binary: Path, prefix: str) -> subprocess.CompletedProcess:
    """Build the example's CMake project in `source` and run its program."""
    shutil.copy(CPP / "CMakeLists.txt", source)
    cmake("-S", str(source), "-B", str(binary), f"-DCMAKE_PREFIX_PATH={prefix}")
    cmake("--build", str(binary))
    return subprocess.run([binary / "layer"], capture_output=True, text=True)


def test_the_cpp_example_computes_what_python_computes(tmp_path):
    """The program is built against the installed package. A call that needs a gradient raises."""
    shutil.copy(CPP / "layer.cpp", tmp_path / "example.cpp")
    (tmp_path / "layer.cpp").write_text("""
#define main example_main
#include "example.cpp"
#undef main
int main() {
  example_main();
  const at::Tensor tokens = at::ones({2, 3}).requires_grad_(), ids = at::zeros({2, 1}, at::kInt);
  const auto plan = moe_ext::make_plan(ids, 2, 1);
  try {
    moe_ext::dispatch(tokens, plan);
  } catch (const c10::NotImplementedError& error) {
    std::cerr << error.what_without_backtrace();
  }
  const at::NoGradGuard guard;
  const at::Tensor rows = moe_ext::dispatch(tokens, plan);
  std::cout << moe_ext::route_dot(tokens, rows, plan) << "\\n";
  std::cout << moe_ext::mask_weights(at::ones({2, 1}), plan) << "\\n";
}
""")
    run = run_cpp(tmp_path, tmp_path / "build", build.cmake_prefix_path())
    assert run.returncode == 0, run.stderr
    assert run.stderr == (
        "moe_ext::dispatch has no gradient in a program without Python; call it under "
        "c10::InferenceMode or at::NoGradGuard"
    )
    torch.manual_seed(0)
    tokens, router = torch.randn(16, 32), torch.randn(4, 32)
    up, down = torch.randn(4, 128, 32), torch.randn(4, 32, 64)
    weights, experts, *_ = moe_ext.gate(tokens @ router.T, 2, normalize=True)
    gate, value = torch.einsum("th,efh->tef", tokens, up).chunk(2, dim=-1)
    dense = torch.einsum("tef,ehf->teh", torch.nn.functional.silu(gate) * value, down)
    chosen = dense.gather(1, experts.long()[..., None].expand(-1, -1, 32))
    expected = (weights[..., None] * chosen).sum((1, 2))
    numbers = list(map(float, re.findall(r"^ *(-?[\d.]+)$", run.stdout, re.MULTILINE)))
    torch.testing.assert_close(torch.tensor(numbers[:16]), expected, rtol=1e-4, atol=1e-2)
    assert numbers[16:] == [3, 0, 1, 0]


def test_the_cpp_header_has_every_public_operator():
    header = Path(moe_ext.__file__).with_name("include") / "moe_ext.h"
    found = set(re.findall(r'find\("moe_ext::(\w+)"\)', header.read_text()))
    assert found == {name for name in registry.NAMES if name in moe_ext.__all__} | {"plan"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A build by CMake, with tiles and all loops on every CPU, and without instructions for 16
    bits. -O1 builds in half the time."""
    folder = tmp_path_factory.mktemp("built")
    flags = ("WIDEN_16BIT", "OWN_PRODUCTS", "EMULATES_TILES")
    cmake(
        *("-S", str(ROOT), "-B", str(folder), f"-DPython3_EXECUTABLE={sys.executable}"),
        f"-DCMAKE_CXX_FLAGS={' '.join(f'-DMOE_EXT_{flag}' for flag in flags)}",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
    )
    cmake("--build", str(folder), "--parallel", "2")
    return folder


@pytest.mark.parametrize(
    ("by", "capability"), [("pip", "avx2"), ("cmake", "avx2"), ("cmake", "default")]
)
def test_operators_obey_their_laws_on_any_cpu(request, tmp_path, by, capability):
    """With registers of 32 bytes and of 16 on x86, and where torch has no products of 16 bits."""
    library = installed = registry.libraries.library
    if by == "cmake":
        (library,) = request.getfixturevalue("built").glob("libmoe_ext.*")
    tree = copy_tree(tmp_path / "tree", "moe_ext")
    shutil.copy(library, tree / "moe_ext" / installed.name)
    files = [ROOT / "tests" / "ops" / f"test_{name}.py" for name in OPERATORS]
    options = ("-v", "-p", "no:cacheprovider", "-k", " or ".join(LAWS))
    limits = {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    said = output_of("-m", "pytest", *options, *files, cwd=tree, PYTHONPATH=str(tree), **limits)
    assert f"moe_ext: {tree}" in said
    passed = [line for line in said.splitlines() if " PASSED " in line]
    for words in [law.split(" and ") for law in LAWS] + [[file.name] for file in files]:
        assert any(all(word in line for word in words) for line in passed), words


def test_cmake_builds_a_library_for_programs_without_python(built):
    (library,) = built.glob("libmoe_ext.*")
    code = (
        f"import torch; torch.ops.load_library({str(library)!r})\n"
        "ids = torch.tensor([[1, 0], [1, 2]]).int()\n"
        "print(torch.ops.moe_ext.plan(ids, None, 3, None, 'choice', 1)[0].tolist())"
    )
    assert output_of("-c", code) == "[[1, 0], [2, 3]]\n"
    # A program that finds an installation links with it.
    cmake("--install", str(built), "--prefix", str(built / "installed"))
    source = built / "program"
    source.mkdir()
    (source / "layer.cpp").write_text("""
#if !__has_include(<moe_ext.h>)
#error no moe_ext.h
#endif
extern "C" void moe_ext_library();
int main() { moe_ext_library(); }
""")
    prefix = f"{built / 'installed'};{torch.utils.cmake_prefix_path}"
    run = run_cpp(source, built / "program-built", prefix)
    assert run.returncode == 0, run.stderr
