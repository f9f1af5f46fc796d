"""Building and loading the library: schemas, JIT, setup.py, and a package without a library."""

import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch
from scripts import ROOT, copy_tree, output_of, python, quick_compiler

import moe_ext
from moe_ext import build, toolkit
from moe_ext.ops import reference, registry

# Runs a layer forward and backward, and prints results and backends.
PROBE = """
import json, torch, moe_ext
torch.manual_seed(0)
layer = moe_ext.MOELayer(
    moe_ext.TopKGate(8, 4, k=2, top2_2nd_expert_sampling=False), moe_ext.GroupedExperts(4, 8, 6)
)
out = layer(torch.randn(30, 8))
(out.sum() + layer.l_aux).backward()
compiled = torch.compile(layer.forward_with_aux, fullgraph=True, backend="aot_eager")
logits = torch.randn(30, 4, requires_grad=True)
choice = moe_ext.gate(logits, 2)
results = {
    "library": str(moe_ext.ops.registry.libraries.library),
    "backends": [moe_ext.ops.registry.backend(name, "cpu") for name in moe_ext.ops.registry.NAMES],
    "out": out.double().abs().sum().item(),
    "compiled": compiled(torch.randn(30, 8))[0].shape[0],
    "grads_of_gate": [
        torch.autograd.grad(output.square().sum(), logits, retain_graph=True)[0].abs().sum().item()
        for output in (choice.weights, choice.probs, choice.importance)
    ],
    "grad": sum(p.grad.double().abs().sum().item() for p in layer.parameters()),
}
print(json.dumps(results))
"""


def run_in(tree: Path, code: str, **environment: str) -> str:
    return output_of("-c", code, cwd=tree, PYTHONPATH=str(tree), **environment)


@pytest.fixture(scope="module")
def compiled() -> dict:
    """The results of the compiled library."""
    names: dict = {}
    exec(PROBE, names)
    return names["results"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the source tree without a built library."""
    return copy_tree(tmp_path_factory.mktemp("tree"), "csrc", "moe_ext")


def test_tests_run_on_the_compiled_library():
    assert registry.libraries.library is not None, registry.libraries.load_error
    assert registry.libraries.library.parent == Path(moe_ext.__file__).parent
    assert {registry.backend(name, "cpu") for name in registry.NAMES} == {"compiled"}
    assert registry.backend("gate", "meta") == "fake"
    assert registry.backend("gate", "mps") == "reference"


@pytest.mark.parametrize("name", registry.NAMES)
def test_schemas_are_the_signatures_of_the_reference(name):
    expected = torch.library.infer_schema(getattr(reference, name), mutates_args=())
    schema = str(getattr(torch.ops.moe_ext, name).default._schema)
    assert schema == f"moe_ext::{name}{expected}"


def test_without_a_library_the_reference_runs(tree, compiled):
    done = python("-c", PROBE, cwd=tree, PYTHONPATH=str(tree))
    assert "plain-PyTorch reference" in done.stderr
    result = json.loads(done.stdout)
    assert result["library"] == "None"
    assert set(result["backends"]) == {"reference"}
    assert result["compiled"] == 30
    assert result["out"] == pytest.approx(compiled["out"], rel=1e-5)
    assert result["grad"] == pytest.approx(compiled["grad"], rel=1e-5)
    assert result["grads_of_gate"] == pytest.approx(compiled["grads_of_gate"], rel=1e-4)


def test_the_reference_ignores_autocast_in_a_backward(tree):
    """The backward runs with autocast, its forward ran without."""
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
    assert run_in(tree, code) == "True\n"


def test_a_library_of_other_sources_is_refused(tree):
    """As after a change of an operator, without a new build."""
    library = tree / "moe_ext" / registry.libraries.library.name
    shutil.copy(registry.libraries.library, library)
    contracts = tree / "moe_ext" / "ops" / "contracts.py"
    text = contracts.read_text()
    contracts.write_text(text.replace("num_experts:SymInt", "num_experts:SymInt more:SymInt"))
    done = python("-c", "import moe_ext", cwd=tree, PYTHONPATH=str(tree))
    library.unlink()
    contracts.write_text(text)
    assert done.returncode != 0
    assert "was built from other sources than this package (operator plan)" in done.stderr


def test_jit_builds_the_tree_once(tree, tmp_path, compiled):
    jit = "import moe_ext; path = moe_ext.build.jit()"
    cache = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": quick_compiler(tmp_path)}
    result = json.loads(run_in(tree, jit + PROBE, **cache))
    library = Path(result["library"])
    assert library.is_relative_to(tmp_path)
    assert set(result["backends"]) == {"compiled"}
    assert result["out"] == pytest.approx(compiled["out"], rel=1e-6)

    # A killed build leaves files that do not block the next one. A second call returns the loaded
    # library. With other sources it raises.
    (library.parent.parent / "building-dead").mkdir()
    (library.parent.parent / "building-dead" / "lock").touch()
    built = library.stat().st_mtime_ns
    source = tree / "csrc" / "ops.cpp"
    text = source.read_text()
    twice = f"""{jit}
assert str(path) == {str(library)!r}
assert moe_ext.build.jit() == path
open({str(source)!r}, "a").write("// changed")
try: moe_ext.build.jit()
except RuntimeError as e: assert f"{{path}} is already loaded" in str(e)
else: raise AssertionError"""
    run_in(tree, twice, **cache)
    assert library.stat().st_mtime_ns == built

    source.write_text(text + "#error broken\n")
    broken = """import moe_ext
try: moe_ext.build.jit()
except RuntimeError as e: assert "#error broken" in str(e)
else: raise AssertionError
registry = moe_ext.ops.registry
assert {registry.backend(name, "cpu") for name in registry.NAMES} == {"reference"}"""
    run_in(tree, broken, **cache)
    source.write_text(text)


def test_errors_of_jit_name_the_cause(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.raises(RuntimeError, match="is already loaded"):
        build.jit()
    monkeypatch.setattr(registry.libraries, "library", None)
    for compiler in ("no-such-compiler", "false"):
        monkeypatch.setenv("CXX", compiler)
        with pytest.raises(RuntimeError, match="no working C\\+\\+ compiler"):
            build.jit()
    # Where torch has CUDA, a build without CUDA kernels warns.
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


def test_setup_without_a_working_compiler_says_so():
    done = python("setup.py", "--version", CXX="false")
    assert done.returncode == 0, done.stderr
    assert "no working C++ compiler found" in done.stderr.splitlines()[-1]
    assert done.stdout.strip().endswith(moe_ext.__version__)


def test_an_editable_install_is_found_from_anywhere(tmp_path):
    """Also from the folder that holds the clone, and by tools that read only .pth files."""
    clone, site = copy_tree(tmp_path / "moe_ext", "moe_ext"), tmp_path / "site"
    alone = {"CXX": "no-such-compiler", "PYTHONPATH": ""}
    build_editable = "from setuptools.build_meta import build_editable as b; b('..')"
    output_of("-c", build_editable, cwd=clone, **alone)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, site, "zip")
    assert [path.read_text().strip() for path in site.glob("*.pth")] == [str(clone)]
    find = f"""
import importlib.util, site
site.addsitedir({str(site)!r})
print(importlib.util.find_spec("moe_ext").origin)"""
    found = output_of("-S", "-c", find, cwd=tmp_path, **alone)
    assert Path(found.strip()) == clone / "moe_ext/__init__.py"


@pytest.mark.parametrize("environment", [{}, {"CXX": "no-such-compiler"}])
def test_the_source_distribution_has_every_source(tmp_path, environment):
    # In a new folder, because setuptools also packs the files of an earlier list.
    arguments = ("egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path)
    output_of("setup.py", "-q", *arguments, **environment)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    needed = {*toolkit.sources(), *toolkit.headers(), *toolkit.cuda_sources()}
    needed |= {"tests/cusim/cusim.h", "tests/cusim/planted.cu", "tests/cases.py"}
    needed |= {"bench/bench_ops.py", "bench/ptxas.py", "CMakeLists.txt", "Makefile", "LICENSE"}
    needed |= {"setup.py", "moe_ext/build.py", "moe_ext/toolkit.py", "tests/conftest.py"}
    assert needed | {".clang-format"} <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)


@pytest.mark.skipif(toolkit.find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("source", ["ops.cpp", "cuda_ops.cpp", "cpu/plan.cpp"])
def test_sources_are_cpp17_as_torch_2_10_compiles_them(source):
    torch_headers = Path(torch.__file__).parent / "include"
    command = [toolkit.find_compiler(), "-std=c++17", "-fsyntax-only", *toolkit.compile_flags()]
    command += ["-isystem", str(torch_headers), str(ROOT / "csrc" / source)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_step_of_the_setup_says_how_long_it_took(tmp_path):
    command = "sh", ROOT / "tests/tools/step.sh", "make a file"
    done = subprocess.run([*command, "touch", tmp_path / "made"], capture_output=True, text=True)
    assert (tmp_path / "made").exists()
    assert re.fullmatch("== make a file\n== make a file: [01] s\n", done.stdout)
    failed = subprocess.run([*command, "false"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert " s\n" not in failed.stdout


def test_a_release_names_its_repository(tmp_path):
    """PyPI shows the links of the metadata; a fork has its own, and a clone none."""
    for url in ("", "https://host.example/owner/moe_ext/"):
        folder = tmp_path / f"links{bool(url)}"
        folder.mkdir()
        arguments = ("egg_info", "--egg-base", folder)
        output_of("setup.py", "-q", *arguments, REPOSITORY_URL=url, FORCE_CUDA="0")
        (metadata,) = folder.glob("*.egg-info/PKG-INFO")
        links = re.findall("^Project-URL: (.*)$", metadata.read_text(), re.MULTILINE)
        assert len(links) == (4 if url else 0)
        assert all(link.split(", ")[1].startswith(url.rstrip("/")) for link in links)
    assert "Keywords: mixture of experts," in metadata.read_text()
