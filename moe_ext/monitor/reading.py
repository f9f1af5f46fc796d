"""What stats.read gives: how evenly a layer's experts were asked, in numbers, as text."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .heatmap import text_heatmap

MODES = ("train", "eval")
SCARCE = 0.1  # of the even share


class LayerStats(NamedTuple):
    """One layer in one mode, between two readings. Tensors are on the host.

    From importance on the attributes are None unless they were counted, with detailed=True, and
    where the layer does not know its router.

    Attributes:
        tokens: routed tokens
        calls: forward calls
        load: [E] int64, routes that asked for an expert
        kept: [E] int64, those that got a row, load at most
        l_aux: mean over the calls that have one, not scaled; None where the layer knows of none, as
            in transformers' models, which compute their own
        importance: [E] mean score of every expert, 1 / E if even
        router_entropy: mean entropy of a token's scores over log E: 1 = uniform, 0 = one-hot
        z_loss: mean of logsumexp(logits) ** 2
        agreement: share of choices that are among the best K by the router's logits: less than 1
            with RSample, a sampled second expert, a selection bias, groups, Sinkhorn or a recorded
            choice
        pairs: [E, E] int64, tokens that chose both experts; the diagonal is of one. None also for
            more than 32 choices per token.
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
        """[E] float64, of the layer's routes; 1 / E if even."""
        return self.load.double() / max(int(self.load.sum()), 1)

    @property
    def dropped(self) -> float:
        """Share of routes without a row."""
        asked = int(self.load.sum())
        return 1 - int(self.kept.sum()) / asked if asked else 0.0

    @property
    def max_over_mean(self) -> float:
        """The largest load over the mean: 1 if even, E if one expert has all."""
        return float(self.shares.max() * len(self.load))

    @property
    def cv(self) -> float:
        """The load's coefficient of variation: 0 if even."""
        return float(self.shares.std(correction=0) * len(self.load))

    @property
    def load_entropy(self) -> float:
        """The entropy of the shares over log E: 1 if even, 0 if one expert has all."""
        return float(torch.special.entr(self.shares).sum()) / math.log(max(len(self.load), 2))

    @property
    def dead(self) -> list[int]:
        """Experts that no token asked for."""
        return (self.load == 0).nonzero().flatten().tolist()

    @property
    def scarce(self) -> list[int]:
        """Experts with less than a tenth of the even share, idle ones too."""
        return (self.shares * len(self.load) < SCARCE).nonzero().flatten().tolist()

    def scalars(self) -> dict[str, float]:
        """The single numbers by name, without those that are None."""
        names = ("max_over_mean", "cv", "load_entropy", "dropped")
        values = {name: getattr(self, name) for name in names} | {"dead": float(len(self.dead))}
        optional = ("l_aux", "router_entropy", "z_loss", "agreement")
        known = {name: getattr(self, name) for name in optional}
        return values | {name: value for name, value in known.items() if value is not None}


class Reading(NamedTuple):
    """What `Stats.read` gives. Printed as a table and a heat-map.

    Attributes:
        train: layers by name, in the order of the model, in training. One that was not called is
            left out.
        eval: the same in evaluation
    """

    train: dict[str, LayerStats]
    eval: dict[str, LayerStats]

    def scalars(self, *, per_layer: bool = False) -> dict[str, float]:
        """Numbers by name, as `wandb.log` takes them.

        Args:
            per_layer: `train/moe/<layer>/<what>` for every layer; otherwise the mean over the
                layers and the worst of them, as many numbers however many layers there are
        """
        values: dict[str, float] = {}
        for mode, layers in zip(self._fields, self, strict=True):
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
        tables = [
            _table(mode, layers) for mode, layers in zip(self._fields, self, strict=True) if layers
        ]
        return "\n\n".join(tables) or "nothing was counted since the last reading"


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
