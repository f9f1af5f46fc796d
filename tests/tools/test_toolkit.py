"""The CUDA toolkit: where it is found, when it is used, and the builds that use it."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scripts import copy_tree, python

from moe_ext import toolkit as finder
from moe_ext.ops import registry


def fake_toolkit(root: Path, version: int = 13000, include: str = "include") -> Path:
    """Create the files of a toolkit that the search looks at."""
    for folder in ("bin", "lib64", include):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "bin" / "nvcc").write_text("#!/bin/sh\n")
    (root / "bin" / "nvcc").chmod(0o755)
    (root / "lib64" / "libcudart_static.a").touch()
    (root / include / "cuda_runtime_api.h").write_text(f"#define CUDART_VERSION  {version}\n")
    return root


@pytest.fixture
def nothing(monkeypatch, tmp_path):
    """A machine without a toolkit in the environment, on PATH or in site-packages."""
    for name in ("CUDA_HOME", "CUDA_PATH", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(finder, "USUAL_PLACES", (str(tmp_path / "usual"),))
    monkeypatch.setattr(finder.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    return tmp_path


def test_the_first_place_with_a_toolkit_wins(nothing, monkeypatch):
    """CUDA_HOME, CUDA_PATH, nvcc on PATH, the usual places, PyPI's."""
    assert finder.find_toolkit() is None
    pypi = fake_toolkit(nothing / "site" / "nvidia" / "cu13")
    fake_toolkit(nothing / "site" / "nvidia" / "cu12", 12080)
    assert finder.find_toolkit() == finder.Toolkit(pypi, pypi / "include", (13, 0))
    usual = fake_toolkit(nothing / "usual")
    assert finder.find_toolkit().root == usual
    path = fake_toolkit(nothing / "on_path", 12080)
    monkeypatch.setenv("PATH", str(path / "bin"))
    assert finder.find_toolkit() == finder.Toolkit(path, path / "include", (12, 8))
    for name in ("CUDA_PATH", "CUDA_HOME"):
        root = fake_toolkit(nothing / name, 13010, "targets/x86_64-linux/include")
        monkeypatch.setenv(name, str(root))
        include = root / "targets/x86_64-linux/include"
        assert finder.find_toolkit() == finder.Toolkit(root, include, (13, 1))
    # A folder without a toolkit is skipped.
    monkeypatch.setenv("CUDA_HOME", str(nothing / "on_path" / "bin"))
    assert finder.find_toolkit().root == nothing / "CUDA_PATH"


def test_nvcc_may_be_a_script_or_a_link(nothing, monkeypatch):
    root = fake_toolkit(nothing / "real")
    (nothing / "bin").mkdir()
    nvcc = nothing / "bin" / "nvcc"
    nvcc.write_text(f'#!/bin/sh\nexec "{root}/bin/nvcc" -ccbin g++ "$@"\n')
    nvcc.chmod(0o755)
    assert finder.find_toolkit().root == root
    nvcc.unlink()
    nvcc.symlink_to(root / "bin" / "nvcc")
    assert finder.find_toolkit().root == root


@pytest.fixture
def toolkit(nothing, monkeypatch):
    """CUDA_HOME is a toolkit of CUDA 13.0."""
    root = fake_toolkit(nothing / "toolkit")
    monkeypatch.setenv("CUDA_HOME", str(root))
    return finder.Toolkit(root, root / "include", (13, 0))


def test_kernels_for_a_torch_without_cuda_need_force_cuda(toolkit, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    name = f"torch {torch.__version__}"
    expected = f"{name} has no CUDA: CPU kernels only; set FORCE_CUDA=1 to build both"
    assert str(finder.choose_toolkit()) == expected
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert finder.require_toolkit().toolkit == toolkit
    monkeypatch.delenv("CUDA_HOME")
    with pytest.raises(
        RuntimeError, match="FORCE_CUDA=1, but no CUDA toolkit found; set CUDA_HOME to a toolkit or"
    ):
        finder.require_toolkit()


def test_a_torch_with_cuda_gets_kernels_unless_force_cuda_is_0(toolkit, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert finder.choose_toolkit().toolkit == toolkit
    where = f"the toolkit at {toolkit.root}, CUDA 13.0"
    assert str(finder.choose_toolkit()) == f"CUDA kernels with {where}"
    monkeypatch.setenv("FORCE_CUDA", "0")
    expected = "FORCE_CUDA=0: CPU kernels only; unset FORCE_CUDA to build both"
    assert str(finder.require_toolkit()) == expected


def test_a_toolkit_of_another_major_version_is_not_used(toolkit, nothing, monkeypatch):
    """Kernels are left out, with FORCE_CUDA=1 it is an error; the next place may have the right
    one."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    what = f"torch {torch.__version__} is for CUDA 12.8, the toolkit at {toolkit.root} is CUDA 13.0"
    fix = "install a torch for CUDA 13, or set CUDA_HOME to a toolkit of CUDA 12"
    said = str(finder.require_toolkit())
    assert said == f"{what}: CPU kernels only; {fix}"
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(RuntimeError) as caught:
        finder.require_toolkit()
    assert str(caught.value) == f"FORCE_CUDA=1, but {what}; {fix}"
    usual = fake_toolkit(nothing / "usual", 12040)
    assert finder.require_toolkit().toolkit == finder.Toolkit(usual, usual / "include", (12, 4))


def test_a_toolkit_without_its_runtime_is_not_used(toolkit, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (toolkit.root / "lib64" / "libcudart_static.a").unlink()
    said = (
        f"the CUDA toolkit at {toolkit.root} has no libcudart_static.a: CPU kernels only; install"
    )
    assert str(finder.choose_toolkit()).startswith(said)


def test_the_reference_on_cuda_warns(monkeypatch):
    """It warns with the reason for missing kernels; without a reason it is silent."""
    on_cuda, on_cpu = SimpleNamespace(is_cuda=True), torch.zeros(1)
    kernel = registry._loud_on_cuda(lambda *args: len(args))
    monkeypatch.setattr(registry.libraries, "cuda_load_error", "no CUDA kernels were built")
    with pytest.warns(
        RuntimeWarning, match="on cuda, which is slower: no CUDA kernels were built; `pyt"
    ):
        assert kernel(None, on_cuda) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel(None, on_cpu) == 2
        monkeypatch.setattr(registry.libraries, "cuda_load_error", None)
        assert kernel(None, on_cuda) == 2


def test_default_architectures_follow_from_the_toolkit():
    new, old = (finder.Toolkit(Path(), Path(), version) for version in ((13, 0), (12, 6)))
    assert finder.architectures(new) == "7.5;8.0+PTX;9.0;10.0;12.0+PTX"
    assert finder.architectures(old) == "7.5;8.0+PTX;9.0+PTX"


@pytest.fixture
def tree(tmp_path):
    return copy_tree(tmp_path / "tree", "csrc", "moe_ext")


def test_a_build_without_cuda_removes_older_cuda_kernels(tree):
    stale = tree / "moe_ext" / "_C_cuda.abi3.so"
    stale.touch()
    # This compiler passes the check and compiles nothing: the old kernels go before that.
    compiler = tree / "compiler"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\n[ "$last" = - ]\n')
    compiler.chmod(0o755)
    arguments = ("setup.py", "build_ext", "--inplace")
    done = python(*arguments, cwd=tree, FORCE_CUDA="0", CXX=str(compiler))
    assert "moe_ext: FORCE_CUDA=0: CPU kernels only" in done.stderr
    assert not stale.exists()


@pytest.mark.parametrize("force", ["", "1"])
def test_a_mismatched_toolkit_stops_only_a_forced_build(tree, force):
    """Otherwise the last line names the kernels that are left out."""
    toolkit = fake_toolkit(tree / "toolkit")
    code = """
import runpy, sys, torch
from torch.utils.cpp_extension import BuildExtension
torch.version.cuda = "99.1"
BuildExtension.run = lambda self: print("compiled", file=sys.stderr)
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
    done = python("-c", code, cwd=tree, FORCE_CUDA=force, CUDA_HOME=str(toolkit))
    assert (done.returncode != 0) == (force == "1"), done.stderr
    assert ("\ncompiled\n" in done.stderr) == (force != "1")
    expected = f"is for CUDA 99.1, the toolkit at {toolkit} is CUDA 13.0"
    assert expected in done.stderr.splitlines()[-1]
