"""See experts fall idle, and what helps: the same model trained with and without a balance.

    python examples/watch_experts.py --steps 300

Every fifty steps it prints what the experts were asked for; `python -m moe_ext plot` draws the file
that it leaves. Without a balance a few experts take all, which the loss does not show.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import moe_ext
from moe_ext.sinks import JsonLines

WIDTH, EXPERTS, BATCH = 32, 16, 512
BALANCES = ("none", "loss", "bias")


def layer_of(balance: str) -> moe_ext.MOELayer:
    gate = moe_ext.TopKGate(
        WIDTH,
        EXPERTS,
        k=2,
        drop_tokens=False,
        top2_2nd_expert_sampling=False,
        selection_bias=balance == "bias",
    )
    return moe_ext.MOELayer(gate, moe_ext.GroupedExperts(EXPERTS, WIDTH, WIDTH))


def train(balance: str, steps: int, out: Path) -> float:
    """The loss at the end. Writes out/<balance>.jsonl."""
    torch.manual_seed(0)
    layer = layer_of(balance)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), layer, nn.Linear(WIDTH, WIDTH))
    teacher = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sink = JsonLines(out / f"{balance}.jsonl")
    sink.path.unlink(missing_ok=True)
    with moe_ext.stats.track(model, detailed=True) as stats:
        for step in tqdm(range(1, steps + 1), desc=balance, unit="step"):
            tokens = torch.randn(BATCH, WIDTH) + 1
            with torch.no_grad():
                wanted = teacher(tokens)
            loss = F.mse_loss(model(tokens), wanted)
            optimizer.zero_grad()
            (loss + (0.01 * layer.l_aux if balance == "loss" else 0)).backward()
            optimizer.step()
            if balance == "bias":
                layer.gate.update_bias(layer.exp_counts, rate=1e-2)
            if step % 50 == 0 or step == steps:
                reading = stats.read()
                sink(reading, step)
                tqdm.write(f"balance: {balance}, step {step}, loss {loss.item():.4f}\n{reading}\n")
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("watch-experts-out"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    losses = {balance: train(balance, options.steps, options.out) for balance in BALANCES}
    print("\n".join(f"balance {name:5} loss {loss:.4f}" for name, loss in losses.items()))
    print(f"python -m moe_ext plot {options.out / 'none.jsonl'}    draws one of them")


if __name__ == "__main__":
    main()
