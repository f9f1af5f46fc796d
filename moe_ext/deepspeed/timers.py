"""Wall-clock timers under DeepSpeed's names: `timers("moe").elapsed(reset=False)` milliseconds.

They synchronise with the device at both ends: set `wall_clock_breakdown` to measure, not to train.
"""

import time
from contextlib import contextmanager

import torch


class Timer:
    """The sum of the times between start and stop."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.reset()

    def reset(self) -> None:
        self._total = 0.0
        self._count = 0
        self._begin: float | None = None

    def start(self) -> None:
        if self._begin is not None:
            raise RuntimeError(f"Timer: {self.name} has been started already")
        _synchronize()
        self._begin = time.perf_counter()

    def stop(self, reset: bool = False) -> None:
        """reset: forget earlier measurements"""
        if self._begin is None:
            raise RuntimeError(f"Timer: {self.name} has not been started")
        _synchronize()
        record = (time.perf_counter() - self._begin) * 1000
        if reset:
            self.reset()
        self._total += record
        self._count += 1
        self._begin = None

    def elapsed(self, reset: bool = True) -> float:
        """Milliseconds measured since the last reset; a started timer continues."""
        is_running = self._begin is not None
        if is_running:
            self.stop()
        total = self._total
        if reset:
            self.reset()
        if is_running:
            self.start()
        return total

    def mean(self) -> float:
        """Mean milliseconds of a measurement."""
        return self._total / max(self._count, 1)


class Timers(dict[str, Timer]):
    """Timers by name, created on first use."""

    def __call__(self, name: str) -> Timer:
        return self.setdefault(name, Timer(name))

    def get_timers(self) -> dict[str, Timer]:
        return self

    def log(self, names: list[str], normalizer: float = 1.0, reset: bool = True) -> None:
        """Print the timers of these names in milliseconds, over `normalizer`."""
        times = (f"{name}: {self(name).elapsed(reset) / normalizer:.2f}" for name in names)
        print("time (ms) | " + " | ".join(times), flush=True)

    @contextmanager
    def time(self, name: str):
        timer = self(name)
        timer.start()
        try:
            yield
        except BaseException:
            # An interrupted measurement does not count.
            timer._begin = None
            raise
        timer.stop()


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
