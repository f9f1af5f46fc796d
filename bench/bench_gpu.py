"""A layer on a GPU: checked, then timed beside its products alone, as torch makes them.

    python bench/bench_gpu.py [--shape qwen3 ...]

Prints microseconds and TFLOP/s, launches included: of the whole layer in bfloat16 without dropping,
and of torch's grouped_mm on rows that are in place. A layer that reaches less than LIMIT of the
products is named at the end, as are operators of ops-bfloat16.json below LIMIT of a copy. Writes
bench/results/<machine>/layer-bfloat16.json.
"""

import copy
import json
from collections.abc import Callable

import torch
from bench_layer import Point
from common import RESULTS, keep, parser, setting, slug
from layer_peers import our_layer
from report import markdown
from timing import spreads, timer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from moe_ext import MOELayer

LIMIT = 0.8
ROW_OPERATORS = {"dispatch", "combine", "route_dot", "combine_backward"}
ROW_OPERATORS |= {"activate, swiglu", "activate, gelu"}

SHAPES = {
    "mixtral": Point(8192, 4096, 14336, 8, 2),
    "qwen3": Point(8192, 2048, 768, 128, 8),
    "olmoe": Point(8192, 2048, 1024, 64, 8),
    "decode": Point(64, 2048, 768, 128, 8),
}


def check(layer: MOELayer, hidden: Tensor) -> None:
    """Compare a few tokens with the layer in float64 on the CPU, for the same choice."""
    few = hidden[:4].detach()
    with torch.no_grad():
        out, aux = layer.forward_with_aux(few)
        wide = copy.deepcopy(layer).cpu().double()
        exact = wide(few.cpu().double(), expert_ids=aux.expert_ids.cpu())
    error = (out.cpu().double() - exact).abs().max() / exact.abs().max()
    if not error < 0.03:
        raise AssertionError(f"the layer's result is off by {error:.3g} of its largest")


def passes(module: nn.Module, tokens: Tensor) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """A forward without gradients, and a forward and backward."""
    grad = torch.randn_like(tokens)

    def forward() -> Tensor:
        with torch.no_grad():
            return module(tokens)

    def with_gradient() -> None:
        torch.autograd.grad(module(tokens), [tokens, *module.parameters()], grad)

    return forward, with_gradient


def calls(layer: MOELayer, hidden: Tensor, shape: Point) -> dict[str, Callable]:
    """{name: a call}. The products are of rows that lie expert after expert."""
    forward, with_gradient = passes(layer, hidden)
    up, down = layer.experts.gate_up_proj.detach(), layer.experts.down_proj.detach()
    with torch.no_grad():
        ends = layer.gate.route(hidden).plan.offsets[1:]
    rows = torch.randn(shape.tokens * shape.top_k, shape.hidden).to(hidden)

    def products() -> Tensor:
        inner = F.grouped_mm(rows, up.transpose(-1, -2), offs=ends)
        return F.grouped_mm(inner[:, : shape.ffn], down.transpose(-1, -2), offs=ends)

    return {"forward": forward, "products": products, "with gradient": with_gradient}


def measure(shape: Point, device: torch.device, seconds: float) -> dict:
    T, H, ffn, E, K, _ = shape
    layer = our_layer(E, H, ffn, K, drop_tokens=False).to(device, torch.bfloat16).eval()
    hidden = torch.randn(T, H, device=device, dtype=torch.bfloat16)
    hidden.requires_grad_()
    check(layer, hidden)
    timers = {name: timer(call, [()], device) for name, call in calls(layer, hidden, shape).items()}
    operations = 6 * T * K * H * ffn
    found = {}
    for name, spread in spreads(timers, seconds).items():
        times = operations * (3 if name == "with gradient" else 1)
        found[name] = {"seconds": spread.median, "teraflops": times / spread.median / 1e12}
    of_products = found["products"]["seconds"] / found["forward"]["seconds"]
    return {**shape._asdict(), "calls": found, "of_products": of_products}


def table(label: str, run: dict) -> str:
    rows = [
        [name, f"{call['seconds'] * 1e6:.1f}", f"{call['teraflops']:.1f}"]
        for name, call in run["calls"].items()
    ]
    return markdown([f"{label}: {run['of_products']:.0%} of the products", "us", "TFLOP/s"], rows)


def missed(runs: dict[str, dict], operators: dict) -> list[str]:
    """Lines for the layers and operators that are below their limit."""
    found = [
        f"{label}: the layer reaches {run['of_products']:.0%} of its products, not {LIMIT:.0%}"
        for label, run in runs.items()
        if run["of_products"] < LIMIT
    ]
    for run in operators.get("shapes", []):
        found += [
            f"{run['shape']}: {line['op']} reaches {line['of_copy']:.0%} of a copy, not {LIMIT:.0%}"
            for line in run["ops"]
            if line["of_copy"] < LIMIT and line["op"] in ROW_OPERATORS
        ]
    return found


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__, seconds=1.0)
    options.add_argument("--shape", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    options.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    options = options.parse_args(arguments)
    device = torch.device(options.device)
    report = setting(device) | {"shapes": {}}
    for label in (bar := tqdm(options.shape, unit="shape", leave=False)):
        report["shapes"][label] = measure(SHAPES[label], device, options.seconds)
        bar.write(table(label, report["shapes"][label]) + "\n")
    path = RESULTS / slug(report["machine"]) / "ops-bfloat16.json"
    operators = json.loads(path.read_text()) if path.exists() else {}
    print("\n".join(missed(report["shapes"], operators)) or "nothing misses its limit")
    keep(report, "layer-bfloat16" if options.shape == list(SHAPES) else None, options.out)


if __name__ == "__main__":
    main()
