"""Readings of the statistics: load per expert and derived numbers, as values and as text."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MODES = ("train", "eval")
SCARCE = 0.1  # a part of the even share

# Height tells the load: colours differ between terminals, and between readers.
BARS = "▁▂▃▄▅▆▇█"
IDLE = "·"


class LayerStats(NamedTuple):
    """One layer in one mode, between two readings. Tensors are on the CPU.

    `importance` and the attributes after it exist only if detailed=True and the layer knows its
    router; otherwise they are None.

    Attributes:
        tokens: routed tokens
        calls: forward calls
        load: [E] int64, routes that asked for an expert, before dropping
        kept: [E] int64, routes that got a row; at most load
        l_aux: mean over the calls that have a loss, not scaled. None if no call had one, as in
            transformers' models, which compute their own
        importance: [E] float64, mean score of every expert; 1 / E if even
        router_entropy: mean entropy of a token's scores over log E; 1 = uniform, 0 = one-hot
        z_loss: mean of logsumexp(logits) ** 2
        agreement: share of choices that are among the best K by the router's logits. It is below 1
            with RSample, a sampled second expert, a selection bias, groups, Sinkhorn or a recorded
            choice
        pairs: [E, E] int64, tokens that chose both experts; on the diagonal, the expert itself.
            None also for more than 32 choices per token
    """

    tokens: int
    calls: int
    load: Tensor
    kept: Tensor
    l_aux: float | None = None
    importance: Tensor | None = None
    router_entropy: float | None = None
    z_loss: float | None = None
    agreement: float | None = None
    pairs: Tensor | None = None

    @property
    def shares(self) -> Tensor:
        """[E] float64, each expert's part of the layer's routes; 1 / E if even."""
        return self.load.double() / max(int(self.load.sum()), 1)

    @property
    def dropped(self) -> float:
        """Share of routes without a row, 0 to 1."""
        asked = int(self.load.sum())
        return 1 - int(self.kept.sum()) / asked if asked else 0.0

    @property
    def max_over_mean(self) -> float:
        """Largest load over mean load; 1 if even, E if one expert has all."""
        return float(self.shares.max() * len(self.load))

    @property
    def cv(self) -> float:
        """Coefficient of variation of the load; 0 if even."""
        return float(self.shares.std(correction=0) * len(self.load))

    @property
    def load_entropy(self) -> float:
        """Entropy of the shares over log E; 1 if even, 0 if one expert has all."""
        return float(torch.special.entr(self.shares).sum()) / math.log(max(len(self.load), 2))

    @property
    def dead(self) -> list[int]:
        """Experts that no token asked for."""
        return (self.load == 0).nonzero().flatten().tolist()

    @property
    def scarce(self) -> list[int]:
        """Experts with less than a tenth of the even share, including idle ones."""
        return (self.shares * len(self.load) < SCARCE).nonzero().flatten().tolist()

    def scalars(self) -> dict[str, float]:
        """The scalar numbers by name, without those that are None."""
        names = ["max_over_mean", "cv", "load_entropy", "dropped"]
        names += ["l_aux", "router_entropy", "z_loss", "agreement"]
        values = {name: getattr(self, name) for name in names} | {"dead": float(len(self.dead))}
        return {name: value for name, value in values.items() if value is not None}


class Reading(NamedTuple):
    """The statistics of a model between two readings. Prints as a table and a heat map.

    Attributes:
        train: the layers that were called in training, by name, in the order of the model
        eval: the layers that were called in evaluation
    """

    train: dict[str, LayerStats]
    eval: dict[str, LayerStats]

    def scalars(self, *, per_layer: bool = False) -> dict[str, float]:
        """Return numbers by name, as `wandb.log` takes them.

        Args:
            per_layer: `train/moe/<layer>/<number>` for every layer; otherwise the mean over the
                layers and the worst of them, which are as many for any number of layers
        """
        values: dict[str, float] = {}
        for mode, layers in self._asdict().items():
            found = {name: layer.scalars() for name, layer in layers.items()}
            if per_layer:
                for name, numbers in found.items():
                    values |= {f"{mode}/moe/{name}/{what}": n for what, n in numbers.items()}
                continue
            for what in dict.fromkeys(what for numbers in found.values() for what in numbers):
                all_of_it = [numbers[what] for numbers in found.values() if what in numbers]
                values[f"{mode}/moe/{what}"] = sum(all_of_it) / len(all_of_it)
                if what in ("max_over_mean", "dropped", "dead"):
                    values[f"{mode}/moe/{what}_worst"] = max(all_of_it)
        return values

    def __str__(self) -> str:
        tables = [_table(mode, layers) for mode, layers in self._asdict().items() if layers]
        return "\n\n".join(tables) or "nothing was counted since the last reading"


def text_heatmap(shares: Mapping[str, Sequence[float]], columns: int = 64) -> str:
    """Draw a line for every layer, with a bar for every expert.

    A layer with more experts than `columns` takes several lines.

    Args:
        shares: by layer, [E] each, an expert's part of the layer's routes
        columns: experts per line
    """
    width = max(map(len, shares), default=0)
    lines = []
    for name, row in shares.items():
        bars = "".join(_bar(share, len(row)) for share in row)
        pieces = [bars[i : i + columns] for i in range(0, len(bars), columns)]
        lines += [f"{name if i == 0 else '':{width}}  {p}" for i, p in enumerate(pieces)]
    legend = (
        f"a bar for an expert: {BARS[3]} an even share, {BARS[-1]} twice that or more, {IDLE} none"
    )
    return "\n".join([*lines, legend])


def _bar(share: float, num_experts: int) -> str:
    if share == 0:
        return IDLE
    level = round(share * num_experts * len(BARS) / 2)
    return BARS[min(max(level, 1), len(BARS)) - 1]


def _table(mode: str, layers: dict[str, LayerStats]) -> str:
    width = max(len(mode), *map(len, layers))
    lines = [f"{mode:{width}}  max/mean     cv  dropped  idle or scarce experts"]
    for name, layer in layers.items():
        lines.append(
            f"{name:{width}}  {layer.max_over_mean:8.2f} {layer.cv:6.2f} {layer.dropped:8.1%}  "
            f"{_neglected(layer)}"
        )
    shares = {name: layer.shares.tolist() for name, layer in layers.items()}
    return "\n".join([*lines, f"{text_heatmap(shares)}; scarce: below a tenth of even"])


def _neglected(layer: LayerStats) -> str:
    dead = layer.dead
    scarce = [expert for expert in layer.scarce if expert not in dead]
    kinds = (("idle", dead), ("scarce", scarce))
    return "; ".join(f"{kind}: {_listed(ids)}" for kind, ids in kinds if ids) or "none"


def _listed(ids: list[int], most: int = 8) -> str:
    more = f" and {len(ids) - most} more" if ids[most:] else ""
    return ", ".join(map(str, ids[:most])) + more
