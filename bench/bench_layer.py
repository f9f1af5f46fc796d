"""A whole layer, forward and backward, beside other libraries' layers of the same weights.

    python bench/bench_layer.py [--dtype bfloat16] [--point NAME ...] [--threads 1 2]

Every layer's output and its gradients are checked against float64 before its time counts. The
process keeps the memory that is freed in it (memory.py), for all alike; with --new-memory large
blocks are given back. "bound" is of the experts' matrix products alone
(gemm_bound.py). Peers that are missing, too slow or too large for memory are named. Prints a table
and, where all was run, writes bench/results/<machine>/layer-<dtype>.json.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import memory
import peers
import torch
from gemm_bound import gemm_bound
from timing import clock, compare, keep, positive, ratio, setting, spreads
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import moe_ext

# Products of masks at this speed tell whether it is worth waiting for them.
MOST_BYTES, SPEED = 8 << 30, 2e11


class Point(NamedTuple):
    tokens: int
    hidden: int
    ffn: int
    num_experts: int
    top_k: int
    load: str

    def shares(self) -> Tensor:
        """How much of all tokens each expert draws. [E]"""
        E = self.num_experts
        shares = {
            "balanced": torch.ones(E),
            "zipf": 1 / torch.arange(1.0, E + 1),
            "one hot expert": torch.cat([torch.tensor([1e4]), torch.ones(E - 1)]),
            "half of the experts empty": torch.cat(
                [torch.ones(E // 2), torch.full((E - E // 2,), 1e-9)]
            ),
        }
        return shares[self.load]


POINTS = {
    "balanced": Point(4096, 512, 256, 32, 4, "balanced"),
    "zipf": Point(4096, 512, 256, 32, 4, "zipf"),
    "one hot expert": Point(4096, 512, 256, 32, 4, "one hot expert"),
    "empty experts": Point(4096, 512, 256, 32, 4, "half of the experts empty"),
    "ragged": Point(4099, 512, 256, 32, 4, "balanced"),
    "top-2": Point(4096, 512, 256, 32, 2, "balanced"),
    "GEMM-bound": Point(2048, 1024, 1024, 8, 2, "balanced"),
}


FIRST = next(iter(POINTS))


def weights_and_tokens(point: Point, dtype: torch.dtype) -> tuple[peers.Weights, Tensor]:
    """A token's first E numbers are its logits: the experts' ranks, drawn by what each draws, which
    every dtype holds exactly. No rounding then sends a token to another expert."""
    T, H, ffn, E, _, _ = point
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) / math.sqrt(size[-1])

    router = torch.eye(E, H)
    tokens = normal(T, H) * math.sqrt(H)
    gumbel = -torch.rand(T, E, generator=generator).log().neg().log()
    ranks = (point.shares().log() + gumbel).argsort(dim=-1).argsort(dim=-1)
    tokens[:, :E] = (ranks - E // 2) / 4
    weights = peers.Weights(router, normal(E, 2 * ffn, H), normal(E, H, ffn))
    return peers.Weights(*(w.to(dtype) for w in weights)), tokens.to(dtype)


def exact(weights: peers.Weights, tokens: Tensor, mix: Tensor) -> Tensor:
    """Experts mixed by mix [T, E], in its dtype."""
    out = torch.zeros_like(tokens)
    for e, (up, down) in enumerate(zip(weights.up, weights.down, strict=True)):
        index = mix[:, e].nonzero().squeeze(1)
        gate, linear = F.linear(tokens[index], up).chunk(2, dim=-1)
        rows = F.linear(F.silu(gate) * linear, down) * mix[index, e, None]
        out = out.index_add(0, index, rows)
    return out


def normalized(weights: peers.Weights, tokens: Tensor, top_k: int) -> Tensor:
    """[T, E]: every token's weights of its experts."""
    top = F.linear(tokens, weights.router).softmax(-1).topk(top_k)
    chosen = top.values / top.values.sum(-1, keepdim=True)
    return torch.zeros(len(tokens), len(weights.router)).to(tokens).scatter(1, top.indices, chosen)


class Case:
    """Weights, tokens, what is right, and one forward and backward of a layer."""

    def __init__(self, point: Point, dtype: torch.dtype) -> None:
        self.point = point
        self.weights, self.tokens = weights_and_tokens(point, dtype)
        self.tokens.requires_grad_()
        self.grad = torch.randn(self.tokens.shape, generator=torch.Generator().manual_seed(1))
        self.grad = self.grad.to(dtype)
        self.wide = peers.Weights(*(w.double() for w in self.weights))
        tokens = self.tokens.detach().double().requires_grad_()
        leaves = [w.requires_grad_() for w in self.wide]
        mix = normalized(self.wide, tokens, point.top_k)
        self.out = exact(self.wide, tokens, mix)
        self.grads = torch.autograd.grad(self.out, [tokens, *leaves], self.grad.double())
        self.out, self.wide = self.out.detach(), peers.Weights(*(w.detach() for w in leaves))
        self.load = mix.detach().count_nonzero(0).tolist()

    def step(self, layer: nn.Module) -> Tensor:
        self.tokens.grad = None
        layer.zero_grad(set_to_none=True)
        out = layer(self.tokens)
        out.backward(self.grad)
        return out

    def error(self, layer: nn.Module) -> float:
        """The largest relative error of the output and the gradients."""
        out = self.step(layer).detach().double()
        mix = getattr(layer, "weights_of", None)
        if mix is not None:  # a choice of its own
            right = exact(self.wide, self.tokens.detach().double(), mix.double())
            return float((out - right).norm() / right.norm())
        grads = [self.tokens.grad, *peers.gradients(layer, self.weights)]
        pairs = [(out, self.out), *zip(grads, self.grads, strict=True)]
        return max(float((got.double() - right).norm() / right.norm()) for got, right in pairs)


def why_not(
    peer: peers.Peer, point: Point, dtype: torch.dtype, largest_load: int, longest: float
) -> str | None:
    """What keeps a peer from this point."""
    rows = point.tokens * point.top_k
    if peer.name == "fairscale" and (point.top_k != 2 or point.tokens % point.num_experts):
        return "is for K = 2 and T a multiple of E"
    if peer.name == "fairscale" and dtype != torch.float32:
        return "its gate is for float32"
    needs = 0
    if peer.name == "Hugging Face batched_mm":  # a weight for every row, and its gradient
        needs = 2 * 3 * rows * point.hidden * point.ffn * dtype.itemsize
    if peer.name == "DeepSpeed dense":  # masks [T, E, C] and their products
        mask = point.tokens * point.num_experts * largest_load
        products = 3 * 2 * 2 * mask * point.hidden
        if products > longest * SPEED:
            return f"multiplies {products / 1e12:.1f} TFLOP"
        needs = 4 * mask * 4
    if needs > MOST_BYTES:
        return f"needs {needs / 2**30:.0f} GiB"
    return peer.missing(torch.device("cpu"))


def measure(
    point: Point,
    dtype: torch.dtype,
    threads: int,
    budget: float,
    longest: float = 2.0,
    keeps_freed: bool = True,
) -> dict:
    torch.set_num_threads(threads)
    case = Case(point, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    timers, errors, excluded = {}, {}, {}
    for peer in [peers.OURS, *peers.LAYERS]:
        if reason := why_not(peer, point, dtype, max(case.load), longest):
            excluded[peer.name] = reason
            continue
        layer = peer.make(case.weights, point.top_k)
        errors[peer.name] = case.error(layer)
        if not errors[peer.name] <= tolerance:
            raise AssertionError(f"{peer.name}: relative error {errors[peer.name]:.2g}")
        timer = clock(case.step, [(layer,)])
        if (seconds := next(timer)) > longest and peer is not peers.OURS:
            excluded[peer.name] = f"took {seconds:.1f} s"
        else:
            timers[peer.name] = timer
    if not keeps_freed:
        memory.give_back_large()
        memory.fetch()
    bound = gemm_bound(case.load, case.weights.up, case.weights.down)
    timers["bound"] = iter(bound, None)
    taken = compare(timers, budget, rounds=3)
    ours = taken[peers.OURS.name]
    of_all = spreads(taken)
    return {
        "threads": threads,
        "seconds": {name: s._asdict() for name, s in of_all.items()},
        "ratio": {
            name: ratio(ours, theirs)._asdict()
            for name, theirs in taken.items()
            if name not in (peers.OURS.name, "bound")
        },
        "of_bound": of_all["bound"].median / of_all[peers.OURS.name].median,
        "relative_error": errors,
        "excluded": excluded,
    }


def measure_all(
    chosen: list[tuple[str, int]], dtype: torch.dtype, options: argparse.Namespace
) -> list[dict]:
    """For every (point, threads)."""
    results = []
    keeps = not options.new_memory
    for label, threads in (bar := tqdm(chosen, unit="point", leave=False)):
        bar.set_postfix_str(label)
        point = POINTS[label]
        (memory.keep_freed if keeps else memory.give_back)()
        found = measure(point, dtype, threads, options.seconds, options.longest, keeps)
        results.append({"point": label, **point._asdict(), **found})
        bar.write(lines(label, point, found))
    return results


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--point", nargs="*", choices=list(POINTS), help="only these")
    parser.add_argument("--threads", nargs="*", type=positive, default=[torch.get_num_threads()])
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing for each layer")
    parser.add_argument("--longest", type=float, default=2.0, help="seconds of a peer's step")
    parser.add_argument("--new-memory", action="store_true", help="do not reuse what was freed")
    parser.add_argument("--name", help="of the file among the results, also of a part")
    parser.add_argument("--out", type=Path, help="the JSON file, wherever")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    dtype = getattr(torch, options.dtype)
    report = setting(torch.device("cpu")) | {
        "moe_ext": moe_ext.__version__,
        "dtype": options.dtype,
        "reuses_freed_memory": not options.new_memory,
        "points": [],
    }
    # Where all are run the first shows what threads change.
    chosen = [
        (name, threads)
        for name in options.point or POINTS
        for threads in (options.threads if options.point or name == FIRST else options.threads[-1:])
    ]
    # In one process: to load the other libraries takes longer than to time them.
    report["points"] = memory.in_new_process(measure_all, chosen, dtype, options)
    suffix = "-new-memory" if options.new_memory else ""
    whole = None if options.point else f"layer-{options.dtype}{suffix}"
    keep(report, options.name or whole, options.out)


def lines(label: str, point: Point, result: dict) -> str:
    T, H, ffn, E, K, _ = point
    ours = result["seconds"][peers.OURS.name]["median"] * 1e3
    text = [
        f"{label}: T{T} H{H} F{ffn} E{E} K{K}, {result['threads']} threads: {ours:.1f} ms, "
        f"{result['of_bound']:.0%} of the GEMM bound"
    ]
    for name, of_peer in sorted(result["ratio"].items(), key=lambda item: item[1]["median"]):
        milliseconds = result["seconds"][name]["median"] * 1e3
        text.append(
            f"  {name:26}{milliseconds:9.1f} ms {of_peer['median']:6.2f}x "
            f"({of_peer['fast']:.2f} to {of_peer['slow']:.2f})"
        )
    text += [f"  {name:26} {reason}" for name, reason in result["excluded"].items()]
    return "\n".join(text)


if __name__ == "__main__":
    main()
