"""Fixtures: the device, poisoned memory, and reproducible numbers; and the emulated kernels.

With --cusim=moe_ext_dev.so the CUDA kernels, run on the CPU, stand in for the CPU operators, and
every test of device "cpu" is one of theirs.
"""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moe_ext import ops

# For deterministic algorithms on a GPU; read at the first product there.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Of what is built, installed and drawn, or of layers alone; many start processes of their own.
NOT_OF_OPERATORS = {
    "test_bench.py",
    "test_bench_experts.py",
    "test_build.py",
    "test_calls.py",
    "test_convert.py",
    "test_deepep.py",
    "test_deepspeed.py",
    "test_deepspeed_checkpoints.py",
    "test_deepspeed_engine.py",
    "test_deepspeed_refused.py",
    "test_demo.py",
    "test_docs.py",
    "test_doctor.py",
    "test_examples.py",
    "test_explain.py",
    "test_foreign.py",
    "test_hf_experts.py",
    "test_hf_stats.py",
    "test_huggingface.py",
    "test_losses.py",
    "test_migration.py",
    "test_options.py",
    "test_parallel.py",
    "test_parallel_faults.py",
    "test_parallel_modules.py",
    "test_parallel_training.py",
    "test_parallel_wrappers.py",
    "test_profiling.py",
    "test_sinks.py",
    "test_stats.py",
    "test_toolkit.py",
}

# Of layers: their tensors are where torch makes them by default. With --device=cuda that is there.
OF_LAYERS = {
    "test_experts.py",
    "test_layer.py",
    "test_properties.py",
    "test_routers.py",
    "test_routing.py",
    "test_selection.py",
    "test_topk_gate.py",
    "test_transforms.py",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=["cpu", "cuda"], help="only this one, and it must be there"
    )
    parser.addoption("--cusim", metavar="MODULE", help="run the CUDA kernels of this module")
    parser.addoption(
        "--cusim-order", metavar="ORDER", default="forward", help="forward, reverse or random<seed>"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "checks_values: only the CPU operators look at ids, slots and sources"
    )
    reason = _why_no_cuda()
    if config.getoption("--device") == "cuda" and reason:
        raise pytest.UsageError(f"--device=cuda: {reason}")
    # Containers of NVIDIA's set an environment variable that has float32 products in TF32.
    torch.backends.cuda.matmul.allow_tf32 = False
    config.cusim = None
    if path := config.getoption("--cusim"):
        spec = importlib.util.spec_from_file_location("moe_ext_dev", path)
        try:
            config.cusim = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(config.cusim)
            config.cusim.set_order(config.getoption("--cusim-order"))
        except (ImportError, ValueError) as error:
            raise pytest.UsageError(f"--cusim: {error}") from error


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.cusim and collection_path.name in NOT_OF_OPERATORS else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.cusim:
        skip = pytest.mark.skip(reason="CUDA kernels do not look at values")
        for item in items:
            if item.get_closest_marker("checks_values"):
                item.add_marker(skip)


@pytest.fixture
def cusim(request: pytest.FixtureRequest) -> ModuleType:
    """moe_ext_dev; the test is for emulated kernels."""
    if request.config.cusim is None:
        pytest.skip("needs --cusim")
    return request.config.cusim


def _why_no_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} for CUDA {torch.version.cuda} finds no GPU"
    if ops.backend("gate", "cuda") != "compiled":
        return "no CUDA kernels are built"
    return None


def pytest_report_header(config: pytest.Config) -> list[str]:
    library = ops.registry.library or ops.registry.load_error
    if config.cusim:
        library = f"CUDA kernels on the CPU, {config.cusim.__file__}"
    reason = _why_no_cuda()
    cuda = f"skipped, {reason}" if reason else torch.cuda.get_device_name()
    return [f"moe_ext: {library}; torch {torch.__version__}", f"cuda tests: {cuda}"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        reason = _why_no_cuda()
        skip = pytest.mark.skipif(reason is not None, reason=reason or "")
        devices = ["cpu", pytest.param("cuda", marks=skip)]
        if only := metafunc.config.getoption("--device"):
            devices = [only]
        metafunc.parametrize("device", devices, indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every one that there is; or the one of --device."""
    return torch.device(request.param)


@pytest.fixture
def unchecked(request: pytest.FixtureRequest, device: torch.device) -> torch.device:
    """One whose operators do not look at values: they are CUDA kernels, on a GPU or emulated."""
    if device.type == "cpu" and request.config.cusim is None:
        pytest.skip("the CPU operators look at values")
    return device


@pytest.fixture
def cuda() -> torch.device:
    """The test is for a GPU."""
    if reason := _why_no_cuda():
        pytest.skip(reason)
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _default_device(request: pytest.FixtureRequest):
    on_cuda = request.config.getoption("--device") == "cuda" and request.path.name in OF_LAYERS
    torch.set_default_device("cuda" if on_cuda else None)
    yield
    torch.set_default_device(None)


@pytest.fixture
def poisoned():
    """Fresh memory is NaN, or the largest integer: what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
