"""Experts in 8 and 4 bits on one thread, beside our bfloat16 and torch's packed products.

    python bench/bench_quantised.py [--shape OLMoE ...] [--tokens 1 16 512] [--threads 1] [--peers]

Times SwiGLU experts for choices that change from call to call, so that no cache holds the weights,
which are in huge pages. torch's products of packed weights run expert after expert. Every result is
compared first with the product of its own dequantized numbers. "GB/s" counts the chosen experts'
bytes once, and "of reading" is their share of the rate at which a dot product reads weights.
--peers times ggml, ONNX Runtime and KTransformers instead of torch's, where they are installed
(quantised_peers.py). After a run of all shapes it writes quantised-bfloat16.json, or
quantised-peers.json, to bench/results/<machine>.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import quantised_peers
import torch
from bench_decode import SHAPES, Shape
from common import keep, parser, positive, relative_error, require, setting
from layer_peers import our_experts
from report import quantised_table
from timing import clock, compare_with, read
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import moe_ext
from moe_ext import GroupedExperts, QuantizedWeight

OURS = "bfloat16"
# Arguments of QuantizedWeight.quantize.
FORMATS = {
    "int8": {"format": "int8"},
    "int4, groups of 64": {"format": "int4", "group_size": 64},
    "int4, groups of 32, zero points": {"format": "int4", "group_size": 32, "zero_points": True},
    "mxfp4": {"format": "mxfp4"},
    "nf4": {"format": "nf4"},
    "int8, int8 tokens": {"format": "int8", "activations": "int8"},
    "int4, int8 tokens": {"format": "int4", "group_size": 64, "activations": "int8"},
}
TORCH_INT8, TORCH_INT4 = "torch's int8", "torch's int4, groups of 64"
SETS = 32


class Call(NamedTuple):
    """Tokens of one call and their experts."""

    tokens: Tensor
    plan: moe_ext.Plan
    weights: Tensor


class _Torchs(nn.Module):
    """Products of torch, expert after expert; a subclass multiplies rows by a packed weight."""

    multiply: Callable[[Tensor, int, str], Tensor]

    def forward(self, tokens: Tensor, plan: moe_ext.Plan, weights: Tensor) -> Tensor:
        out = torch.zeros_like(tokens)
        routes, K = plan.sources.long(), weights.shape[1]
        offsets = plan.offsets.tolist()
        for e, (begin, end) in enumerate(itertools.pairwise(offsets)):
            if begin == end:
                continue
            mine = routes[begin:end]
            gate, linear = self.multiply(tokens[mine // K], e, "up").chunk(2, dim=-1)
            rows = self.multiply(F.silu(gate) * linear, e, "down")
            out.index_add_(0, mine // K, rows * weights.flatten()[mine, None].to(rows.dtype))
        return out


class TorchInt8(_Torchs):
    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        for name, weight in (("up", up), ("down", down)):
            packed = QuantizedWeight.quantize(weight, "int8")
            self.register_buffer(name, packed.values.detach().view(torch.int8))
            self.register_buffer(f"{name}_scales", packed.scales.detach().squeeze(-1).bfloat16())

    def numbers(self) -> tuple[Tensor, Tensor]:
        return tuple(
            getattr(self, n).float() * getattr(self, f"{n}_scales").float().unsqueeze(-1)
            for n in ("up", "down")
        )

    def multiply(self, rows: Tensor, e: int, name: str) -> Tensor:
        scales = getattr(self, f"{name}_scales")[e]
        return torch.ops.aten._weight_int8pack_mm(rows, getattr(self, name)[e], scales)


class TorchInt4(_Torchs):
    GROUP = 64

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        self.exact = []
        for name, weight in (("up", up), ("down", down)):
            found = QuantizedWeight.quantize(weight, "int4", self.GROUP)
            self.exact.append(found.dequantize(torch.bfloat16))
            whole = moe_ext.formats.codes.unpack(found.values).to(torch.int32)
            self.register_buffer(name, torch.stack([pack(w, 1) for w in whole]))
            scales = found.scales.detach().transpose(1, 2)
            both = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()
            self.register_buffer(f"{name}_scales", both)

    def numbers(self) -> tuple[Tensor, Tensor]:
        return tuple(self.exact)

    def multiply(self, rows: Tensor, e: int, name: str) -> Tensor:
        weight, scales = getattr(self, name)[e], getattr(self, f"{name}_scales")[e]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weight, self.GROUP, scales)


class Peer(nn.Module):
    """A peer's experts; `numbers` are those that it makes of the weights, each time anew."""

    def __init__(self, peer, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.peer, self.weights = peer, (up, down)
        self.nbytes = peer.bytes_per_weight * (up.numel() + down.numel())

    def numbers(self) -> tuple[Tensor, Tensor]:
        return tuple(map(self.peer.rounded, self.weights))

    def forward(self, tokens: Tensor, plan: moe_ext.Plan, weights: Tensor) -> Tensor:
        return self.peer.run(tokens, plan.expert_ids, weights)


def numbers_of(module: nn.Module) -> tuple[Tensor, ...]:
    """The numbers that a module's weights stand for: [E, 2F, H] and [E, H, F]."""
    if not isinstance(module, GroupedExperts):
        return module.numbers()
    weights = module.gate_up_proj, module.down_proj
    return tuple(w.dequantize() if isinstance(w, QuantizedWeight) else w for w in weights)


def bytes_of(module: nn.Module) -> float:
    if isinstance(module, Peer):
        return module.nbytes
    return sum(t.nbytes for t in [*module.parameters(), *module.buffers()])


def implementations(shape: Shape, peers: bool) -> Iterator[tuple[str, nn.Module]]:
    H, ffn, E, K = shape
    generator = torch.Generator().manual_seed(0)

    def weight(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) / size[-1] ** 0.5).bfloat16()

    up, down = weight(E, 2 * ffn, H), weight(E, H, ffn)
    yield OURS, our_experts(up, down)
    for name, options in FORMATS.items():
        yield name, our_experts(up, down).quantize(**options)
    if peers:
        for name, why in quantised_peers.available().items():
            if why is None:
                yield name, Peer(quantised_peers.PEERS[name](up, down, K), up, down)
            else:
                print(f"{name} is left out: {why}")
        return
    yield TORCH_INT8, TorchInt8(up, down)
    yield TORCH_INT4, TorchInt4(up, down)


def calls(shape: Shape, tokens: int) -> list[Call]:
    generator = torch.Generator().manual_seed(1)
    H, _, E, K = shape
    found = []
    for _ in range(SETS):
        ids = torch.rand(tokens, E, generator=generator).topk(K).indices.int()
        hidden = torch.randn(tokens, H, generator=generator).bfloat16()
        found.append(Call(hidden, moe_ext.make_plan(ids, E), torch.full((tokens, K), 1 / K)))
    return found


def check(name: str, module: nn.Module, call: Call) -> None:
    """Compare with the experts of the numbers that the weights stand for."""
    up, down = (w.float() for w in numbers_of(module))
    tokens, plan, weights = call
    exact = moe_ext.feed_forward(tokens.float(), plan, weights, up, down, "swiglu")
    # Most peers round tokens to 8 bits.
    most = 0.03 if "tokens" in name or isinstance(module, Peer) else 0.01
    require(name, relative_error(module(*call), exact), most)


@torch.no_grad()
def measure(shape: Shape, tokens: list[int], seconds: float, peers: bool = False) -> list[dict]:
    made = dict(implementations(shape, peers))
    for name, module in made.items():
        check(name, module, calls(shape, 3)[0])
        if hasattr(module, "exact"):
            del module.exact
        moe_ext.huge_pages(module)
    if peers:
        quantised_peers.huge_pages()
    stack = made[OURS].gate_up_proj.view(torch.float32)

    def read_chosen(_tokens: Tensor, plan: moe_ext.Plan, _weights: Tensor) -> float:
        """Read the chosen experts' weights once."""
        return sum(float(read(stack[e])) for e in plan.expert_ids.unique().tolist())

    results = []
    for count in tokens:
        sets = calls(shape, count)
        timers = {
            name: clock(module, sets) for name, module in (made | {"reading": read_chosen}).items()
        }
        found = compare_with(OURS, timers, seconds)
        chosen = sum(len(call.plan.expert_ids.unique()) for call in sets) / len(sets)
        size = {n: bytes_of(module) / shape.num_experts for n, module in made.items()}
        rate = {n: chosen * of / found["seconds"][n] / 1e9 for n, of in size.items()}
        read_bytes = chosen * stack[0].nbytes
        rate["reading"] = read_bytes / found["seconds"].pop("reading") / 1e9
        found["ratio"].pop("reading")
        results.append({**shape._asdict(), "tokens": count, **found, "gigabytes": rate})
    return results


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, seconds=2.0)
    options.add_argument("--shape", nargs="*", default=[*SHAPES][:2], choices=[*SHAPES])
    options.add_argument("--tokens", nargs="*", type=positive, default=[1, 16, 512])
    options.add_argument("--threads", type=positive, default=1)
    options.add_argument("--peers", action="store_true")
    options = options.parse_args(arguments)
    report = setting(torch.device("cpu")) | {"threads": options.threads, "shapes": {}}
    torch.set_num_threads(options.threads)
    for label in tqdm(options.shape, unit="shape", leave=False):
        found = measure(SHAPES[label], options.tokens, options.seconds, options.peers)
        report["shapes"][label] = found
    print(quantised_table(report))
    is_whole = options.shape == [*SHAPES][:2]
    name = "quantised-peers" if options.peers else "quantised-bfloat16"
    keep(report, name if is_whole else None, options.out)


if __name__ == "__main__":
    main()
