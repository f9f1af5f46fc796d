"""How the benches time, and where they keep what they found.

Calls of several implementations are interleaved: in every round each makes some in a row, of which
the second half counts. The first half finds caches and memory as another one has left them, where a
program that uses one alone does not. What is reported is the median of all that count, the fastest
and the slowest tenth, and of ratios the median over the rounds.
"""

import argparse
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

RESULTS = Path(__file__).resolve().parent / "results"


class Spread(NamedTuple):
    """Seconds of one call."""

    median: float
    fast: float
    slow: float


def spread(times: list[float]) -> Spread:
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return Spread(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth])


def compare(
    timers: dict[str, Iterator[float]], budget: float, rounds: int = 5, calls: int = 200
) -> dict[str, list[list[float]]]:
    """{name: for every round the times that count}. A timer gives the seconds of one call with each
    `next`. budget: seconds for each name, which sets the calls of a round, two to `calls`. Every
    round starts with another name."""
    taken: dict[str, list[list[float]]] = {name: [] for name in timers}
    first = {name: next(timer) for name, timer in timers.items()}
    names = list(timers)
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            count = int(budget / rounds / max(first[name], 1e-9))
            count = max(2, min(calls, count))
            taken[name].append([next(timers[name]) for _ in range(count)][count // 2 :])
    return taken


def spreads(taken: dict[str, list[list[float]]]) -> dict[str, Spread]:
    return {
        name: spread([t for times in of_rounds for t in times]) for name, of_rounds in taken.items()
    }


def ratio(ours: list[list[float]], theirs: list[list[float]]) -> Spread:
    """How many times longer theirs takes, round by round."""
    return spread(
        [statistics.median(b) / statistics.median(a) for a, b in zip(ours, theirs, strict=True)]
    )


def timed(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def clock(function: Callable, sets: list[tuple]) -> Iterator[float]:
    """Goes round several sets of arguments. A result is gone before the next is made."""
    while True:
        for args in sets:
            start = time.perf_counter()
            result = function(*args)
            taken = time.perf_counter() - start
            del result
            yield taken


def graph_clock(function: Callable, sets: list[tuple]) -> Iterator[float]:
    """The same on the GPU: one CUDA graph of a call for each set, and the mean of these."""

    def round_of_calls() -> list:
        return [function(*args) for args in sets]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        round_of_calls()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = round_of_calls()  # kept: each call of the graph has memory of its own for them
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    while results:
        # While the device waits, all below is already in its queue.
        torch.cuda._sleep(200_000)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        yield start.elapsed_time(end) / 1e3 / len(sets)


def event_clock(function: Callable, sets: list[tuple]) -> Iterator[float]:
    """Launches and all."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    while True:
        torch.cuda.synchronize()
        start.record()
        for args in sets:
            function(*args)
        end.record()
        end.synchronize()
        yield start.elapsed_time(end) / 1e3 / len(sets)


def timer(function: Callable, sets: list[tuple], device: torch.device) -> Iterator[float]:
    """For functions that are compared: one that waits for the GPU cannot be a graph."""
    return (event_clock if device.type == "cuda" else clock)(function, sets)


def timer_alone(function: Callable, sets: list[tuple], device: torch.device) -> Iterator[float]:
    return (graph_clock if device.type == "cuda" else clock)(function, sets)


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    name = model[1] if model else platform.processor() or "CPU"
    return f"{name}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def setting(device: torch.device) -> dict:
    """What every result file says of where it comes from."""
    return {
        "machine": machine(device),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def keep(report: dict, name: str | None, out: Path | None) -> None:
    """Writes the report to `out`, or to the file of this name among the machine's results."""
    path = out or (RESULTS / slug(report["machine"]) / f"{name}.json" if name else None)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(path)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
