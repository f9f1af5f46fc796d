"""A small GPT with experts, in one file: train it on Python's own sources, then let it write.

    python examples/train_gpt.py --steps 1000

Every block's feed-forward is a MOELayer of eight experts, of which a byte meets two. The loss is
the next byte's, and a hundredth of each layer's l_aux, which keeps the experts in use. Ctrl-C ends
the training and keeps what was learnt.
"""

import argparse
import math
import random
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import moe_ext

CONTEXT, WIDTH, HEADS, LAYERS, EXPERTS = 64, 128, 4, 2, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)
        gate = moe_ext.TopKGate(
            WIDTH,
            EXPERTS,
            k=2,
            drop_tokens=False,
            normalize="before",
            top2_2nd_expert_sampling=False,
        )
        self.moe = moe_ext.MOELayer(gate, moe_ext.GroupedExperts(EXPERTS, WIDTH, 2 * WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        B, L, _ = hidden.shape
        q, k, v = self.qkv(self.norm1(hidden)).view(B, L, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + self.proj(mixed.transpose(1, 2).reshape(B, L, WIDTH))
        return hidden + self.moe(self.norm2(hidden))


class GPT(nn.Module):
    """Bytes [B, L] int64 -> logits of the next byte [B, L, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.embed(text) + self.position[: text.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


def python_sources(limit: int = 4_000_000) -> Tensor:
    """Bytes of the standard library. [limit] int64."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(files)
    text = b"".join(path.read_bytes() for path in files)[:limit]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def train(model: GPT, text: Tensor, steps: int, batch: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps + 1)
    windows = text.unfold(0, CONTEXT + 1, 1)
    for step in (bar := tqdm(range(steps), unit="step", disable=None)):
        sample = windows[torch.randint(len(windows), (batch,))]
        logits = model(sample[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), sample[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + 0.01 * moe_ext.total_l_aux(model)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(bits=f"{loss.item() / math.log(2):.3f}")
        if step in (0, steps - 1):
            tqdm.write(f"step {step}: {loss.item() / math.log(2):.4f} bits per byte")


@torch.no_grad()
def write(model: GPT, prompt: str, length: int) -> str:
    model.eval()
    text = torch.tensor([list(prompt.encode())])
    for _ in range(length):
        logits = model(text[:, -CONTEXT:])[:, -1]
        text = torch.cat([text, torch.multinomial((logits / 0.7).softmax(-1), 1)], dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--write", type=int, default=300, help="bytes to write at the end")
    options = parser.parse_args()
    torch.manual_seed(0)
    model, text = GPT(), python_sources()
    stats = moe_ext.stats.track(model)
    try:
        train(model, text, options.steps, options.batch)
    except KeyboardInterrupt:
        print("interrupted")
    print(stats.read())
    print(write(model, "def ", options.write))


if __name__ == "__main__":
    main()
