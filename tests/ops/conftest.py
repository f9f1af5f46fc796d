"""Fixtures of the operators' tests: launches as the emulator counts them."""

from types import ModuleType

import pytest


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
