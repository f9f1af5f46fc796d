"""Gate, plan and the row operators: checked against float64, then timed beside a plain copy.

    python bench/bench_ops.py [--device cuda] [--shape qwen3 ...] [--op dispatch ...]

Prints a table and, where all was run, writes bench/results/<machine>/ops-<dtype>.json. GB/s are of
the bytes that an operator cannot avoid, each operand and each result once; "of copy" is their share
of what torch's copy_ reaches at that moment of the run. A run goes round several copies of its
operands, more than the last cache holds, and keeps all results; on CUDA the round is one graph.
Times are medians, with the fastest and the slowest tenth beside them.
"""

import argparse
import json
import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import moe_ext
from moe_ext import ops, reference

RESULTS = Path(__file__).resolve().parent / "results"


class Shape(NamedTuple):
    tokens: int
    hidden: int
    num_experts: int
    top_k: int


# The last is GShard's top-2 gate of DeepSpeed's days.
SHAPES = {
    "mixtral": Shape(8192, 4096, 8, 2),
    "deepseek": Shape(8192, 7168, 256, 8),
    "qwen3": Shape(8192, 2048, 128, 8),
    "gshard": Shape(8192, 1024, 64, 2),
}


TITLES = ["gate", "gate_backward", "plan", "dispatch", "combine", "route_dot", "dispatch_dot"]
TITLES += ["plan, priority"]


class Case(NamedTuple):
    """An operator on operands of one shape, and the check."""

    op: str
    args: tuple
    exact: Callable[[], tuple[Tensor, ...]]
    tolerance: float


def nbytes(*args) -> int:
    return sum(arg.nbytes for arg in args if isinstance(arg, Tensor))


def as_double(args: tuple) -> tuple:
    def double(x):
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return tuple(double(x) for x in args)


def cases(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Every operator as one layer calls it, forward and backward, dropless."""
    T, H, E, K = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    def case(op: str, args: tuple, tolerance: float) -> Case:
        return Case(op, args, lambda: getattr(reference, op)(*as_double(args)), tolerance)

    single = 1e-5
    rounded = max(single, 2 * torch.finfo(dtype).eps)

    logits = normal(T, E)
    yield case("gate", (logits, None, K, "softmax", True, 1.0), single)
    gate = torch.ops.moe_ext.gate(logits, None, K, "softmax", True, 1.0)
    weights, experts, probs, _ = gate
    grads = normal(T, K), None, normal(E)
    args = (*grads, probs, experts, "softmax", True, 1.0)
    yield case("gate_backward", args, single)

    yield case("plan", (experts, None, E, None, "choice", 1), 0.0)
    slots, sources, _, _ = torch.ops.moe_ext.plan(experts, None, E, None, "choice", 1)

    tokens, rows = normal(T, H, dtype=dtype), normal(T * K, H, dtype=dtype)
    yield case("dispatch", (tokens, slots, sources, None), 0.0)
    yield case("combine", (rows, slots, sources, weights), rounded)
    yield case("route_dot", (tokens, rows, slots, sources), single)
    yield case("dispatch_dot", (tokens, rows, slots, sources, weights), rounded)


def with_priority(shape: Shape, device: torch.device) -> Case:
    """plan where every expert keeps its largest weights, at capacity factor 1."""
    T, _, E, K = shape
    logits = torch.randn(T, E, device=device)
    weights, experts, _, _ = torch.ops.moe_ext.gate(logits, None, K, "softmax", True, 1.0)
    args = (experts, weights, E, math.ceil(T * K / E), "choice", 1)
    return Case("plan", args, lambda: reference.plan(*args), 0.0)


def check(case: Case) -> int:
    """The bytes of operands and results. Raises where an integer differs, or a real by more than
    the tolerance times its size or the root mean square of all, whichever is larger."""
    got = as_tuple(getattr(torch.ops.moe_ext, case.op)(*case.args))
    for one, exact in zip(got, as_tuple(case.exact()), strict=True):
        if not one.is_floating_point() or case.tolerance == 0:
            if not torch.equal(one.to(exact.dtype), exact):
                raise AssertionError(f"{case.op}: not equal to the reference")
            continue
        size = exact.abs().clamp(min=float(exact.square().mean().sqrt()))
        error = float(((one.double() - exact).abs() / size).max())
        if not error <= case.tolerance:
            raise AssertionError(f"{case.op}: relative error {error:.2g} > {case.tolerance:.2g}")
    return nbytes(*case.args, *got)


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 64 << 20  # an assumption: more than most have


def copies_of(args: tuple, device: torch.device) -> list[tuple]:
    """Enough sets of operands that one round leaves nothing of the first in the last cache; 4096 of
    the smallest, which do not fill it."""
    count = min(4096, math.ceil(2 * cache_bytes(device) / nbytes(*args)))
    clone = [[x.clone() if isinstance(x, Tensor) else x for x in args] for _ in range(count - 1)]
    return [args, *map(tuple, clone)]


def seconds(function: Callable, sets: list[tuple], device: torch.device, budget: float) -> list:
    """Seconds of one call, from so many rounds over the sets as fit the budget; sorted."""

    def round_of_calls() -> list:
        return [function(*args) for args in sets]

    timed = graph_rounds(round_of_calls) if device.type == "cuda" else clock_rounds(round_of_calls)
    first = next(timed)
    rounds = max(10, min(1000, int(budget / max(first, 1e-6))))
    return sorted(next(timed) / len(sets) for _ in range(rounds))


def clock_rounds(function: Callable[[], list]) -> Iterator[float]:
    function()
    while True:
        start = time.perf_counter()
        results = function()
        yield time.perf_counter() - start
        del results


def graph_rounds(function: Callable[[], list]) -> Iterator[float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()  # kept: each call of the graph has memory of its own for them
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    while results:
        # While the device waits, all below is already in its queue.
        torch.cuda._sleep(200_000)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        yield start.elapsed_time(end) / 1e3


def measured(times: list[float], num_bytes: int) -> dict:
    median = statistics.median(times)
    return {
        "microseconds": median * 1e6,
        "fast_slow_microseconds": [
            times[len(times) // 10] * 1e6,
            times[-1 - len(times) // 10] * 1e6,
        ],
        "bytes": num_bytes,
        "gigabytes_per_second": num_bytes / median / 1e9,
    }


def copy_speed(device: torch.device, budget: float) -> dict:
    """What copy_ reaches, bytes read and written, on tensors far larger than any cache."""
    size = 1 << (30 if device.type == "cuda" else 28)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = seconds(target.copy_, [(source,)], device, budget)
    return measured(times, 2 * source.nbytes)


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    name = model[1] if model else platform.processor() or "CPU"
    return f"{name}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def parse(arguments: list[str] | None) -> argparse.Namespace:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default=default, choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--shape", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--op", nargs="*", choices=TITLES, help="only these operators")
    parser.add_argument("--tokens", type=positive, help="in place of the shapes' own number")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each line")
    parser.add_argument("--out", type=Path, help="the JSON file, also of a part")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no GPU")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    name = machine(device)
    report = {
        "machine": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "moe_ext": moe_ext.__version__,
        "dtype": options.dtype,
        "complete": False,
        "shapes": [],
    }
    is_part = options.op or options.tokens or options.shape != list(SHAPES)
    of_machine = None if is_part else RESULTS / slug(name) / f"ops-{options.dtype}.json"
    out = options.out or of_machine
    try:
        for label in (bar := tqdm(options.shape, unit="shape")):
            shape = SHAPES[label]
            shape = shape._replace(tokens=options.tokens or shape.tokens)
            copy = copy_speed(device, options.seconds)
            of_shape = {"shape": label, **shape._asdict(), "copy": copy, "ops": []}
            report["shapes"].append(of_shape)
            bar.write(f"{label}: copy {copy['gigabytes_per_second']:.0f} GB/s")
            chosen = [*((case.op, case) for case in cases(shape, dtype, device))]
            chosen.append(("plan, priority", with_priority(shape, device)))
            while chosen:
                title, case = chosen.pop(0)
                if options.op and title not in options.op:
                    continue
                bar.set_postfix_str(title)
                num_bytes = check(case)
                sets = copies_of(case.args, device)
                times = seconds(getattr(torch.ops.moe_ext, case.op), sets, device, options.seconds)
                line = {"op": title, "backend": ops.backend(case.op, device.type)}
                line |= {"sets": len(sets), **measured(times, num_bytes)}
                line["of_copy"] = line["gigabytes_per_second"] / copy["gigabytes_per_second"]
                of_shape["ops"].append(line)
                bar.write(
                    f"{label:9} {title:15} {line['microseconds']:10.1f} us "
                    f"{line['gigabytes_per_second']:8.1f} GB/s {line['of_copy']:5.0%} of copy"
                    + (f"  ({line['backend']})" if line["backend"] != "compiled" else "")
                )
        report["complete"] = not is_part
    finally:
        if out and (report["complete"] or options.out):
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1) + "\n")
            print(out)


if __name__ == "__main__":
    main()
