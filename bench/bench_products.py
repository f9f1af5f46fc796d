"""The experts' products on a GPU, beside torch's, a dense product's and other libraries'.

    python bench/bench_products.py [--shape qwen3 ...] [--dtype bfloat16]

Prints TFLOP/s, launches included, of every product of a layer's experts for a random choice of
experts: ours on tensor cores, torch's grouped_mm, and one dense product with as many operations,
whose weights are those of one expert. Then of all experts, forward and with gradients, beside
libraries for GPUs (gpu_peers.py) where they are installed; SonicMoE routes by itself, so its router
is in its times. Our products are compared with torch's first, and experts with each other. Products
that reach less than their card's goal of the dense rate are named at the end. Writes
bench/results/<machine>/products-<dtype>.json.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from unittest import mock

import gpu_peers
import torch
from bench_gpu import SHAPES, passes
from bench_layer import Point
from common import keep, parser, relative_error, require, setting
from layer_peers import Weights, our_experts
from report import markdown
from timing import spreads, timer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import moe_ext
from moe_ext.ops import tensor_cores, torch_grouped_mm

# Shares of the dense rate, by a part of the card's name.
GOALS = {"A100": 0.70, "RTX 4090": 0.75, "RTX 5090": 0.75}
OVER_TORCHS_LOOP = 2.5
MOST_ERROR = 0.02
OURS, TORCH, DENSE = "ours", "torch", "dense"


class Case(NamedTuple):
    operations: float
    calls: dict[str, Callable]


class Operands(NamedTuple):
    """Tensors of one layer: rows lie expert after expert, as the plan says."""

    shape: Point
    tokens: Tensor  # [T, H]
    weights: Weights  # whose router is the routes' weights, [T, K]
    plan: moe_ext.Plan
    rows: Tensor  # [R, H]
    inner: Tensor  # [R, 2F]


def operands_of(shape: Point, dtype: torch.dtype, device: torch.device) -> Operands:
    def random(*size: int) -> Tensor:
        return (torch.randn(*size, device=device) / size[-1] ** 0.5).to(dtype)

    T, H, ffn, E, K, _ = shape
    expert_ids = torch.rand(T, E, device=device).topk(K).indices.int()
    up, down = random(E, 2 * ffn, H), random(E, H, ffn)
    weights = Weights(torch.rand(T, K, device=device), up, down)
    plan = moe_ext.make_plan(expert_ids, E)
    return Operands(shape, random(T, H), weights, plan, random(T * K, H), random(T * K, 2 * ffn))


def product(name: str, device: torch.device) -> Callable:
    """Ours on tensor cores; where none are, the operator as the device has it."""
    if tensor_cores.is_built(device.type):
        return tensor_cores.operator(name)
    return getattr(torch.ops.moe_ext, name).default


def mm_case(o: Operands, rows: Tensor, weights: Tensor) -> Case:
    """rows[R, M] times the weights [E, N, M] of their experts."""
    plan, ours = o.plan, product("grouped_mm", rows.device)
    calls = {
        OURS: partial(ours, rows, weights, None, plan.offsets, plan.load, None),
        TORCH: partial(F.grouped_mm, rows, weights.mT, offs=plan.offsets[1:]),
        DENSE: partial(torch.mm, rows, weights[0].mT),
    }
    return Case(2 * rows.numel() * weights.shape[1], calls)


def outer_case(o: Operands, left: Tensor, right: Tensor) -> Case:
    """The gradient of weights: left[R, N] and right[R, M] to [E, N, M]."""
    plan, ours = o.plan, product("grouped_outer", left.device)
    calls = {
        OURS: partial(ours, left, right, plan.offsets, plan.load, None),
        TORCH: partial(F.grouped_mm, left.mT, right, offs=plan.offsets[1:]),
        DENSE: partial(torch.mm, left.mT, right),
    }
    return Case(2 * left.numel() * right.shape[1], calls)


def products(o: Operands) -> dict[str, Case]:
    """Every product of feed_forward and its backward, of rows that are in place."""
    active = o.inner[:, : o.shape.ffn].contiguous()
    return {
        "up": mm_case(o, o.rows, o.weights.up),
        "down": mm_case(o, active, o.weights.down),
        "down, gradient of rows": mm_case(o, o.rows, o.weights.down.mT),
        "up, gradient of rows": mm_case(o, o.inner, o.weights.up.mT),
        "down, gradient of weights": outer_case(o, o.rows, active),
        "up, gradient of weights": outer_case(o, o.inner, o.rows),
    }


class _Ours(nn.Module):
    def __init__(self, o: Operands) -> None:
        super().__init__()
        self.plan, self.weights = o.plan, nn.Parameter(o.weights.router.clone())
        self.experts = our_experts(o.weights.up, o.weights.down)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.experts(tokens, self.plan, self.weights)


def modules(o: Operands) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """All experts, by each library; and who is missing, with what it needs."""
    made: dict[str, nn.Module] = {OURS: _Ours(o)}
    missing = {}
    router = torch.randn(o.shape.num_experts, o.shape.hidden).to(o.tokens)
    for peer in (*gpu_peers.EXPERTS, *gpu_peers.LAYERS):
        routing, weights = o.plan.expert_ids, o.weights
        if peer in gpu_peers.LAYERS:
            routing, weights = o.shape.top_k, weights._replace(router=router)
        if needs := peer.missing(o.tokens.device):
            missing[peer.name] = needs
            continue
        try:
            made[peer.name] = peer.make(weights, routing)
            made[peer.name](o.tokens)
        except Exception as error:  # whatever a library says of a card or a shape
            made.pop(peer.name, None)
            missing[peer.name] = f"{type(error).__name__}: {str(error)[:80]}"
    return made, missing


def experts(o: Operands, made: dict[str, nn.Module]) -> dict[str, Case]:
    tokens = o.tokens.detach().requires_grad_()
    times = 6 * o.rows.numel() * o.shape.ffn
    forward, with_gradients = Case(times, {}), Case(3 * times, {})
    for name, module in made.items():
        forward.calls[name], with_gradients.calls[name] = passes(module, tokens)
    for name in made.keys() - {peer.name for peer in gpu_peers.LAYERS}:  # those route by themselves
        error = relative_error(forward.calls[name](), forward.calls[OURS]())
        require(name, error, MOST_ERROR)
    return {"experts": forward, "experts with gradients": with_gradients}


# Our products, even where a layer would choose torch's.
@mock.patch.object(torch_grouped_mm, "NATIVE_MAJORS", ())
def measure(shape: Point, dtype: torch.dtype, device: torch.device, seconds: float) -> dict:
    """{products: {name: {TFLOP/s of each}}, missing}"""
    o = operands_of(shape, dtype, device)
    made, missing = modules(o)
    rates = {}
    for name, case in (products(o) | experts(o, made)).items():
        if TORCH in case.calls:
            error = relative_error(case.calls[OURS](), case.calls[TORCH]())
            require(name, error, MOST_ERROR)
        timers = {who: timer(call, [()], device) for who, call in case.calls.items()}
        taken = spreads(timers, seconds)
        rates[name] = {who: case.operations / s.median / 1e12 for who, s in taken.items()}
    return {**o.shape._asdict(), "teraflops": rates, "missing": missing}


def table(label: str, run: dict) -> str:
    rates = run["teraflops"]
    names = list(dict.fromkeys(who for of_one in rates.values() for who in of_one))
    rows = [
        [name, *(f"{of_one[who]:.3g}" if who in of_one else "-" for who in names)]
        for name, of_one in rates.items()
    ]
    missing = "".join(f"\n{name}: {why}" for name, why in run["missing"].items())
    return markdown([f"{label}, TFLOP/s", *names], rows) + missing


def missed(machine: str, runs: dict[str, dict], torch_loops: bool) -> list[str]:
    """Lines for the products that are below the goals of this card."""
    goal = next((goal for card, goal in GOALS.items() if card in machine), 0.0)
    torch_goal = OVER_TORCHS_LOOP if torch_loops else 0.0
    found = []
    for label, run in runs.items():
        for name, rates in run["teraflops"].items():
            if DENSE in rates and (share := rates[OURS] / rates[DENSE]) < goal:
                found.append(f"{label}, {name}: {share:.0%} of the dense rate, not {goal:.0%}")
            if TORCH in rates and (factor := rates[OURS] / rates[TORCH]) < torch_goal:
                found.append(f"{label}, {name}: {factor:.2f}x torch's loop, not {torch_goal}")
    return found


def loops(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's grouped_mm takes one expert after another."""
    rows = torch.empty(0, 64, dtype=dtype, device=device)
    return torch_grouped_mm.choose(rows, (64, 64), 8, None)[0] != "native"


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, seconds=1.0)
    options.add_argument("--shape", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    options.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    options.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    options = options.parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    report = setting(device) | {"dtype": options.dtype, "shapes": {}}
    for label in (bar := tqdm(options.shape, unit="shape", leave=False)):
        run = measure(SHAPES[label], dtype, device, options.seconds)
        report["shapes"][label] = run
        bar.write(table(label, run) + "\n")
    torch_loops = device.type == "cuda" and loops(dtype, device)
    lines = missed(report["machine"], report["shapes"], torch_loops)
    print("\n".join(lines) or "no goal is missed")
    is_whole = options.shape == list(SHAPES)
    keep(report, f"products-{options.dtype}" if is_whole else None, options.out)


if __name__ == "__main__":
    main()
