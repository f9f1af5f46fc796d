"""Forward and backward of a layer, or of experts alone, beside other libraries' with equal weights.

    python bench/bench_layer.py [--dtype bfloat16] [--point NAME ...] [--threads 1 2]
    python bench/bench_layer.py [--small | --capacity 1.25 | --experts] [--forward] [--memory]
    python bench/bench_layer.py --shape T H F E K [--load zipf]

Layers route by themselves; with --experts the routing is given, and the peers are transformers'
implementations of Mixtral's experts. With --capacity tokens are dropped, and outputs alone are
checked, by what each gate kept. --small times layers of few tokens, in which calls take as
long as products; --forward, evaluation alone. Output and gradients of each are checked against
float64 before it is timed. "Bound" is the time of the experts' matrix products alone by torch
(gemm_bound.py). The process keeps freed memory (memory.py); --new-memory gives large blocks back.
Peers that are missing, too slow or too large for memory are named. Prints a table and, after a run
of all points, writes bench/results/<machine>/layer-, small- or experts-<dtype>.json.
"""

import argparse
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import layer_peers
import memory
import torch
from common import keep, parser, positive, relative_error, require, setting
from gemm_bound import gemm_bound
from layer_peers import Weights
from peers import Peer
from report import points_table
from timing import clock, compare_with
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

# A peer with masks is left out if its products would take longer than --longest at this speed.
MOST_BYTES, SPEED = 8 << 30, 2e11


# The share of all tokens that each expert draws, by its place. [E]
LOADS: dict[str, Callable[[Tensor], Tensor]] = {
    "balanced": torch.ones_like,
    "zipf": lambda place: 1 / (place + 1),
    "one hot expert": lambda place: torch.where(place == 0, 1e4, 1.0),
    "half of the experts empty": lambda place: torch.where(place < len(place) // 2, 1.0, 1e-9),
}


class Point(NamedTuple):
    tokens: int
    hidden: int
    ffn: int
    num_experts: int
    top_k: int
    load: str = "balanced"

    def shares(self) -> Tensor:
        return LOADS[self.load](torch.arange(self.num_experts, dtype=torch.float32))


LAYER_POINTS = {
    "balanced": Point(4096, 512, 256, 32, 4),
    "zipf": Point(4096, 512, 256, 32, 4, "zipf"),
    "one hot expert": Point(4096, 512, 256, 32, 4, "one hot expert"),
    "empty experts": Point(4096, 512, 256, 32, 4, "half of the experts empty"),
    "ragged": Point(4099, 512, 256, 32, 4),
    "top-2": Point(4096, 512, 256, 32, 2),
    "GEMM-bound": Point(2048, 1024, 1024, 8, 2),
}
SMALL_POINTS = {
    "one token": Point(1, 64, 64, 8, 2),
    "one token, all experts": Point(1, 64, 64, 8, 8),
    "32 tokens": Point(32, 128, 256, 8, 2),
    "128 tokens": Point(128, 128, 128, 16, 2),
    "256 tokens": Point(256, 256, 256, 16, 4),
}
EXPERTS_POINTS = {
    "few": Point(256, 512, 512, 8, 2),
    "few, skewed": Point(256, 512, 512, 8, 2, "zipf"),
    "short": Point(256, 1024, 512, 16, 4),
    "narrow": Point(512, 512, 512, 32, 4),
    "fine-grained": Point(512, 512, 512, 64, 8),
    "fine-grained, skewed": Point(512, 512, 512, 64, 8, "zipf"),
    "wide": Point(1024, 512, 1024, 16, 2),
    "middle": Point(1024, 1024, 512, 32, 4),
    "middle, skewed": Point(1024, 1024, 512, 32, 4, "zipf"),
    "Mixtral-like": Point(2048, 1024, 1024, 8, 2),
    "Mixtral-like, skewed": Point(2048, 1024, 1024, 8, 2, "zipf"),
    "Qwen-like": Point(2048, 512, 1024, 64, 8),
}


def exact(weights: Weights, tokens: Tensor, mix: Tensor) -> Tensor:
    """Plain experts, mixed by mix [T, E]."""
    out = torch.zeros_like(tokens)
    for e, (up, down) in enumerate(zip(weights.up, weights.down, strict=True)):
        index = mix[:, e].nonzero().squeeze(1)
        rows = layer_peers.swiglu(tokens[index], up, down)
        out = out.index_add(0, index, rows * mix[index, e, None])
    return out


class Solution(NamedTuple):
    """Output, gradients, weights and load in float64."""

    out: Tensor
    grads: tuple[Tensor, ...]
    weights: Weights
    load: list[int]


class Case:
    """Weights, tokens, the right results, and one forward and backward of a module."""

    def __init__(self, point: Point, dtype: torch.dtype, of_experts: bool = False) -> None:
        T, H, ffn, E, K, _ = self.point = point
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator) / math.sqrt(size[-1])

        # A token's first E numbers are its logits: ranks, which every dtype holds exactly. So no
        # rounding sends a token to another expert.
        tokens = normal(T, H) * math.sqrt(H)
        gumbel = -torch.rand(T, E, generator=generator).log().neg().log()
        ranks = (point.shares().log() + gumbel).argsort(dim=-1).argsort(dim=-1)
        tokens[:, :E] = (ranks - E // 2) / 4
        up, down = normal(E, 2 * ffn, H).to(dtype), normal(E, H, ffn).to(dtype)
        self.expert_ids = ranks.topk(K).indices if of_experts else None
        # Experts take weights in float32, as a router gives them.
        router = torch.rand(T, K, generator=generator) if of_experts else torch.eye(E, H).to(dtype)
        self.weights = Weights(router, up, down)
        self.tokens = tokens.to(dtype).requires_grad_()
        self.grad = torch.randn(T, H, generator=generator).to(dtype)

    @functools.cached_property
    def solution(self) -> Solution:
        tokens = self.tokens.detach().double().requires_grad_()
        wide = Weights(*(w.double().requires_grad_() for w in self.weights))
        mix = self._mix(wide, tokens)
        out = exact(wide, tokens, mix)
        grads = torch.autograd.grad(out, [tokens, *wide], self.grad.double())
        load = mix.detach().count_nonzero(0).tolist()
        return Solution(out.detach(), grads, Weights(*(w.detach() for w in wide)), load)

    def _mix(self, weights: Weights, tokens: Tensor) -> Tensor:
        """Weights of each token's experts, 0 elsewhere. [T, E]"""
        ids, chosen = self.expert_ids, weights.router
        if ids is None:
            top = F.linear(tokens, weights.router).softmax(-1).topk(self.point.top_k)
            ids, chosen = top.indices, top.values / top.values.sum(-1, keepdim=True)
        return torch.zeros(len(tokens), self.point.num_experts).to(tokens).scatter(1, ids, chosen)

    def make(self, peer: Peer) -> nn.Module:
        routing = self.point.top_k if self.expert_ids is None else self.expert_ids
        return peer.make(self.weights, routing)

    def step(self, layer: nn.Module) -> Tensor:
        self.tokens.grad = None
        layer.zero_grad(set_to_none=True)
        out = layer(self.tokens)
        out.backward(self.grad)
        return out

    @torch.no_grad()
    def evaluate(self, layer: nn.Module) -> Tensor:
        return layer(self.tokens)

    def error(self, layer: nn.Module) -> float:
        """The largest relative error of the output and the gradients."""
        out, right = self.step(layer).detach(), self.solution
        if hasattr(layer, "weights_of"):  # a gate that samples, or drops tokens
            tokens = self.tokens.detach()
            mix = layer.weights_of(tokens).detach()
            pairs = [(out, exact(right.weights, tokens.double(), mix.double()))]
        else:
            grads = [self.tokens.grad, *layer_peers.gradients(layer, self.weights)]
            pairs = [(out, right.out), *zip(grads, right.grads, strict=True)]
        return max(relative_error(*pair) for pair in pairs)

    def checked(self, peer: Peer) -> tuple[nn.Module, float]:
        """The peer's module and its error. Raises if that is too large."""
        layer = self.make(peer)
        error = self.error(layer)
        require(peer.name, error, 1e-5 if self.tokens.dtype == torch.float32 else 0.03)
        return layer, error


def why_not(
    peer: Peer,
    point: Point,
    dtype: torch.dtype,
    largest_load: int,
    longest: float,
    others: int = 0,
    drops: bool = False,
) -> str | None:
    """Why a peer is left out at this point, or None.

    others: layers that stay in memory. drops: whether a capacity drops tokens; the check of
    DeepSpeed's output then makes masks [T, E, C].
    """
    rows = point.tokens * point.top_k
    if peer.name == "fairscale" and (point.top_k != 2 or point.tokens % point.num_experts):
        return "needs K = 2 and T a multiple of E"
    if peer.name == "fairscale" and dtype != torch.float32:
        return "needs float32"
    needs = 0
    if peer.name.endswith("batched_mm"):  # a weight for every row, and its gradient
        needs = 2 * 3 * rows * point.hidden * point.ffn * dtype.itemsize
    if peer.name == "DeepSpeed dense" or (peer.name == "DeepSpeed" and drops):
        mask = point.tokens * point.num_experts * largest_load  # [T, E, C]
        products = 3 * 2 * 2 * mask * point.hidden  # of masks and rows
        if peer.name == "DeepSpeed dense" and products > longest * SPEED:
            return f"would take {products / 1e12:.1f} TFLOP"
        needs = 4 * mask * 4
    if needs > MOST_BYTES:
        return f"needs {needs / 2**30:.0f} GiB"
    needs += bytes_of_weights(point, dtype, others + 1)
    if needs > memory.limit():
        return f"needs {needs / 2**30:.0f} GiB with those before it"
    return peer.missing(torch.device("cpu"))


def bytes_of_weights(point: Point, dtype: torch.dtype, layers: int) -> int:
    """Bytes of the weights, of their copies and gradients in so many layers, and in float64 of the
    solution's weights and gradients and of as many temporaries of the comparison."""
    numbers = 3 * point.num_experts * point.hidden * point.ffn
    return numbers * ((1 + 2 * layers) * dtype.itemsize + 4 * 8)


def peers_of(of_experts: bool, capacity_factor: float | None = None) -> list[Peer]:
    if capacity_factor is not None:
        return layer_peers.layers_with_capacity(capacity_factor)
    return layer_peers.EXPERTS if of_experts else layer_peers.LAYERS


def measure(
    point: Point,
    dtype: torch.dtype,
    threads: int,
    budget: float,
    longest: float = 2.0,
    keeps_freed: bool = True,
    of_experts: bool = False,
    forward_alone: bool = False,
    capacity_factor: float | None = None,
) -> dict:
    torch.set_num_threads(threads)
    case = Case(point, dtype, of_experts)
    load = case.solution.load
    timers, errors, excluded = {}, {}, {}
    ours, *_ = everyone = peers_of(of_experts, capacity_factor)
    drops = capacity_factor is not None
    largest = math.ceil(sum(load) / len(load) * capacity_factor) if drops else max(load)
    for peer in everyone:
        if reason := why_not(peer, point, dtype, largest, longest, len(timers), drops):
            if peer is ours:
                raise MemoryError(f"{point} {reason}")
            excluded[peer.name] = reason
            continue
        layer, errors[peer.name] = case.checked(peer)
        if forward_alone:
            layer.eval()
        timer = clock(case.evaluate if forward_alone else case.step, [(layer,)])
        if (seconds := next(timer)) > longest and peer is not ours:
            excluded[peer.name] = f"took {seconds:.1f} s"
            layer = timer = None
        else:
            timers[peer.name] = timer
    if not keeps_freed:
        memory.give_back_large()
        memory.fetch()
    if not forward_alone and capacity_factor is None:
        timers["bound"] = gemm_bound(load, case.weights.up, case.weights.down)
    found = compare_with(ours.name, timers, budget, rounds=3)
    rest = {"relative_error": errors, "excluded": excluded}
    if found["ratio"].pop("bound", None):
        rest["of_bound"] = found["seconds"]["bound"] / found["seconds"][ours.name]
    return {"threads": threads, **found, **rest}


def growth(point: Point, dtype: torch.dtype, of_experts: bool, name: str) -> int:
    """Bytes by which this process grows in a forward and backward."""
    case = Case(point, dtype, of_experts)
    layer = case.make(next(peer for peer in peers_of(of_experts) if peer.name == name))
    case.step(layer)
    layer.zero_grad(set_to_none=True)
    case.tokens.grad = None
    return memory.growth(lambda: case.step(layer))


def measure_all(
    chosen: list[tuple[str, Point, int]], dtype: torch.dtype, options: argparse.Namespace
) -> list[dict]:
    """A result for each (label, point, threads)."""
    results = []
    keeps, of_experts = not options.new_memory, options.experts
    for label, point, threads in (bar := tqdm(chosen, unit="point", leave=False)):
        bar.set_postfix_str(label)
        (memory.keep_freed if keeps else memory.give_back)()
        found = measure(
            *(point, dtype, threads, options.seconds, options.longest, keeps, of_experts),
            *(options.forward, options.capacity),
        )
        if options.memory:
            found["growth_bytes"] = {
                name: memory.in_new_process(growth, point, dtype, of_experts, name)
                for name in found["seconds"]
                if name != "bound"
            }
        results.append({"point": label, **point._asdict(), **found})
    return results


def own_point(parse: argparse.ArgumentParser, options: argparse.Namespace) -> Point:
    """The point of --shape."""
    point = Point(*options.shape, options.load)
    if not point.top_k <= point.num_experts <= point.hidden:
        parse.error(f"--shape needs K <= E <= H, as H holds a token's logits, got {options.shape}")
    if (needs := bytes_of_weights(point, getattr(torch, options.dtype), 1)) > memory.limit():
        parse.error(f"--shape needs {needs / 2**30:.0f} GiB of memory, got {options.shape}")
    if point.top_k == 1 and not options.experts:
        parse.error("--shape with K = 1 needs --experts: layers differ in the weight of one expert")
    return point


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parse = parser(__doc__, seconds=3.0)
    parse.add_argument("--experts", action="store_true", help="experts alone, not whole layers")
    parse.add_argument("--small", action="store_true", help="layers of few tokens")
    parse.add_argument("--forward", action="store_true", help="evaluation, without gradients")
    text = "layers that drop tokens beyond so many times an expert's mean share"
    parse.add_argument("--capacity", type=float, metavar="FACTOR", help=text)
    parse.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parse.add_argument(
        "--point", nargs="*", choices=[*LAYER_POINTS, *SMALL_POINTS, *EXPERTS_POINTS]
    )
    text = "one shape of your own: tokens, widths, experts, experts of a token"
    parse.add_argument("--shape", nargs=5, type=positive, metavar=tuple("THFEK"), help=text)
    parse.add_argument("--load", choices=LOADS, default="balanced", help="of --shape")
    parse.add_argument("--threads", nargs="*", type=positive, default=[torch.get_num_threads()])
    text = "leave a peer out if a step takes more seconds (2.0)"
    parse.add_argument("--longest", type=float, default=2.0, help=text)
    parse.add_argument("--new-memory", action="store_true", help="give freed memory back")
    parse.add_argument("--memory", action="store_true", help="also measure how a process grows")
    parse.add_argument("--name", help="name of the result file, also for some points only")
    options = parse.parse_args(arguments)
    options.points = EXPERTS_POINTS if options.experts else LAYER_POINTS
    if options.small:
        options.points = SMALL_POINTS
    if options.shape:
        options.points = {"own": own_point(parse, options)}
        options.point = options.point or ["own"]
    if unknown := set(options.point or ()) - set(options.points):
        parse.error(f"--point must be one of {', '.join(options.points)}, got {unknown.pop()}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    dtype = getattr(torch, options.dtype)
    report = setting(torch.device("cpu")) | {
        "dtype": options.dtype,
        "reuses_freed_memory": not options.new_memory,
        "capacity_factor": options.capacity,
        "points": [],
    }
    # The first point is measured with every number of threads, the others with the last one.
    first = next(iter(options.points))
    chosen = [
        (name, options.points[name], threads)
        for name in options.point or options.points
        for threads in (options.threads if options.point or name == first else options.threads[-1:])
    ]
    # All points in one process: loading the other libraries takes longer than timing them.
    report["points"] = memory.in_new_process(measure_all, chosen, dtype, options)
    print(points_table(report))
    timed = {peer for point in report["points"] for peer in point["ratio"]}
    for point in report["points"]:
        for peer, why in point["excluded"].items():
            if peer not in timed:  # it has no column
                label = f"{point['point']}, threads {point['threads']}"
                print(f"{label}: without {peer}, which {why}")
    kind = "small" if options.small else "experts" if options.experts else "layer"
    kind += "-forward" * options.forward + "-capacity" * (options.capacity is not None)
    suffix = "-new-memory" if options.new_memory else ""
    whole = None if options.point else f"{kind}-{options.dtype}{suffix}"
    keep(report, options.name or whole, options.out)


if __name__ == "__main__":
    main()
