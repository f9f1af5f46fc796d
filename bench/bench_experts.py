"""Experts beside Hugging Face's, on the CPU: one module of transformers, four implementations.

    python bench/bench_experts.py [--dtype bfloat16] [--point NAME ...] [--rounds 2]

Every implementation's output and gradients are checked before its time counts. Times are of a
forward and a backward, medians of all rounds. In a round each makes sixteen calls in a row,
of which the second half counts: the first finds memory as another has left it, where training does
not. A peer four times slower than ours makes two, of which one counts. Every point has a process
of its own, which keeps the memory that is freed in it (memory.py), for all alike; with --new-memory
glibc gives it back at once, as it does untold, and every large result is made of new pages.

The bound is the same GEMMs alone, expert by expert into outputs that are reused: torch's threads
inside each product, or one thread for each half of the experts, whichever is faster at that point;
"fastest" is its share by the fastest call of each, which other work on the machine does not show
in. "memory" is how far a process grows at the most in one forward and backward. Prints a table and,
where all was run, writes bench/results/<machine>/experts-<dtype>.json. Needs Linux with glibc.

For a CPU without bfloat16 instructions, ONEDNN_MAX_CPU_ISA=AVX2: torch then multiplies as there.
"""

import argparse
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import memory
import torch
import transformers
from gemm_bound import gemm_bound
from timing import keep, positive, setting, timed
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import moe_ext.hf

OURS = moe_ext.hf.NAME
PEERS = ("eager", "batched_mm", "grouped_mm")
MOST_BYTES, MOST_SECONDS = 8 << 30, 20.0


class Point(NamedTuple):
    tokens: int
    hidden: int
    ffn: int
    num_experts: int
    top_k: int
    routing: str

    def rows(self) -> int:
        return self.tokens * self.top_k

    def flops(self) -> int:
        """Of the products of a forward and a backward."""
        return 3 * 2 * 3 * self.rows() * self.hidden * self.ffn


# Smallest first: 16-bit types take the first three.
POINTS = {
    "few": Point(256, 512, 512, 8, 2, "balanced"),
    "few, skewed": Point(256, 512, 512, 8, 2, "zipf"),
    "short": Point(256, 1024, 512, 16, 4, "balanced"),
    "narrow": Point(512, 512, 512, 32, 4, "balanced"),
    "fine-grained": Point(512, 512, 512, 64, 8, "balanced"),
    "fine-grained, skewed": Point(512, 512, 512, 64, 8, "zipf"),
    "wide": Point(1024, 512, 1024, 16, 2, "balanced"),
    "middle": Point(1024, 1024, 512, 32, 4, "balanced"),
    "middle, skewed": Point(1024, 1024, 512, 32, 4, "zipf"),
    "Mixtral-like": Point(2048, 1024, 1024, 8, 2, "balanced"),
    "Mixtral-like, skewed": Point(2048, 1024, 1024, 8, 2, "zipf"),
    "Qwen-like": Point(2048, 512, 1024, 64, 8, "balanced"),
}


class Case:
    """The module, its inputs, and one forward and backward of it."""

    def __init__(self, point: Point, dtype: torch.dtype) -> None:
        T, H, _, E, K, routing = point
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        config = MixtralConfig(
            hidden_size=H, intermediate_size=point.ffn, num_local_experts=E, num_experts_per_tok=K
        )
        self.module = MixtralExperts(config)
        for parameter in self.module.parameters():
            with torch.no_grad():
                parameter.copy_(normal(*parameter.shape) / math.sqrt(parameter.shape[-1]))
        self.module.to(dtype)
        share = torch.ones(E) if routing == "balanced" else 1 / torch.arange(1.0, E + 1)
        chance = -torch.log(-torch.log(torch.rand(T, E, generator=generator)))
        self.experts = (share.log() + chance).topk(K).indices
        self.weights = torch.rand(T, K, generator=generator).requires_grad_()
        self.tokens = normal(T, H).to(dtype).requires_grad_()
        self.grad = normal(T, H).to(dtype)

    def leaves(self) -> list[Tensor]:
        return [self.tokens, self.weights, *self.module.parameters()]

    def run(self, implementation: str) -> Tensor:
        for leaf in self.leaves():
            leaf.grad = None
        self.module.config._experts_implementation = implementation
        out = self.module(self.tokens, self.experts, self.weights)
        out.backward(self.grad)
        return out

    def results(self, implementation: str) -> list[Tensor]:
        out = self.run(implementation)
        return [out.detach(), *(leaf.grad for leaf in self.leaves())]


def exact_results(case: Case) -> list[Tensor]:
    """The same in float64 and plain PyTorch, expert by expert."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in case.leaves()]
    tokens, weights, up, down = leaves
    out = torch.zeros_like(tokens)
    for e, (up_e, down_e) in enumerate(zip(up.unbind(), down.unbind(), strict=True)):
        token, choice = torch.where(case.experts == e)
        gate, linear = F.linear(tokens[token], up_e).chunk(2, dim=-1)
        rows = F.linear(F.silu(gate) * linear, down_e) * weights[token, choice, None]
        out = out.index_add(0, token, rows)
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad.double())]


def worst_error(case: Case, implementation: str, exact: list[Tensor]) -> float:
    def error(got: Tensor, want: Tensor) -> float:
        return float((got.double() - want).norm() / want.norm())

    return max(map(error, case.results(implementation), exact))


def second_half(seconds: Callable[[], float], is_slow: bool = False) -> list[float]:
    calls = 2 if is_slow else 16
    return [seconds() for _ in range(calls)][calls // 2 :]


def why_not(point: Point, implementation: str, dtype: torch.dtype) -> str | None:
    """A peer that gathers a weight for every row may need more memory than there is."""
    if implementation != "batched_mm":
        return None
    weights = 3 * point.rows() * point.hidden * point.ffn * dtype.itemsize
    # Gathered once, and their gradients.
    needs = 2 * weights
    return f"needs {needs / 2**30:.0f} GiB" if needs > MOST_BYTES else None


def measure(point: Point, dtype: torch.dtype, rounds: int) -> dict:
    case = Case(point, dtype)
    exact = exact_results(case)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    times: dict[str, list[float]] = {}
    excluded, errors, first = {}, {}, {}
    for name in (OURS, *PEERS):
        reason = why_not(point, name, dtype)
        if reason is None:
            errors[name] = worst_error(case, name, exact)
            if not errors[name] <= tolerance:
                raise AssertionError(f"{name}: relative error {errors[name]:.2g} > {tolerance:.2g}")
            first[name] = timed(lambda name=name: case.run(name))
            if first[name] > MOST_SECONDS and name != OURS:
                reason = f"took {first[name]:.0f} s"
        if reason is None:
            times[name] = []
        else:
            excluded[name] = reason
    load = torch.bincount(case.experts.flatten(), minlength=point.num_experts).tolist()
    bound_seconds, bounds = gemm_bound(load, *case.module.parameters()), []
    for turn in (bar := tqdm(range(rounds), unit="round", leave=False)):
        for name, taken in times.items():
            bar.set_postfix_str(name)
            is_slow = first[name] > 4 * first[OURS]
            if is_slow and turn > 0:
                continue
            taken += second_half(lambda name=name: timed(lambda: case.run(name)), is_slow)
        bounds += second_half(bound_seconds)
    return {
        "flops": point.flops(),
        "bound_seconds": statistics.median(bounds),
        "bound_fastest_slowest": [min(bounds), max(bounds)],
        "seconds": {name: statistics.median(taken) for name, taken in times.items()},
        "fastest_slowest": {name: [min(taken), max(taken)] for name, taken in times.items()},
        "calls": {name: len(taken) for name, taken in times.items()},
        "relative_error": errors,
        "excluded": excluded,
    }


def growth(point: Point, dtype: torch.dtype, implementation: str) -> int:
    """Bytes that this process grows by in one forward and backward."""
    case = Case(point, dtype)
    case.run(implementation)
    for leaf in case.leaves():
        leaf.grad = None
    memory.trim()  # or what the first call left would not count in the second
    before = memory.start_peak()
    case.run(implementation)
    return memory.peak() - before


def summary(result: dict) -> dict:
    peers = {name: s for name, s in result["seconds"].items() if name != OURS}
    best = min(peers, key=peers.get)
    ours = result["seconds"][OURS]
    return {
        "best_peer": best,
        "ratio": peers[best] / ours,
        "of_bound": result["bound_seconds"] / ours,
        "of_bound_fastest": result["bound_fastest_slowest"][0] / result["fastest_slowest"][OURS][0],
        "gigaflops": result["flops"] / ours / 1e9,
    }


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--point", nargs="*", choices=list(POINTS), help="only these")
    parser.add_argument("--rounds", type=positive, default=2)
    parser.add_argument("--no-growth", action="store_true", help="do not measure memory")
    parser.add_argument("--new-memory", action="store_true", help="do not reuse what was freed")
    parser.add_argument("--out", type=Path, help="the JSON file, also of a part")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    dtype = getattr(torch, options.dtype)
    labels = list(POINTS) if dtype == torch.float32 else list(POINTS)[:3]
    isa = os.environ.get("ONEDNN_MAX_CPU_ISA")
    report = setting(torch.device("cpu")) | {
        "transformers": transformers.__version__,
        "moe_ext": moe_ext.__version__,
        "dtype": options.dtype,
        "ONEDNN_MAX_CPU_ISA": isa,
        "reuses_freed_memory": not options.new_memory,
        "points": {},
    }
    heads = "".join(f"{head:>11}" for head in (OURS, *PEERS, "bound"))
    print(f"{'':22}{heads}   of best  of bound   fastest   GFLOP/s   (milliseconds)")
    for label in (bar := tqdm(options.point or labels, unit="point", leave=False)):
        point = POINTS[label]
        result = point._asdict() | memory.in_new_process(
            measure,
            point,
            dtype,
            options.rounds,
            start=None if options.new_memory else memory.keep_freed,
        )
        if not options.no_growth:
            result["growth_bytes"] = {
                implementation: memory.in_new_process(growth, point, dtype, implementation)
                for implementation in result["seconds"]
            }
        result |= summary(result)
        report["points"][label] = result
        cells = [
            f"{result['seconds'][n] * 1e3:11.1f}" if n in result["seconds"] else f"{'-':>11}"
            for n in (OURS, *PEERS)
        ]
        bar.write(
            f"{label:22}{''.join(cells)}{result['bound_seconds'] * 1e3:11.1f}"
            f"{result['ratio']:9.2f}x{result['of_bound']:10.0%}{result['of_bound_fastest']:10.0%}"
            f"{result['gigaflops']:10.0f}"
        )
        for peer, reason in result["excluded"].items():
            bar.write(f"{'':22}{peer} {reason}: not timed")
        if not options.no_growth:
            cells = [
                f"{result['growth_bytes'][n] / 2**20:11.0f}" if n in result["seconds"] else " " * 11
                for n in (OURS, *PEERS)
            ]
            bar.write(f"{'   memory, MiB':22}{''.join(cells)}")
    points = report["points"].values()
    report["geometric_mean_ratio"] = geometric_mean([p["ratio"] for p in points])
    report["lowest_ratio"] = min(p["ratio"] for p in points)
    for share in ("of_bound", "of_bound_fastest"):
        report[f"geometric_mean_{share}"] = geometric_mean([p[share] for p in points])
        report[f"lowest_{share}"] = min(p[share] for p in points)
    print(
        f"{report['geometric_mean_ratio']:.2f}x the best of them in the geometric mean, "
        f"{report['lowest_ratio']:.2f}x at the least; of the bound "
        f"{report['geometric_mean_of_bound']:.0%}, {report['lowest_of_bound']:.0%} at the least; "
        f"by the fastest calls of both {report['geometric_mean_of_bound_fastest']:.0%}, "
        f"{report['lowest_of_bound_fastest']:.0%}"
    )
    suffix = (f"-{isa.lower()}" if isa else "") + ("-new-memory" if options.new_memory else "")
    whole = None if options.point else f"experts-{options.dtype}{suffix}"
    keep(report, whole, options.out)


if __name__ == "__main__":
    main()
