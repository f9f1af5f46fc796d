"""A small GPT over bytes and its text, Python's own sources, for the demo."""

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width: int, heads: int, ffn: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.ffn = ffn

    def forward(self, hidden: Tensor) -> Tensor:
        B, L, H = hidden.shape
        q, k, v = self.qkv(self.norm1(hidden)).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + self.proj(mixed.transpose(1, 2).reshape(B, L, H))
        return hidden + self.ffn(self.norm2(hidden))


class GPT(nn.Module):
    """Bytes [B, L] int64 -> logits of the next byte [B, L, 256].

    make_ffn: makes the feed-forward of a block, [B, L, width] -> [B, L, width]. context: largest L.
    """

    def __init__(
        self, width: int, heads: int, layers: int, context: int, make_ffn: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(256, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(Block(width, heads, make_ffn()) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.embed(text) + self.position[: text.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


class Corpus(NamedTuple):
    """Bytes of whole files, uint8. No file is in both parts."""

    train: Tensor
    heldout: Tensor
    train_files: int
    heldout_files: int


def load_corpus(holdout: int = 10) -> Corpus:
    """The standard library's .py files without its tests. Every `holdout`-th file is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    texts = [path.read_bytes() for path in paths]

    def joined(files: list[bytes]) -> Tensor:
        return torch.frombuffer(bytearray(b"\n".join(files)), dtype=torch.uint8)

    heldout = texts[::holdout]
    train = [text for i, text in enumerate(texts) if i % holdout]
    return Corpus(joined(train), joined(heldout), len(train), len(heldout))


def windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Windows of `text`: inputs and the bytes that follow them, both [B, context] int64."""
    taken = text.unfold(0, context + 1, 1)[starts].long()
    return taken[:, :-1], taken[:, 1:]
