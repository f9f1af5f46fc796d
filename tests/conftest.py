"""Fixtures: the device, poisoned memory, and reproducible numbers; and the emulated kernels.

With --cusim=moe_ext_dev.so the CUDA kernels, run on the CPU, stand in for the CPU operators, and
every test of device "cpu" is one of theirs.
"""

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cases import COMPOSED_ON_CUDA

from moe_ext.ops import contracts, registry, torch_grouped_mm

# For deterministic algorithms on a GPU; read at the first product there.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Results of compiled operators on the CPU are NaN until they are written; read at the first one.
os.environ["MOE_EXT_POISON"] = "1"

# Folders whose tests run on --device and on the emulated kernels; the tensors of layers/ are on
# torch's default device. The other folders build, install, draw or start processes of their own.
ON_DEVICE = {"ops", "layers", "cusim"}
# Tests in layers/ of plain Python and torch alone.
ON_CPU = {"test_convert.py", "test_foreign.py", "test_losses.py", "test_options.py"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cpu", "cuda"], help="only this one; it must be there")
    parser.addoption("--cusim", metavar="MODULE", help="run the CUDA kernels of this module")
    parser.addoption(
        "--cusim-order", metavar="ORDER", default="forward", help="forward, reverse or random<seed>"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "checks_values: only the CPU operators check ids, slots and sources"
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
            config.cusim_composed = _compose()
        except (ImportError, ValueError) as error:
            raise pytest.UsageError(f"--cusim: {error}") from error


def _compose() -> torch.library.Library:
    """Put in place of the CPU's own operators those that are made of CUDA kernels."""
    library = torch.library.Library("moe_ext", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are replaced
        for name in COMPOSED_ON_CUDA:
            library.impl(name, registry.COMPOSED[name], "CPU")
        for name, product in torch_grouped_mm.OPERATORS.items():
            library.impl(name, _emulated(name, product), "CPU", with_keyset=True)
    return library


def _emulated(name: str, product: Callable) -> Callable:
    """A product on emulated tensor cores where they take it, else as on the CPU."""
    compiled = torch.library.get_kernel(f"moe_ext::{name}", "CPU")

    def run(keys, *args):
        contracts.check(name, args)
        is_own = torch_grouped_mm.path_of(name, args)[0] == "own"
        return product(*args) if is_own else compiled.call_boxed(keys, *args)

    return run


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not config.cusim or collection_path.suffix != ".py":
        return None
    is_on_device = collection_path.parent.name in ON_DEVICE
    return None if is_on_device and collection_path.name not in ON_CPU else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that cannot run here."""
    has_cuda = _why_no_cuda() is None
    has_unchecked = has_cuda or config.cusim or config.getoption("--device") == "cuda"
    is_there = {"cuda": has_cuda, "cusim": config.cusim, "unchecked": has_unchecked}

    def runs(item: pytest.Item) -> bool:
        if config.cusim and item.get_closest_marker("checks_values"):
            return False
        return all(is_there.get(name, True) for name in getattr(item, "fixturenames", ()))

    left_out = [item for item in items if not runs(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if runs(item)]


@pytest.fixture
def cusim(request: pytest.FixtureRequest) -> ModuleType:
    """moe_ext_dev; the test is for emulated kernels."""
    return request.config.cusim


@pytest.fixture
def launches_of(cusim: ModuleType):
    """launches_of(function, ...): the kernels that the call launched, a dict for each; --cusim."""

    def launches_of(function, *args, **kwargs) -> list[dict]:
        cusim.take_launches()
        cusim.record(True)
        try:
            function(*args, **kwargs)
        finally:
            cusim.record(False)
        return cusim.take_launches()

    return launches_of


def _why_no_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} for CUDA {torch.version.cuda} finds no GPU"
    if registry.backend("gate", "cuda") != "compiled":
        return "no CUDA kernels are built"
    return None


def pytest_report_header(config: pytest.Config) -> list[str]:
    library = registry.libraries.library or registry.libraries.load_error
    if config.cusim:
        library = f"CUDA kernels on the CPU, {config.cusim.__file__}"
    reason = _why_no_cuda()
    cuda = f"skipped, {reason}" if reason else torch.cuda.get_device_name()
    return [f"moe_ext: {library}; torch {torch.__version__}", f"cuda tests: {cuda}"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        devices = ["cpu", "cuda"] if _why_no_cuda() is None else ["cpu"]
        if only := metafunc.config.getoption("--device"):
            devices = [only]
        metafunc.parametrize("device", devices, indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that there is; or the one of --device."""
    return torch.device(request.param)


@pytest.fixture
def unchecked(request: pytest.FixtureRequest, device: torch.device) -> torch.device:
    """A device whose operators do not check values: CUDA kernels, on a GPU or emulated."""
    if device.type == "cpu" and request.config.cusim is None:
        pytest.skip("the CPU operators check values")
    return device


@pytest.fixture
def cuda() -> torch.device:
    """The test is for a GPU."""
    return torch.device("cuda")


@pytest.fixture(scope="module", autouse=True)
def _ranks_end_with_their_file():
    yield
    if processes := sys.modules.get("processes"):
        processes.close()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _default_device(request: pytest.FixtureRequest):
    is_layer = request.path.parent.name == "layers" and request.path.name not in ON_CPU
    on_cuda = request.config.getoption("--device") == "cuda" and is_layer
    torch.set_default_device("cuda" if on_cuda else None)
    yield
    torch.set_default_device(None)


@pytest.fixture
def poisoned():
    """Fresh memory of torch too is NaN, or the largest integer: what is not written is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
