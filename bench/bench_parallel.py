"""Bytes and time of an exchange between ranks, beside the fewest bytes that must be sent.

    python bench/bench_parallel.py [--processes 2 4] [--tokens 512] [--seconds 1]

Ranks of a gloo group on this machine, bfloat16 tokens. Each way to exchange is checked against the
layer of one process first. docs/scaling.md defines the bytes and the least. Also times the
collective alone by size, for the model of bench/scaling.py. Prints a table and writes
bench/results/<machine>/parallel.json.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from common import keep, parser, positive, relative_error, require, setting
from layer_peers import our_layer
from report import markdown
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from moe_ext import ExpertParallel, MOELayer
from moe_ext.parallel import make_groups
from moe_ext.process_group import resolve

H, F, E = 512, 256, 32
DTYPE = torch.bfloat16


class Way(NamedTuple):
    """Options of ExpertParallel. nodes: 0, or the number of nodes of an exchange in two levels."""

    options: dict
    drop_tokens: bool = False
    nodes: int = 0


WAYS = {
    "a row per route": Way({}),
    "a token per rank": Way({"dedup": True}),
    "capacity 1.25": Way({}, True),
    "a row per route, in 2 parts": Way({"overlap": 2}),
    "a row per route, 2 nodes": Way({}, nodes=2),
    "a token per node and rank": Way({"dedup": True}, nodes=2),
}


class Bytes(TorchDispatchMode):
    """Counts the bytes that leave this rank, by group."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "_c10d_functional::all_to_all_single":
            data, _, splits, group = args
            others = sum(splits) - splits[resolve(group).rank()]
            self.sent[group] += others * data[0].nbytes if others else 0
        return func(*args, **kwargs or {})


def layer_of(way: Way, k: int) -> MOELayer:
    torch.manual_seed(0)
    dropping = {"drop_tokens": way.drop_tokens, "drop_policy": "position"}
    return our_layer(E, H, F, k, capacity_factor=1.25, **dropping).to(DTYPE)


def slowest(function: Callable[[], object]) -> float:
    """Seconds on the slowest rank."""
    dist.barrier()
    begin = time.perf_counter()
    function()
    taken = torch.tensor(time.perf_counter() - begin)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    return float(taken)


def measure(rank: int, way: Way, k: int, num_tokens: int, seconds: float) -> dict:
    world = dist.get_world_size()
    group = make_groups((way.nodes, world // way.nodes) if way.nodes else world).ep
    alone, layer = layer_of(way, k), layer_of(way, k)
    layer.experts = ExpertParallel.of(layer.experts, group, **way.options)
    generator = torch.Generator().manual_seed(1 + rank)
    x = torch.randn(num_tokens, H, generator=generator).to(DTYPE).requires_grad_()
    grad = torch.randn(num_tokens, H, generator=generator).to(DTYPE)

    def step(layer: MOELayer) -> tuple[Tensor, Tensor]:
        x.grad = None
        out = layer(x)
        out.backward(grad)
        return out.detach(), x.grad

    error = max(relative_error(*pair) for pair in zip(step(layer), step(alone), strict=True))
    require(f"rank {rank}", error, 0.02)
    with Bytes() as counted:
        step(layer)
    plan = layer.gate.route(x.detach()).plan
    owners = torch.where(plan.slots >= 0, plan.expert_ids // (E // world), rank)
    there = torch.zeros(num_tokens, world).scatter_(1, owners.long(), 1)
    there[:, rank] = 0
    times = []
    # All ranks see the same times, so they make equally many calls.
    while sum(times) < seconds or len(times) < 5:
        times.append(slowest(partial(step, layer)))
    places = group.get_all_groups()[1] if way.nodes else None
    return {
        "sent": sum(counted.sent.values()),
        "sent_inside_nodes": counted.sent[places.group_name] if places else None,
        "others_per_token": float(there.sum()) / num_tokens,
        "seconds": statistics.median(times),
        "relative_error": error,
    }


def collective(rank: int, seconds: float) -> list[tuple[int, float]]:
    """(bytes to each other rank, seconds) of all_to_all_single."""
    world, points = dist.get_world_size(), []
    for size in (2**i for i in range(8, 23, 2)):
        data = torch.ones(world * size, dtype=torch.uint8)
        out = torch.empty_like(data)
        call = partial(dist.all_to_all_single, out, data)
        times = [slowest(call) for _ in range(5 + int(seconds * 20))]
        points.append((size, statistics.median(times[2:])))
    return points


def cases_of(number: int, top_k: list[int]) -> list[tuple[int, str, Way]]:
    """(k, label, way) of all that this number of ranks can exchange."""
    return [
        (k, label, way)
        for k, (label, way) in itertools.product(top_k, WAYS.items())
        if not way.nodes or (number % way.nodes == 0 and number > way.nodes)
    ]


def measure_all(rank: int, options: argparse.Namespace) -> tuple[list, list[dict]]:
    """On one rank: the points of `collective`, and what `measure` finds for each case."""
    points = collective(rank, options.seconds)
    bar = tqdm(cases_of(dist.get_world_size(), options.top_k), leave=False, disable=rank > 0)
    return points, [measure(rank, way, k, options.tokens, options.seconds) for k, _, way in bar]


def fit(points: list[tuple[int, float]], others: int) -> dict:
    """Fit seconds = start + bytes sent / rate, by least squares of the relative error."""
    sizes, seconds = np.array(points).T
    per_byte, start = np.polyfit(sizes * others, seconds, 1, w=1 / seconds)
    errors = np.abs((start + sizes * others * per_byte) / seconds - 1)
    return {"start": start, "bytes_per_second": 1 / per_byte, "largest_error": errors.max()}


def on_processes(number: int, function, *args) -> list:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (number, folder, function, args), nprocs=number)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(number)]


def _process(rank: int, number: int, folder: str, function, args) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=number)
    try:
        torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def summary(found: list[dict], num_tokens: int) -> dict:
    tokens = num_tokens * len(found)
    per_token = sum(one["sent"] for one in found) / tokens
    least = 4 * sum(one["others_per_token"] for one in found) / len(found) * H * DTYPE.itemsize
    inside = [one["sent_inside_nodes"] for one in found]
    return {
        "bytes_per_token": per_token,
        "least_bytes_per_token": least,
        "of_least": per_token / least,
        "between_nodes_per_token": (None if None in inside else per_token - sum(inside) / tokens),
        "others_per_token": statistics.fmean(one["others_per_token"] for one in found),
        "seconds": max(one["seconds"] for one in found),
        "relative_error": max(one["relative_error"] for one in found),
    }


def main() -> None:
    parse = parser(__doc__, seconds=1.0)
    parse.add_argument("--processes", nargs="*", type=positive, default=[2, 4])
    parse.add_argument("--tokens", type=positive, default=512, help="tokens of each rank (512)")
    parse.add_argument("--top-k", nargs="*", type=positive, default=[1, 2, 4, 8])
    options = parse.parse_args()
    for number in options.processes:
        if number < 2 or E % number:
            parse.error(f"--processes must divide {E} experts and be at least 2, got {number}")
    report = setting(torch.device("cpu")) | {
        "shape": {"tokens": options.tokens, "hidden": H, "ffn": F, "num_experts": E},
        "collective": {},
        "points": [],
    }
    rows = []
    for number in options.processes:
        ranks = on_processes(number, measure_all, options)
        points, _ = ranks[0]
        report["collective"][number] = {"points": points, **fit(points, number - 1)}
        for i, (k, label, _) in enumerate(cases_of(number, options.top_k)):
            found = summary([cases[i] for _, cases in ranks], options.tokens)
            report["points"].append({"processes": number, "k": k, "way": label, **found})
            sent = f"{found['bytes_per_token'] / 1024:.2f}"
            least = f"{found['least_bytes_per_token'] / 1024:.2f}"
            times = f"{found['of_least']:.2f}x", f"{found['seconds'] * 1e3:.1f}"
            rows.append([f"{number}", f"{k}", label, sent, least, *times])
    print(markdown(["processes", "K", "exchange", "KiB/token", "least", "of least", "ms"], rows))
    keep(report, "parallel", options.out)


if __name__ == "__main__":
    main()
