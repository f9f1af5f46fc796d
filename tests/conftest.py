"""Fixtures: the device, poisoned memory, and reproducible numbers."""

import pytest
import torch

from moe_ext import ops


def _why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU"
    if ops.backend("gate", "cuda") != "compiled":
        return "no CUDA kernels are built"
    return None


def pytest_report_header() -> list[str]:
    library = ops.registry.library or ops.registry.load_error
    reason = _why_no_cuda()
    cuda = f"skipped, {reason}" if reason else torch.cuda.get_device_name()
    return [f"moe_ext: {library}; torch {torch.__version__}", f"cuda tests: {cuda}"]


def _devices() -> list:
    reason = _why_no_cuda()
    skip = pytest.mark.skipif(reason is not None, reason=reason or "")
    return ["cpu", pytest.param("cuda", marks=skip)]


@pytest.fixture(params=_devices())
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Fresh memory is NaN, or the largest integer: what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
