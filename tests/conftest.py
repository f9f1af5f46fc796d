"""Fixtures: the device, poisoned memory, and reproducible numbers."""

import pytest
import torch

from moe_ext import ops


def pytest_report_header() -> str:
    return f"moe_ext: {ops.registry.library or ops.registry.load_error}; torch {torch.__version__}"


def _devices() -> list:
    cuda_missing = not (torch.cuda.is_available() and ops.backend("gate", "cuda") == "compiled")
    reason = "no GPU, or no CUDA kernels built"
    return ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(cuda_missing, reason=reason))]


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
