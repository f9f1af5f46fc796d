"""Watch experts fall idle without load balancing, and compare with a balance loss and a bias.

    python examples/watch_experts.py --steps 300    # ten seconds on one core

Tokens come in sixteen kinds, each with its own linear map to learn: work for sixteen experts.
Every fifty steps the script prints the load of each expert. It writes the statistics to --out,
which `python -m moe_ext plot` draws. Without a balance half of the experts fall idle, the others
share their kinds, and the loss ends about twice as high.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import moe_ext
from moe_ext.monitor.sinks import JsonLines

WIDTH, EXPERTS, KINDS, BATCH = 32, 16, 16, 512
BALANCES = ("none", "loss", "bias")
# All tokens share this offset, which gives some experts a lead with every kind.
IN_COMMON = 1.25


def batch(centres: Tensor, maps: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Tokens around the centres of their kinds, and their targets, both [size, WIDTH]."""
    kinds = torch.randint(KINDS, (size,))
    tokens = centres[kinds] + 0.5 * torch.randn(size, WIDTH)
    return tokens, torch.einsum("ti,tij->tj", tokens, maps[kinds])


def train(balance: str, steps: int, seed: int, out: Path) -> float:
    """The loss on new tokens after training. Writes out/<balance>.jsonl."""
    torch.manual_seed(seed)
    has_bias = balance == "bias"
    gate = moe_ext.TopKGate(
        WIDTH, EXPERTS, k=2, drop_tokens=False, top2_2nd_expert_sampling=False, expert_bias=has_bias
    )
    layer = moe_ext.MOELayer(gate, moe_ext.GroupedExperts(EXPERTS, WIDTH, WIDTH))
    centres = torch.randn(KINDS, WIDTH) + IN_COMMON
    maps = torch.randn(KINDS, WIDTH, WIDTH) / WIDTH**0.5
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    sink = JsonLines(out / f"{balance}.jsonl")
    sink.path.unlink(missing_ok=True)
    with moe_ext.stats.track(layer, detailed=True) as stats:
        for step in tqdm(range(1, steps + 1), desc=balance, unit="step", disable=None):
            tokens, wanted = batch(centres, maps, BATCH)
            loss = F.mse_loss(layer(tokens), wanted)
            optimizer.zero_grad()
            (loss + (0.01 * layer.l_aux if balance == "loss" else 0)).backward()
            optimizer.step()
            if has_bias:
                gate.update_bias(layer.exp_counts, rate=1e-2)
            if step % 50 == 0 or step == steps:
                reading = stats.read()
                sink(reading, step)
                tqdm.write(f"balance: {balance}, step {step}, loss {loss.item():.4f}\n{reading}\n")
    tokens, wanted = batch(centres, maps, 8 * BATCH)
    with torch.no_grad():
        return F.mse_loss(layer.eval()(tokens), wanted).item()


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="training steps (300)")
    parser.add_argument("--seed", type=int, default=0, help="of torch's generator (0)")
    text = "folder of the statistics (watch-experts-out)"
    parser.add_argument("--out", type=Path, default=Path("watch-experts-out"), help=text)
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    options.out.mkdir(parents=True, exist_ok=True)
    losses = {name: train(name, options.steps, options.seed, options.out) for name in BALANCES}
    print("balance  loss on new tokens")
    print("\n".join(f"{name:7}  {loss:.4f}" for name, loss in losses.items()))
    print(f"to draw one of them: python -m moe_ext plot {options.out / 'none.jsonl'}")


if __name__ == "__main__":
    main()
