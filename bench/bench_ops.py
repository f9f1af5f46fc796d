"""Gate, plan and the row operators: checked, then timed beside a plain copy and other libraries.

    python bench/bench_ops.py [--device cuda] [--shape qwen3 ...] [--op dispatch ...]
                              [--threads 1 2] [--memory new huge kept]

Our results are checked against float64, the others' against ours. GB/s count each operand and each
result once; "of copy" is their share of the GB/s of torch's copy_ in the same run. For these our
operator cycles through several sets of operands, more than the last cache holds. A peer's ratio is
its time over ours, on one set of operands for all.

--memory, on the CPU, says how large results are allocated, for ours and the others alike:
docs/performance.md explains new and huge; with kept, freed memory is used again (memory.py).
Prints tables and, after a run of all shapes and operators, writes
bench/results/<machine>/ops-<dtype>.json.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import memory
import peers
import torch
from common import keep, parser, positive, setting
from report import markdown
from timing import compare_with, spreads, timer, timer_alone
from torch import Tensor
from tqdm import tqdm

import moe_ext
from moe_ext.ops import checks, reference, registry

# A peer with masks is left out if its products would take longer than --longest at this speed.
MOST_BYTES, SPEED = 2 << 30, 1e11


class Shape(NamedTuple):
    tokens: int
    hidden: int
    num_experts: int
    top_k: int


SHAPES = {
    "mixtral": Shape(8192, 4096, 8, 2),
    "deepseek": Shape(8192, 7168, 256, 8),
    "qwen3": Shape(8192, 2048, 128, 8),
    "gshard": Shape(8192, 1024, 64, 2),
    "qwen3, half": Shape(4096, 2048, 128, 8),
}

TITLES = ["gate", "gate_backward", "plan", "mask_weights", "mask_weights_backward", "dispatch"]
TITLES += ["combine", "route_dot", "combine_backward", "activate, swiglu", "activate, gelu"]
TITLES += ["plan, priority"]


class Case(NamedTuple):
    """An operator, its operands, and the function that gives its exact result."""

    op: str
    args: tuple
    exact: Callable[[], tuple[Tensor, ...]]
    tolerance: float


def nbytes(*args) -> int:
    return sum(arg.nbytes for arg in args if isinstance(arg, Tensor))


def operands(shape: Shape, dtype: torch.dtype, device: torch.device) -> peers.Operands:
    T, H, E, K = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    logits = normal(T, E)
    choice = moe_ext.gate(logits, K, normalize=True)
    plan = moe_ext.make_plan(choice.expert_ids, E, order="token")
    tokens, rows = normal(T, H, dtype=dtype), normal(T * K, H, dtype=dtype)
    return peers.Operands(logits, tokens, rows, choice.weights, plan)


def cases(o: peers.Operands, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    """Every operator as a dropless layer calls it, forward and backward. Last, plan where each
    expert keeps its largest weights, at capacity factor 1."""
    T, E, K = len(o.tokens), o.plan.num_experts, o.top_k

    def case(op: str, args: tuple, tolerance: float, exact=in_double) -> tuple[str, Case]:
        return op, Case(op, args, lambda: exact(op, *args), tolerance)

    single = 1e-5
    rounded = max(single, 2 * torch.finfo(dtype).eps)
    yield case("gate", (o.logits, None, K, "softmax", True, 1.0), single)
    weights, expert_ids, probs, _ = torch.ops.moe_ext.gate(o.logits, None, K, "softmax", True, 1.0)
    grads = torch.randn_like(weights), None, torch.randn_like(probs[0])
    yield case("gate_backward", (*grads, probs, expert_ids, "softmax", True, 1.0), single)

    yield case("plan", (expert_ids, None, E, None, "token", 1), 0.0)
    slots, sources = o.plan.slots, o.plan.sources
    yield case("mask_weights", (weights, slots, True, 1e-9, 1.0), single)
    yield case("mask_weights_backward", (grads[0], weights, slots, True, 1e-9, 1.0), single)
    yield case("dispatch", (o.tokens, slots, sources, None), 0.0)
    yield case("combine", (o.rows, slots, sources, weights), rounded)
    both = o.tokens, o.rows, slots, sources
    yield case("route_dot", both, single, by_columns)
    yield case("combine_backward", (*both, weights), rounded, by_columns)
    for activation in ("swiglu", "gelu"):
        args = (o.rows, slots, sources, None, activation)
        _, made = case("activate", args, rounded, activated_by_columns)
        yield f"activate, {activation}", made
    args = (expert_ids, weights, E, math.ceil(T * K / E), "choice", 1)
    yield "plan, priority", Case("plan", args, lambda: reference.plan(*args), 0.0)


def in_double(op: str, *args) -> tuple[Tensor, ...]:
    """The reference in float64."""
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    return as_tuple(getattr(reference, op)(*wide))


def by_columns(op: str, tokens: Tensor, rows: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """`in_double` of dots, some columns at a time: the reference gathers a row for every route."""
    columns = zip(tokens.split(1024, dim=1), rows.split(1024, dim=1), strict=True)
    parts = [in_double(op, *both, *others) for both in columns]
    *dispatched, dots = zip(*parts, strict=True)
    return (*(torch.cat(part, dim=1) for part in dispatched), sum(dots))


def activated_by_columns(op: str, pre_activation: Tensor, *others) -> tuple[Tensor, ...]:
    """`in_double` of activate, some columns at a time; gates are the first half of the columns."""
    halves = pre_activation.chunk(2, dim=1) if others[-1] in checks.GATED else (pre_activation,)
    columns = zip(*(half.split(1024, dim=1) for half in halves), strict=True)
    parts = (in_double(op, torch.cat(part, dim=1), *others) for part in columns)
    return (torch.cat([made for (made,) in parts], dim=1),)


def compare_results(what: str, got: tuple, exact: tuple, tolerance: float) -> None:
    """Raise if an integer differs, or a real number by more than the tolerance times the larger of
    its size and the root mean square of all. A peer may give only the first results."""
    assert got
    for one, right in zip(got, exact, strict=False):
        if one.shape != right.shape:
            raise AssertionError(f"{what}: got {list(one.shape)} for {list(right.shape)}")
        if not right.is_floating_point() or tolerance == 0:
            if not torch.equal(one.to(right.dtype), right):
                raise AssertionError(f"{what}: not equal")
            continue
        right = right.double()
        # In place, because the largest of these are gigabytes.
        size = right.abs().clamp_(min=float(right.norm()) / math.sqrt(right.numel()))
        error = float((one.double() - right).abs_().div_(size).max())
        if not error <= tolerance:
            raise AssertionError(f"{what}: relative error {error:.2g} > {tolerance:.2g}")


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def call(case: Case) -> tuple[Tensor, ...]:
    return as_tuple(getattr(torch.ops.moe_ext, case.op)(*case.args))


def check(case: Case) -> int:
    """Check our result; return the bytes of operands and results."""
    got, exact = call(case), as_tuple(case.exact())
    assert len(got) == len(exact)
    compare_results(case.op, got, exact, case.tolerance)
    return nbytes(*case.args, *got)


def peers_of(
    title: str, case: Case, o: peers.Operands, longest: float
) -> tuple[dict[str, Callable], dict]:
    """The peers' functions, checked, and the reasons why others are left out."""
    functions, excluded = {}, {}
    # Peers round a weight, its product and every sum to the rows' dtype, half an eps each, and the
    # terms may be larger than their sum.
    tolerance = max(case.tolerance, (o.top_k + 2) * torch.finfo(o.tokens.dtype).eps)
    mask = len(o.tokens) * o.plan.num_experts * int(o.plan.load.max())
    products = 2 * mask * o.tokens.shape[1]
    for peer in peers.OPERATORS.get(title, []):
        if "dense" in peer.name and (products > longest * SPEED or 4 * mask > MOST_BYTES):
            excluded[peer.name] = f"would take {products / 1e12:.1f} TFLOP"
        elif reason := peer.missing(o.tokens.device):
            excluded[peer.name] = reason
        else:
            made = peer.make(o)
            function, read = made if isinstance(made, tuple) else (made, as_tuple)
            compare_results(
                peer.name, read(function()), call(case), tolerance if case.tolerance else 0.0
            )
            functions[peer.name] = function
    return functions, excluded


def cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 64 << 20  # assumed; larger than most


def copies_of(args: tuple, device: torch.device) -> list[tuple]:
    """Sets of operands of twice the last cache's size together, at most 4096 sets."""
    count = min(4096, math.ceil(2 * cache_bytes(device) / nbytes(*args)))
    clone = [[x.clone() if isinstance(x, Tensor) else x for x in args] for _ in range(count - 1)]
    return [args, *map(tuple, clone)]


def copy_speed(device: torch.device, budget: float) -> dict:
    """Seconds and GB/s, read and written, of copy_ on tensors far larger than any cache."""
    size = 1 << (30 if device.type == "cuda" else 28)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timers = {"copy_": timer(target.copy_, [(source,)], device)}
    seconds = spreads(timers, budget)["copy_"].median
    return {"seconds": seconds, "gigabytes_per_second": 2 * source.nbytes / seconds / 1e9}


def measure(options: argparse.Namespace, label: str, state: str | None = None) -> list[dict]:
    """All operators for one shape: a result for each number of threads."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    shape = SHAPES[label]
    shape = shape._replace(tokens=options.tokens or shape.tokens)
    results = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        copy = copy_speed(device, options.seconds)
        head = {"shape": label, **shape._asdict(), "threads": threads, "memory": state}
        results.append(head | {"copy": copy, "ops": []})
    o = operands(shape, dtype, device)
    for title, case in cases(o, dtype):
        if options.op and title not in options.op:
            continue
        if state in ("new", "huge"):
            memory.give_back()
            moe_ext.keep_memory(0)
        num_bytes = check(case)
        functions, excluded = peers_of(title, case, o, options.longest)
        for result in results:
            torch.set_num_threads(result["threads"])
            line = {"op": title, "bytes": num_bytes, "excluded": excluded}
            line |= timed(case, functions, device, options.seconds, state)
            speed = num_bytes / line["alone"].median / 1e9
            line["gigabytes_per_second"] = speed
            line["of_copy"] = speed / result["copy"]["gigabytes_per_second"]
            result["ops"].append(line)
        functions.clear()  # frees their operands before the next ones are made
        if state == "kept":
            memory.trim()
    return results


def timed(
    case: Case,
    functions: dict[str, Callable],
    device: torch.device,
    budget: float,
    state: str | None,
) -> dict:
    """Time an operator alone, on operands that no cache holds, then beside its peers."""
    ours = getattr(torch.ops.moe_ext, case.op)
    sets = copies_of(case.args, device)
    alone = {"moe_ext": timer_alone(ours, sets, device)}
    timers = {"moe_ext": timer(ours, [case.args], device)}
    timers |= {name: timer(f, [()], device) for name, f in functions.items()}
    if state in ("new", "huge"):
        memory.give_back_large()
        memory.fetch()
    elif state == "kept":
        memory.make_room()
    return {
        "backend": registry.backend(case.op, device.type),
        "alone": spreads(alone, budget)["moe_ext"],
        **(compare_with("moe_ext", timers, budget) if functions else {"seconds": {}, "ratio": {}}),
    }


def measure_in(options: argparse.Namespace, label: str, state: str | None) -> list[dict]:
    if state is None:
        return measure(options, label)
    huge = {"THP_MEM_ALLOC_ENABLE": "1"} if state == "huge" else {}
    start = memory.keep_freed if state == "kept" else memory.give_back
    return memory.in_new_process(measure, options, label, state, start=start, environment=huge)


def table(result: dict) -> str:
    """Our operators of one shape, each above its peers."""
    head = f"{result['shape']}, {result['threads']} threads"
    head += f", {result['memory']} memory" if result["memory"] else ""
    rows = []
    for line in result["ops"]:
        speed = f"{line['gigabytes_per_second']:.1f} GB/s, {line['of_copy']:.0%} of copy"
        rows.append([line["op"], line["backend"], f"{line['alone'].median * 1e6:.1f}", speed])
        for name, times in line["ratio"].items():
            ratio = f"{times.median:.2f}x ({times.fast:.2f} to {times.slow:.2f})"
            rows.append(["", name, f"{line['seconds'][name] * 1e6:.1f}", ratio])
        rows += [["", name, "", f"not timed: {why}"] for name, why in line["excluded"].items()]
    copy = f"copy {result['copy']['gigabytes_per_second']:.0f} GB/s"
    return markdown([head, "implementation", "us", copy], rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parse = parser(__doc__, seconds=1.0)
    parse.add_argument("--device", default=default, choices=["cpu", "cuda"])
    parse.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parse.add_argument("--shape", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parse.add_argument("--op", nargs="*", choices=TITLES, help="only these operators")
    parse.add_argument("--tokens", type=positive, help="replaces the shapes' number of tokens")
    parse.add_argument("--threads", nargs="*", type=positive, default=[torch.get_num_threads()])
    parse.add_argument("--memory", nargs="*", default=[None], choices=["new", "huge", "kept"])
    text = "leave a peer with masks out if its call would take more seconds (1.0)"
    parse.add_argument("--longest", type=float, default=1.0, help=text)
    parse.add_argument("--name", help="name of the result file, also for a part")
    options = parse.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parse.error(f"--device cuda: torch {torch.__version__} finds no GPU")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    device = torch.device(options.device)
    is_part = bool(options.op or options.tokens or options.shape != list(SHAPES))
    name = options.name or (None if is_part else f"ops-{options.dtype}")
    report = setting(device) | {"dtype": options.dtype, "complete": False, "shapes": []}
    chosen = list(itertools.product(options.shape, options.memory))
    try:
        for label, state in (bar := tqdm(chosen, unit="shape", leave=False)):
            bar.set_postfix_str(label)
            for result in measure_in(options, label, state):
                report["shapes"].append(result)
                bar.write(table(result) + "\n")
        report["complete"] = True
    finally:
        # A run that was stopped goes to --out alone.
        keep(report, name if report["complete"] else None, options.out)


if __name__ == "__main__":
    main()
