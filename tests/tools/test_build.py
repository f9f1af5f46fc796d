"""How the library is built and found: schemas, JIT, CMake, setup.py, and a package without one."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import moe_ext
from moe_ext import build
from moe_ext.ops import reference, registry

ROOT = Path(__file__).resolve().parents[2]
CPP = ROOT / "examples" / "cpp"

# A layer forward and backward, and where it ran.
PROBE = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, moe_ext
{before}
torch.manual_seed(0)
layer = moe_ext.MOELayer(
    moe_ext.TopKGate(8, 4, k=2, top2_2nd_expert_sampling=False), moe_ext.GroupedExperts(4, 8, 6)
)
out = layer(torch.randn(30, 8))
(out.sum() + layer.l_aux).backward()
compiled = torch.compile(layer.forward_with_aux, fullgraph=True, backend="aot_eager")
logits = torch.randn(30, 4, requires_grad=True)
choice = moe_ext.gate(logits, 2)
grads_of_gate = [
    torch.autograd.grad(output.square().sum(), logits, retain_graph=True)[0].abs().sum().item()
    for output in (choice.weights, choice.probs, choice.importance)
]
print(json.dumps({{
    "library": str(moe_ext.ops.registry.libraries.library),
    "backends": [moe_ext.ops.registry.backend(name, "cpu") for name in moe_ext.ops.registry.NAMES],
    "warnings": [str(w.message) for w in caught],
    "out": out.double().sum().item(),
    "compiled": compiled(torch.randn(30, 8))[0].shape[0],
    "grads_of_gate": grads_of_gate,
    "grad": sum(p.grad.double().abs().sum().item() for p in layer.parameters()),
}}))
"""


def probe(tree: Path, before: str = "", **env: str) -> dict:
    run = subprocess.run(
        [sys.executable, "-c", PROBE.format(before=before)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), **env},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the source tree without a built library."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    shutil.copytree(
        ROOT / "moe_ext", tree / "moe_ext", ignore=shutil.ignore_patterns("_C*", "__pycache__")
    )
    return tree


def test_the_compiled_library_is_what_is_tested():
    assert registry.libraries.library is not None, registry.libraries.load_error
    assert registry.libraries.library.parent == Path(moe_ext.__file__).parent
    assert {registry.backend(name, "cpu") for name in registry.NAMES} == {"compiled"}
    assert registry.backend("gate", "meta") == "fake"
    assert registry.backend("gate", "mps") == "reference"


@pytest.mark.parametrize("name", registry.NAMES)
def test_schema_is_the_reference_signature(name):
    expected = torch.library.infer_schema(getattr(reference, name), mutates_args=())
    schema = str(getattr(torch.ops.moe_ext, name).default._schema)
    assert schema == f"moe_ext::{name}{expected}"


def test_without_a_library_the_reference_runs(tree):
    result, compiled = probe(tree), probe(ROOT)
    assert result["library"] == "None"
    assert set(result["backends"]) == {"reference"}
    assert any("plain-PyTorch reference" in text for text in result["warnings"])
    assert result["compiled"] == 30
    assert result["out"] == pytest.approx(compiled["out"], rel=1e-5)
    assert result["grad"] == pytest.approx(compiled["grad"], rel=1e-5)
    assert result["grads_of_gate"] == pytest.approx(compiled["grads_of_gate"], rel=1e-4)
    assert not [text for text in compiled["warnings"] if "moe_ext" in text]


def test_products_of_the_reference_stay_out_of_autocast(tree):
    """A backward may run where autocast is on and its forward's was off."""
    code = """
import torch, moe_ext
layer = moe_ext.MOELayer(moe_ext.TopKGate(8, 4, 2, use_rts=False), moe_ext.GroupedExperts(4, 8, 6))
x = torch.randn(5, 8)
grads = []
for is_on in (False, True):
    with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
        with torch.autocast("cpu", enabled=False):
            torch.manual_seed(0)
            out = layer(x)
        grads.append(torch.autograd.grad(out.sum(), list(layer.experts.parameters())))
print(all(torch.equal(a, b) for a, b in zip(*grads)))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tree, capture_output=True, text=True
    )
    assert done.stdout == "True\n", done.stderr


def test_a_broken_library_is_named(tree):
    broken = tree / "moe_ext" / "_C.abi3.so"
    broken.write_bytes(b"not a library")
    try:
        result = probe(tree)
    finally:
        broken.unlink()
    assert result["library"] == "None"
    # The reason is the loader's own, not only that there is one.
    expected = r"_C.abi3.so could not be loaded: .*(file too short|invalid ELF|not a mach-o)"
    assert any(re.search(expected, text) for text in result["warnings"]), result["warnings"]


def test_a_library_of_other_sources_is_refused(tree):
    """A stale build in a tree whose operators have changed."""
    library = tree / "moe_ext" / registry.libraries.library.name
    shutil.copy(registry.libraries.library, library)
    contracts = tree / "moe_ext" / "ops" / "contracts.py"
    text = contracts.read_text()
    contracts.write_text(text.replace("num_experts:SymInt", "num_experts:SymInt more:SymInt"))
    run = subprocess.run(
        [sys.executable, "-c", "import moe_ext"],
        env={**os.environ, "PYTHONPATH": str(tree)},
        cwd=tree,
        capture_output=True,
        text=True,
    )
    library.unlink()
    contracts.write_text(text)
    assert run.returncode != 0
    assert "was built from other sources than this package (operator plan)" in run.stderr


def test_jit_builds_the_tree_once(tree, tmp_path):
    before = "path = moe_ext.build.jit()"
    cache = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    result = probe(tree, before, **cache)
    library = Path(result["library"])
    assert library.is_relative_to(tmp_path)
    assert set(result["backends"]) == {"compiled"}
    assert result["out"] == pytest.approx(probe(ROOT)["out"], rel=1e-6)

    # What a killed build left behind stops nobody.
    (library.parent.parent / "building-dead").mkdir()
    (library.parent.parent / "building-dead" / "lock").touch()
    built = library.stat().st_mtime_ns
    assert probe(tree, before, **cache)["library"] == str(library)
    assert library.stat().st_mtime_ns == built

    # A second call gives what is loaded; of other sources no second library can be.
    source = tree / "csrc" / "ops.cpp"
    text = source.read_text()
    twice = f"""{before}
assert moe_ext.build.jit() == path
open({str(source)!r}, "a").write("// changed")
try: moe_ext.build.jit()
except RuntimeError as e: assert f"{{path}} is already loaded" in str(e)
else: raise AssertionError"""
    try:
        probe(tree, twice, **cache)
    finally:
        source.write_text(text)

    source.write_text(text + "#error broken\n")
    broken = (
        "try: moe_ext.build.jit()\n"
        "except RuntimeError as e: assert '#error broken' in str(e)\n"
        "else: raise AssertionError"
    )
    try:
        assert set(probe(tree, broken, **cache)["backends"]) == {"reference"}
    finally:
        source.write_text(text)


def test_jit_says_what_is_in_the_way(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(RuntimeError, match="is already loaded"):
        build.jit()
    monkeypatch.setattr(registry.libraries, "library", None)
    for compiler in ("no-such-compiler", "false"):
        monkeypatch.setenv("CXX", compiler)
        with pytest.raises(RuntimeError, match="no working C\\+\\+ compiler"):
            build.jit()
    # Before it builds for the CPU alone it says so, where torch has CUDA.
    monkeypatch.setattr(torch.version, "cuda", "99.1")
    with (
        pytest.warns(RuntimeWarning, match="CPU kernels only; .*CUDA 99"),
        pytest.raises(RuntimeError, match="no working C\\+\\+ compiler"),
    ):
        build.jit()
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(RuntimeError, match=r"FORCE_CUDA=1, but .*CUDA 99"):
        build.jit()
    monkeypatch.setattr(build, "ROOT", Path("/nowhere"))
    with pytest.raises(RuntimeError, match="no source tree"):
        build.jit()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_setup_without_a_working_compiler_says_so(compiler):
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "CXX": compiler},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "no working C++ compiler found" in run.stderr.splitlines()[-1]
    assert run.stdout.strip().endswith(moe_ext.__version__)


def test_an_editable_install_is_found_from_anywhere(tmp_path):
    """Also from the folder that holds the clone, and by tools that read .pth files alone."""
    clone, site = tmp_path / "moe_ext", tmp_path / "site"
    shutil.copytree(
        ROOT / "moe_ext", clone / "moe_ext", ignore=shutil.ignore_patterns("_C*", "__pycache__")
    )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)

    def python(*arguments: str, cwd: Path) -> str:
        run = subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env={**os.environ, "CXX": "no-such-compiler", "PYTHONPATH": ""},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        return run.stdout

    python("-c", "from setuptools.build_meta import build_editable as b; b('..')", cwd=clone)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, site, "zip")
    assert [path.read_text().strip() for path in site.glob("*.pth")] == [str(clone)]
    find = f"""
import importlib.util, site
site.addsitedir({str(site)!r})
print(importlib.util.find_spec("moe_ext").origin)"""
    assert Path(python("-S", "-c", find, cwd=tmp_path).strip()) == clone / "moe_ext/__init__.py"


def test_the_source_distribution_is_whole(tmp_path):
    for env in ({}, {"CXX": "no-such-compiler"}):
        subprocess.run(
            # Of a folder of its own, or what an earlier one listed would be in it.
            [
                *(sys.executable, "setup.py", "-q"),
                *("egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path)),
            ],
            cwd=ROOT,
            env={**os.environ, **env},
            check=True,
            capture_output=True,
        )
        (archive,) = tmp_path.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
        archive.unlink()
        needed = {*build.sources(), *build.headers(), "CMakeLists.txt", "Makefile", "LICENSE"}
        needed |= {*build.cuda_sources(), "tests/cusim/cusim.h", "tests/cusim/planted.cu"}
        needed |= {"bench/bench_ops.py", "bench/ptxas.py", ".clang-format"}
        needed |= {"setup.py", "tests/cases.py", "tests/conftest.py", "moe_ext/build.py"}
        assert needed <= names
        assert not any(name.endswith((".so", ".pyc")) for name in names)


def cmake(*command: str) -> None:
    program = shutil.which(
        "cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    assert program, "cmake is in the extra `test`"
    done = subprocess.run([program, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run_cpp(source: Path, binary: Path, prefix: str) -> subprocess.CompletedProcess:
    """Build the example's CMake project in `source` and run its program."""
    shutil.copy(CPP / "CMakeLists.txt", source)
    cmake("-S", str(source), "-B", str(binary), f"-DCMAKE_PREFIX_PATH={prefix}")
    cmake("--build", str(binary))
    return subprocess.run([binary / "layer"], capture_output=True, text=True)


def test_the_cpp_example_gives_the_numbers_of_python(tmp_path):
    """Against the package as it is installed; what asks for a gradient is refused."""
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


def test_the_cpp_page_holds_the_example():
    page = (ROOT / "docs" / "cpp.md").read_text()
    for name, language in (("CMakeLists.txt", "cmake"), ("layer.cpp", "cpp")):
        assert f"```{language}\n{(CPP / name).read_text()}```" in page


@pytest.mark.parametrize("registers", [16, 32])
def test_cmake_builds_the_same_library(tmp_path, registers):
    """And on CPUs with less: narrower registers, no instructions for 16 bits."""
    cmake(
        *("-S", str(ROOT), "-B", str(tmp_path), f"-DPython3_EXECUTABLE={sys.executable}"),
        f"-DCMAKE_CXX_FLAGS=-DMOE_EXT_WIDEN_16BIT -DMOE_EXT_REGISTERS={registers}",
    )
    cmake("--build", str(tmp_path), "--parallel", "2")
    (library,) = tmp_path.glob("libmoe_ext.*")
    # The library without the package; 16-bit products are float32 ones, rounded once.
    code = f"""
import torch
torch.ops.load_library({str(library)!r})
experts = torch.tensor([[1, 0], [1, 2]], dtype=torch.int32)
print(torch.ops.moe_ext.plan(experts, None, 3, None, "choice", 1)[0].tolist())
experts = torch.tensor([0] * 5 + [2] * 600, dtype=torch.int32).unsqueeze(1)
_, _, offsets, load = torch.ops.moe_ext.plan(experts, None, 3, None, "choice", 1)
groups = (offsets, load, None)
torch.manual_seed(0)
logits = torch.randn(130, 70)
weights, ids, probs, sums = torch.ops.moe_ext.gate(logits, None, 5, "softmax", False, 1.0)
torch.testing.assert_close(probs, logits.softmax(-1))
torch.testing.assert_close(sums, logits.softmax(-1).sum(0))
assert torch.equal(ids, logits.sort(dim=-1, descending=True, stable=True).indices[:, :5].int())
slots, sources, _, _ = torch.ops.moe_ext.plan(ids, None, 70, None, "token", 1)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    tokens, grad = torch.randn(2, 130, 77).to(dtype)
    rows = torch.ops.moe_ext.dispatch(tokens, slots, sources, None)
    assert torch.equal(rows, tokens[(sources // 5).long()])
    scaled, dots = torch.ops.moe_ext.combine_backward(grad, rows, slots, sources, weights)
    w = weights.flatten()[sources.long(), None]
    torch.testing.assert_close(scaled, (w * grad[(sources // 5).long()].float()).to(dtype))
    exact = (grad.double() * tokens.double()).sum(-1, keepdim=True).expand(-1, 5)
    torch.testing.assert_close(dots.double(), exact, rtol=1e-5, atol=1e-4)
    out = torch.ops.moe_ext.combine(rows, slots, sources, weights)
    exact = weights.double().sum(-1, keepdim=True) * tokens.double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=2 * eps, atol=2 * eps)
    pre_activation = torch.randn(650, 2 * 37).to(dtype)
    active = torch.ops.moe_ext.activate(pre_activation, slots, sources, None, "swiglu")
    gate, up = pre_activation.float().chunk(2, dim=-1)
    exact = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(active.float(), exact, rtol=4 * eps, atol=4 * eps)
for dtype in (torch.bfloat16, torch.float16):
    rows, weights = torch.randn(605, 300).to(dtype), torch.randn(3, 530, 300).to(dtype)
    bias = torch.randn(3, 530).to(dtype)
    strided = weights.transpose(1, 2).contiguous().transpose(1, 2)
    for w in (weights, strided):
        out = torch.ops.moe_ext.grouped_mm(rows, w, bias, *groups)
        outer = torch.ops.moe_ext.grouped_outer(out, rows, *groups)
        for e in range(3):
            mine = slice(int(offsets[e]), int(offsets[e + 1]))
            x, y = rows[mine].double(), out[mine].double()
            eps = torch.finfo(dtype).eps
            exact = x @ weights[e].double().T + bias[e].double()
            torch.testing.assert_close(out[mine].double(), exact, rtol=eps, atol=1e-4)
            torch.testing.assert_close(outer[e].double(), y.T @ x, rtol=eps, atol=1e-2)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == "[[1, 0], [2, 3]]"
    if registers == 32:
        check_installation(tmp_path)


def check_installation(built: Path) -> None:
    """A program that finds what `cmake --install` made is linked with the library."""
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
