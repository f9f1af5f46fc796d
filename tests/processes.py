"""Run functions in the processes of a gloo group, which stay for a file's later functions."""

import functools
import importlib
import inspect
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

_pools: dict[int, "Processes"] = {}

# A server imports these once and forks every process. Importing takes longer than most tests.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "functorch.compile",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "torch.distributed.checkpoint.state_dict",
    ]
)


def on_processes(number: int, function, *args) -> list:
    """Call `function(rank, *args)` in each process of a gloo group, and return all results.

    function: a function at a module's top level. An error in a process is raised here, as a
        RuntimeError with the text of its traceback.
    """
    if number not in _pools:
        _pools[number] = Processes(number)
    try:
        return _pools[number].run(function, *args)
    except BaseException:
        # The other processes may wait for the one that failed.
        _pools.pop(number).close()
        raise


def on_ranks(number: int | Callable[..., int]):
    """Make a test of `function(rank, ...)`, which asserts in each process of a gloo group.

    number: of processes, or a function of the test's arguments, which are all but the rank
    """

    def decorate(function):
        def test(**arguments) -> None:
            processes = number if isinstance(number, int) else number(**arguments)
            on_processes(processes, _body, function.__module__, function.__name__, arguments)

        functools.update_wrapper(test, function)
        signature = inspect.signature(function)
        test.__signature__ = signature.replace(parameters=[*signature.parameters.values()][1:])
        return test

    return decorate


def _body(rank: int, module: str, name: str, arguments: dict) -> None:
    getattr(importlib.import_module(module), name).__wrapped__(rank, **arguments)


def gathered(value) -> list:
    """The values of all ranks, on each of them."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class Processes:
    def __init__(self, number: int, seconds: float = 60) -> None:
        """seconds: how long a process waits for another"""
        self.folder = tempfile.TemporaryDirectory()
        self.processes, self.pipes = [], []
        for rank in range(number):
            here, there = _context.Pipe()
            arguments = (rank, number, self.folder.name, seconds, there)
            self.processes.append(_context.Process(target=_serve, args=arguments, daemon=True))
            self.processes[-1].start()
            there.close()
            self.pipes.append(here)

    def run(self, function, *args) -> list:
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = [self._answer(rank) for rank in range(len(self.pipes))]
        failures = [text for failed, text in answers if failed]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [value for _, value in answers]

    def _answer(self, rank: int):
        try:
            return self.pipes[rank].recv()
        except EOFError:
            return True, f"process {rank} has ended"

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def close() -> None:
    """End all processes: the threads of gloo's groups wake up often, and slow what runs beside."""
    while _pools:
        _pools.popitem()[1].close()


def _serve(rank: int, number: int, folder: str, seconds: float, pipe) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{Path(folder) / 'rendezvous'}",
        rank=rank,
        world_size=number,
        timeout=timedelta(seconds=seconds),
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = False, function(rank, *args)
        except Exception:
            answer = True, f"process {rank}: {traceback.format_exc()}"
        pipe.send(answer)
