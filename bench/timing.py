"""Interleaved timing of several implementations: all benches time with `compare`.

In every round each implementation makes some calls in a row, of which the second half counts. The
first half starts with the caches and memory that another implementation left, as no program does
that uses one alone. Reported are the median of the calls that count, the fastest and slowest tenth,
and for ratios the median over the rounds.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch


def read(numbers: torch.Tensor) -> torch.Tensor:
    """Read an even count of floats once. A dot product of two halves is faster than a sum: 14.3
    instead of 12.7 GB/s on an Emerald Rapids, where a loop of loads came to 14.7."""
    return torch.dot(*numbers.view(2, -1))


class Spread(NamedTuple):
    """Median, fastest tenth and slowest tenth: seconds of a call, or ratios."""

    median: float
    fast: float
    slow: float


def spread(times: list[float]) -> Spread:
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return Spread(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth])


def compare(
    timers: dict[str, Iterator[float]], budget: float, rounds: int = 5
) -> dict[str, list[list[float]]]:
    """{name: for every round the times that count}. Each `next` of a timer makes one call and gives
    its seconds. budget: seconds for each name, which sets the calls of a round, two to 200."""
    taken: dict[str, list[list[float]]] = {name: [] for name in timers}
    first = {name: next(timer) for name, timer in timers.items()}
    names = list(timers)
    for turn in range(rounds):
        start = turn % len(names)  # no name always follows the same one
        for name in names[start:] + names[:start]:
            count = max(2, min(200, int(budget / rounds / max(first[name], 1e-9))))
            taken[name].append([next(timers[name]) for _ in range(count)][count // 2 :])
    return taken


def spreads(
    timers: dict[str, Iterator[float]], budget: float, rounds: int = 5
) -> dict[str, Spread]:
    taken = compare(timers, budget, rounds)
    return {name: spread(list(itertools.chain(*times))) for name, times in taken.items()}


def compare_with(
    ours: str, timers: dict[str, Iterator[float]], budget: float, rounds: int = 5
) -> dict[str, dict]:
    """The median seconds of each, and for all others the ratio of their time to ours."""
    taken = compare(timers, budget, rounds)

    def ratio(theirs: list[list[float]]) -> Spread:
        pairs = zip(taken[ours], theirs, strict=True)
        return spread([statistics.median(b) / statistics.median(a) for a, b in pairs])

    return {
        "seconds": {n: statistics.median(itertools.chain(*times)) for n, times in taken.items()},
        "ratio": {name: ratio(theirs) for name, theirs in taken.items() if name != ours},
    }


def clock(function: Callable, sets: Iterable[tuple]) -> Iterator[float]:
    """Time calls on the CPU, cycling through the sets of arguments. A result is freed before the
    next call."""
    while True:
        for args in sets:
            start = time.perf_counter()
            result = function(*args)
            taken = time.perf_counter() - start
            del result
            yield taken


def graph_clock(function: Callable, sets: list[tuple]) -> Iterator[float]:
    """Time calls on the GPU: a CUDA graph of one call for each set, and their mean."""

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
        # While the device sleeps the CPU queues all that follows: launches do not count.
        torch.cuda._sleep(200_000)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        yield start.elapsed_time(end) / 1e3 / len(sets)


def event_clock(function: Callable, sets: list[tuple]) -> Iterator[float]:
    """Time calls on the GPU, launches included."""
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
    """For comparisons: a peer that synchronizes cannot be captured in a graph."""
    return (event_clock if device.type == "cuda" else clock)(function, sets)


def timer_alone(function: Callable, sets: list[tuple], device: torch.device) -> Iterator[float]:
    """For our operators alone, without the cost of launches on the GPU."""
    return (graph_clock if device.type == "cuda" else clock)(function, sets)
