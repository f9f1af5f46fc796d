"""The report of doctor, and the problem and fix that it prints for each known failure."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scripts import python

import moe_ext
from moe_ext import toolkit as finder
from moe_ext.__main__ import main
from moe_ext.cli import doctor
from moe_ext.ops import registry


def test_every_operator_is_tested_on_every_device():
    report = doctor.examine()
    assert [operator.name for operator in report.operators[: len(registry.NAMES)]] == list(
        registry.NAMES
    )
    for operator in report.operators:
        assert operator.failure == ""
        assert operator.error <= doctor.TOLERANCE
        assert operator.backend == registry.backend(operator.name, operator.device)
    text = str(report)
    assert str(registry.libraries.library) in text
    assert torch.__version__ in text


def test_the_command_exits_with_1_on_a_problem():
    done = python("-m", "moe_ext", "doctor")
    report = json.loads(python("-m", "moe_ext", "doctor", "--json").stdout)
    assert {operator["name"] for operator in report["operators"]} == set(registry.NAMES)
    assert done.returncode == bool(report["problems"])
    assert report["ok"] == (not report["problems"])
    if report["ok"]:
        assert "\nOK: every operator is right on cpu" in done.stdout


def test_an_infinite_error_is_null_in_json():
    wrong = doctor.Operator("gate", "cpu", "compiled", "", float("inf"), "")
    assert json.dumps(wrong.as_dict(), allow_nan=False)
    assert (wrong.as_dict()["error"], wrong.as_dict()["ok"]) == (None, False)


@pytest.mark.parametrize("command", ["doctor", "plot"])
def test_a_closed_pipe_ends_without_a_traceback(monkeypatch, run, command):
    """As `head -1` is."""
    reader, writer = os.pipe()
    os.close(reader)
    arguments = {"doctor": ["doctor"], "plot": ["plot", "--text", str(run[1])]}
    with open(writer, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        monkeypatch.setattr(sys, "argv", ["moe_ext", *arguments[command]])
        assert main() == 128 + signal.SIGPIPE
        assert not gone.closed


@pytest.mark.parametrize(
    ("threads", "load", "others", "is_told"),
    [
        (2, 3.1, 99, True),
        (2, 2.9, 99, False),
        (2, 0.5, 99, False),
        (2, 1e3, 0, False),
        (1, 1e3, 99, False),
    ],
    ids=["busy", "a build of its own", "for a moment", "no longer", "one thread"],
)
def test_a_busy_cpu_is_reported_once(monkeypatch, threads, load, others, is_told):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert min(doctor._work()) >= 0
    monkeypatch.setattr(doctor, "_work", lambda: (load, others))
    report = doctor.examine()
    assert report.facts["cpu"]["load"] == load
    assert report.facts["cpu"]["is_busy"] == is_told
    assert str(report).count("OMP_NUM_THREADS=1") == str(report).count("load") == is_told


def test_the_cpus_instructions_are_listed_by_use(monkeypatch):
    states = "AVX2=used AVX-512=limited F16C=unbuilt AMX-INT8=unused AMX-FP16=unused"
    called = SimpleNamespace(default=lambda like: (states, "Clang 19.1.7"))
    monkeypatch.setattr(torch.ops.moe_ext, "cpu_features", called)
    text = str(doctor.examine())
    assert re.search(r"\nCPU +AVX2; \d+ cores, torch uses \d+ thread", text)
    (line,) = re.findall(r"\nnot used +(.*)", text)
    assert line.split("; ") == [
        "AMX-INT8, AMX-FP16 (moe_ext has no such loops)",
        "AVX-512 (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA or the system does not allow it)",
        "F16C (not in this build, by Clang 19.1.7)",
    ]
    assert "note: Clang 19.1.7 left out the faster loops for F16C; GCC 11 has them" in text
    assert f"CXX=g++ {doctor.AGAIN}" in text


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the kernel's list of flags")
def test_the_cpus_instructions_are_those_of_the_kernel():
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    found, _ = torch.ops.moe_ext.cpu_features(torch.empty(0))
    if not found:
        pytest.skip("not a compiled library, or not x86")
    names = {"avx2", "f16c", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_int8"}
    said = {part.split("=")[0].lower().replace("-", "_") for part in found.split()}
    assert names & said == names & flags
    assert ("avx_512" in said) == ("avx512f" in flags)
    # Loops are used where they are built and nothing limits them; their own tests run them.
    built = doctor._cpu()["instructions"]
    assert (built["AVX2"] == "used") == (torch.backends.cpu.get_cpu_capability() != "DEFAULT")


def nan_in(which: int):
    return lambda outputs: [
        torch.full_like(out, torch.nan) if i == which else out for i, out in enumerate(outputs)
    ]


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("combine", lambda out: 1.01 * out, "an error of "),
        ("combine", lambda out: out.no_such_thing, "AttributeError: 'Tensor' object has no"),
        *(("activate_backward", nan_in(which), "an error of inf") for which in range(3)),
    ],
)
def test_a_wrong_result_is_found(monkeypatch, name, change, found):
    """The reference is changed, so the operator differs from it."""
    right = getattr(doctor.reference, name)
    monkeypatch.setattr(doctor.reference, name, lambda *args: change(right(*args)))
    # Operators that are made of it differ too.
    problem, *_ = [p for p in doctor.examine().problems if "on cpu" in p.problem]
    assert problem.problem.startswith(f"the self-test of {name} on cpu gave {found}")
    assert "doctor --json" in problem.fix


@pytest.fixture
def tree(tmp_path):
    """The package alone, with a library that is none."""
    ignore = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(Path(moe_ext.__file__).parent, tmp_path / "moe_ext", ignore=ignore)
    return tmp_path


def report_of(tree: Path) -> tuple[dict, str]:
    """The report on this package, which has a problem, and the warnings."""
    done = python("-m", "moe_ext", "doctor", "--json", cwd=tree)
    assert done.returncode == 1, done.stderr
    return json.loads(done.stdout), done.stderr


def test_a_missing_library_is_a_problem(tree):
    report, _ = report_of(tree)
    assert report["moe_ext"] == {"version": moe_ext.__version__, "path": str(tree / "moe_ext")}
    on_cpu = [operator for operator in report["operators"] if operator["device"] == "cpu"]
    assert {operator["backend"] for operator in on_cpu} == {"reference"}
    problem = report["problems"][0]
    assert "no compiled library was built" in problem["problem"]
    assert problem["fix"].startswith("pip install --no-build-isolation")


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_a_failing_compiler_counts_as_missing(monkeypatch, compiler):
    monkeypatch.setattr(registry.libraries, "library", None)
    monkeypatch.setenv("CXX", compiler)
    (problem,) = doctor._libraries()[1]
    assert problem.fix == f"install a C++ compiler or set CXX to one; then {doctor.AGAIN}"
    assert doctor._facts()["compiler"] is None


def test_the_loaders_error_is_reported_verbatim(tree):
    (tree / "moe_ext" / "_C.abi3.so").write_bytes(b"\x7fELF, but not for long")
    report, warned = report_of(tree)
    said = report["libraries"]["_C"]
    assert said["path"] is None
    # The reason is the loader's own.
    expected = r"_C.abi3.so could not be loaded: .*(file too short|invalid ELF|not a mach-o)"
    for text in (said["error"], report["problems"][0]["problem"], warned):
        assert re.search(expected, text)


@pytest.mark.parametrize(
    ("direct_url", "source"),
    [
        ('{"url": "file:///some/where%20else", "dir_info": {}}', "/some/where else"),
        ('{"url": "https://some.where/moe_ext.zip"}', "https://some.where/moe_ext.zip"),
        ('{"url": "https://some.where/moe_ext-1-py3.whl"}', "--no-binary moe_ext moe_ext"),
        (
            '{"url": "https://some.where/moe", "vcs_info": {"vcs": "git", "commit_id": "ab12"}}',
            "git+https://some.where/moe@ab12",
        ),
        (
            '{"url": "https://some.where/moe.zip", "subdirectory": "of/it"}',
            "'https://some.where/moe.zip#subdirectory=of/it'",
        ),
        ('{"url": "file:///some/moe_ext-1-py3.whl"}', "--no-binary moe_ext moe_ext"),
        (None, "--no-binary moe_ext moe_ext"),
    ],
)
def test_the_fix_installs_from_the_original_source(monkeypatch, tmp_path, direct_url, source):
    files = SimpleNamespace(read_text={"direct_url.json": direct_url}.get)
    monkeypatch.setattr(finder, "ROOT", tmp_path)
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: files)
    assert finder.source() == source
    (tmp_path / "setup.py").touch()
    assert finder.source() == f"-e {tmp_path}"


# The facts of a torch with CUDA, on a machine without one.


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor, "_num_cards", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a card")
    monkeypatch.setattr(registry.libraries, "cuda_library", None)
    monkeypatch.setattr(registry.libraries, "cuda_load_error", "no CUDA kernels were built")
    monkeypatch.delenv("FORCE_CUDA", raising=False)


def test_without_a_card_there_is_no_problem(card, monkeypatch):
    monkeypatch.setattr(doctor, "_num_cards", lambda: 0)
    said, problems = doctor._libraries()
    assert said["_C_cuda"]["error"] == "no CUDA kernels were built"
    assert [p for p in problems if "cuda" in p.problem] == []
    # doctor still names the toolkit that a build for a GPU would use.
    assert said["_C_cuda"]["fix"].endswith(doctor.AGAIN)
    text = str(doctor.examine())
    assert f"a machine with a GPU\n fix: {said['_C_cuda']['fix']}\nOK" in text
    assert doctor._table(doctor._facts())["card"].startswith("none that torch can use")


def test_a_card_without_kernels_is_a_problem(card, monkeypatch):
    monkeypatch.setattr(finder, "find_toolkit", lambda major=None: None)
    problem = doctor._libraries()[1][-1]
    assert problem.problem == "operators on cuda run as plain PyTorch: no CUDA kernels were built"
    assert problem.fix.startswith("set CUDA_HOME to a toolkit of CUDA 13 or pip install")
    assert f"; then {doctor.AGAIN}" in problem.fix
    facts = doctor._facts()
    assert facts["cards"] == [{"name": "a card", "compute_capability": "12.0"}]
    assert doctor._table(facts)["card"] == "a card, compute capability 12.0"


def test_a_toolkit_of_another_major_version_is_reported(card, monkeypatch, tmp_path):
    toolkit = finder.Toolkit(tmp_path, tmp_path, (12, 4))
    found = {None: toolkit, 12: toolkit}
    monkeypatch.setattr(finder, "find_toolkit", lambda major=None: found.get(major))
    loaded = registry.Libraries()
    loaded._load_cuda(tmp_path / "_C.abi3.so")
    why = f"torch {torch.__version__} is for CUDA 13.0, the toolkit at {tmp_path} is CUDA 12.4"
    expected = f"no CUDA kernels were built with this package; on this machine: {why}"
    assert loaded.cuda_load_error == expected
    assert doctor._libraries()[1][-1].fix.startswith(
        "install a torch for CUDA 12, or set CUDA_HOME to a"
    )
    assert doctor._facts()["toolkit"] == {"cuda": "12.4", "path": str(tmp_path)}


@pytest.mark.parametrize(("cuda", "is_refused"), [("12.8", True), ("13.2", False)])
def test_a_cuda_library_of_another_major_version_is_not_loaded(
    card, monkeypatch, tmp_path, cuda, is_refused
):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    library = tmp_path / "_C_cuda.abi3.so"
    library.write_bytes(b"\x7fELF\0moe_ext built by CUDA 13.0 for compute capability 9.0\0")
    loaded = registry.Libraries()
    refusal = (
        f"_C_cuda.abi3.so was built by CUDA 13.0, torch {torch.__version__} is for CUDA 12.8; "
        f"build it for this torch: {doctor.AGAIN}"
    )
    if is_refused:
        with pytest.warns(RuntimeWarning, match=re.escape(refusal)):
            loaded._load_cuda(tmp_path / "_C.abi3.so")
        assert loaded.cuda_load_error == refusal
    else:
        loaded._load_cuda(tmp_path / "_C.abi3.so")
        assert loaded.cuda_load_error.startswith("_C_cuda.abi3.so could not be loaded")
    assert loaded.cuda_library is None


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_cuda_library_that_cannot_be_read_is_reported(card, tmp_path, is_folder):
    """As one whose build was killed: nothing, or no file."""
    library = tmp_path / "_C_cuda.abi3.so"
    library.mkdir() if is_folder else library.touch()
    loaded = registry.Libraries()
    loaded._load_cuda(tmp_path / "_C.abi3.so")
    assert loaded.cuda_library is None
    assert loaded.cuda_load_error.startswith("_C_cuda.abi3.so could not be loaded")


@pytest.mark.parametrize("built_for", ["7.5,8.0+PTX,9.0+PTX", "7.5,8.0"])
def test_a_card_without_machine_code_or_ptx_is_a_problem(card, monkeypatch, tmp_path, built_for):
    library = tmp_path / "_C_cuda.abi3.so"
    text = f"moe_ext built by CUDA 13.0 for compute capability {built_for}"
    library.write_bytes(b"\x7fELF\0" + text.encode() + b"\0\xff")
    monkeypatch.setattr(registry.libraries, "cuda_library", library)
    said, problems = doctor._libraries()
    assert said["_C_cuda"]["path"] == str(library)
    assert said["_C_cuda"]["built_for"] == built_for.split(",")
    assert doctor._library(said["_C_cuda"]) == f"{library}, for {built_for}"
    if "9.0+PTX" in built_for:
        assert problems == []
    else:
        assert problems[0].problem.startswith("card 0 has compute capability 12.0, the kernels are")
        assert problems[0].fix.startswith('TORCH_CUDA_ARCH_LIST="12.0" pip install')


@pytest.mark.parametrize(
    ("built_for", "capability", "is_served"),
    [
        ("9.0", (9, 0), True),
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0+PTX", (8, 9), False),
        ("9.0a", (9, 0), True),
        ("10.0a+PTX", (10, 3), False),
        ("7.5,8.0+PTX,9.0", (12, 0), True),
        ("Hopper", (9, 0), True),
    ],
)
def test_machine_code_and_ptx_serve_later_cards(built_for, capability, is_served):
    assert doctor.serves(built_for.split(","), capability) is is_served
