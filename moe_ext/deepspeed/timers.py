"""Wall-clock timers under DeepSpeed's names: `timers("moe").elapsed(reset=False)` milliseconds.

They wait for the device at both ends, so they are for a breakdown, not for training; what asks for
them has `wall_clock_breakdown` set.
"""

import time
from contextlib import contextmanager

import torch


class Timer:
    """Adds up the time between start and stop, on whatever device there is."""

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
        """reset: forget what was measured before"""
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
        """Milliseconds of all that was measured since the last reset; a started timer goes on."""
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
        """Milliseconds of one measurement."""
        return self._total / max(self._count, 1)


class Timers:
    """Timers by name, made when first asked for."""

    def __init__(self) -> None:
        self._timers: dict[str, Timer] = {}

    def __call__(self, name: str) -> Timer:
        return self._timers.setdefault(name, Timer(name))

    def get_timers(self) -> dict[str, Timer]:
        return self._timers

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
            # Half a measurement is none.
            timer._begin = None
            raise
        timer.stop()


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
