"""Pictures, with matplotlib, as PNG files; their colours are told apart by colour-blind readers."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .stats import LayerStats, Reading

# Okabe and Ito's palette.
COLOURS = ("#0072B2", "#D55E00", "#56B4E9", "#E69F00", "#009E73", "#CC79A7")
# From few to many: its brightness rises evenly.
SCALE = "cividis"
DOTS_PER_INCH = 130
# Numbers are written into a heat-map of so many columns, and names beside so many rows.
MOST_NUMBERS, MOST_NAMES = 16, 40


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=DOTS_PER_INCH)
    plt.close(figure)


def plot_curves(curves: dict[str, list[tuple[float, float]]], path: Path, ylabel: str) -> None:
    """A line for every named list of (step, value); the legend gives the last values.

    The first half of the lines is solid, the second dotted.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for i, (name, points) in enumerate(curves.items()):
        if points:
            steps, values = zip(*points, strict=True)
            style = "-" if i < len(curves) / 2 else ":"
            label = f"{name}: {values[-1]:.3f}"
            axes.plot(steps, values, style, label=label, color=COLOURS[i % len(COLOURS)], lw=1.8)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_load(shares: dict[str, Sequence[float]], path: Path) -> None:
    """A heat-map of layer by expert. shares: by layer, of its routes, [E] each; 1 / E is even."""
    load = [list(row) for row in shares.values()]
    layers, experts = len(load), len(load[0])
    even = 1 / experts
    width = 0.7 * experts if experts <= MOST_NUMBERS else min(0.12 * experts, 14)
    height = 0.6 * layers if layers <= MOST_NUMBERS else min(0.25 * layers, 12)
    figure, axes = plt.subplots(figsize=(2.6 + width, 1.6 + height), layout="constrained")
    image = axes.imshow(
        load, cmap=SCALE, vmin=0, vmax=2 * even, aspect="auto", interpolation="none"
    )
    if experts <= MOST_NUMBERS:
        for layer, row in enumerate(load):
            for expert, share in enumerate(row):
                colour = "white" if share < even else "black"
                label = "idle" if share == 0 else f"{100 * share:.0f}%"
                axes.text(expert, layer, label, ha="center", va="center", color=colour)
    _name_layers(axes, list(shares))
    if experts <= MOST_NUMBERS:
        axes.set_xticks(range(experts))
    axes.set_xlabel("expert")
    axes.set_title(f"share of routes; even is {100 * even:.1f}%")
    _explain_shares(figure, image, even)
    _save(figure, path)


def _explain_shares(figure, image, even: float) -> None:
    bar = figure.colorbar(image, extend="max")
    bar.set_ticks([0, even, 2 * even], labels=["0", "even", "twice even"])


def _name_layers(axes, names: list[str]) -> None:
    every = -(-len(names) // MOST_NAMES)
    axes.set_yticks(range(0, len(names), every), names[::every])
    axes.set_ylabel("layer")


def plot_over_time(
    steps: Sequence[int], shares: Sequence[Sequence[float]], path: Path, name: str
) -> None:
    """A layer's load by step and expert. shares: [steps][E]; equal steps are readings in a row."""
    table = torch.tensor([list(row) for row in shares], dtype=torch.float64).t()
    experts, count = table.shape
    even = 1 / experts
    height = min(1.6 + 0.22 * experts, 9)
    figure, axes = plt.subplots(figsize=(7.5, max(height, 3)), layout="constrained")
    image = axes.imshow(
        table.tolist(), cmap=SCALE, vmin=0, vmax=2 * even, aspect="auto", interpolation="none"
    )
    marks = sorted({round(i * (count - 1) / 6) for i in range(7)})
    axes.set_xticks(marks, [str(steps[i]) for i in marks])
    if experts <= MOST_NUMBERS:
        axes.set_yticks(range(experts))
    axes.set_xlabel("step")
    axes.set_ylabel("expert")
    axes.set_title(f"{name}: share of routes; even is {100 * even:.1f}%")
    _explain_shares(figure, image, even)
    _save(figure, path)


def plot_sorted(shares: dict[str, Sequence[float]], path: Path) -> None:
    """Every layer's load from the busiest expert down, over the even share: flat at 1 is even, and
    where a line ends at zero experts are idle. Up to six layers have colours and names; of more,
    the least and the most even."""
    uneven = {name: max(row) * len(row) for name, row in shares.items()}
    named = sorted(uneven, key=lambda name: uneven[name])
    if len(named) > len(COLOURS):
        named = [named[0], named[-1]]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, row in shares.items():
        values = [share * len(row) for share in sorted(row, reverse=True)]
        ranks = [(i + 0.5) / len(row) for i in range(len(row))]
        if name in named:
            colour = COLOURS[named.index(name)]
            axes.plot(ranks, values, color=colour, lw=1.8, label=name, zorder=3)
        else:
            axes.plot(ranks, values, color="0.8", lw=0.8, zorder=1)
    axes.axhline(1, color="black", lw=0.8, ls="--", label="even")
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("experts, busiest first (share of all)")
    axes.set_ylabel("load over the even share")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_pairs(layer: LayerStats, path: Path, name: str) -> None:
    """Which experts a token chooses together, over what it would be if its choices were drawn by
    load alone: above 1 the two attract each other. layer: a detailed one"""
    lift = co_routing(layer.pairs)
    experts = len(lift)
    size = 2.2 + min(max(0.3 * experts, 2.5), 8)
    figure, axes = plt.subplots(figsize=(size + 1, size), layout="constrained")
    axes.set_facecolor("0.85")
    # Blue and red differ in brightness from the middle alike.
    image = axes.imshow(lift.tolist(), cmap="RdBu_r", vmin=0, vmax=2, interpolation="none")
    if experts <= MOST_NUMBERS:
        axes.set_xticks(range(experts))
        axes.set_yticks(range(experts))
    axes.set_xlabel("expert")
    axes.set_ylabel("expert")
    axes.set_title(f"{name}: chosen together, 1 as if by chance")
    figure.colorbar(image, extend="max", shrink=0.8)
    _save(figure, path)


def co_routing(pairs: Tensor) -> Tensor:
    """How often two experts are chosen together, over the mean that pairs would have if each drew
    by its load. [E, E], NaN on the diagonal and where an expert is idle."""
    together = pairs.double().clone().fill_diagonal_(0)
    load = together.sum(dim=1)
    expected = load.unsqueeze(0) * load.unsqueeze(1)
    expected.fill_diagonal_(0)
    expected *= together.sum() / expected.sum()
    return torch.where(expected > 0, together / expected, torch.nan)


def plot_run(readings: Sequence[tuple[int, Reading]], folder: Path) -> list[Path]:
    """All pictures of a run, from readings with their steps; returns the files.

    load.png, sorted.png: of the last reading; over-time.png: of its least even layer; pairs.png: of
    that layer, from detailed readings. Training, where there is any, else evaluation.
    """
    mode = "train" if any(reading.train for _, reading in readings) else "eval"
    of_mode = [(step, getattr(reading, mode)) for step, reading in readings]
    of_mode = [(step, layers) for step, layers in of_mode if layers]
    if not of_mode:
        raise ValueError("plot_run: no layer was called in any reading")
    last = of_mode[-1][1]
    shares = {name: layer.shares.tolist() for name, layer in last.items()}
    worst = max(last, key=lambda name: last[name].max_over_mean)
    paths = [folder / "load.png", folder / "sorted.png"]
    plot_load(shares, paths[0])
    plot_sorted(shares, paths[1])
    history = [(step, layers[worst].shares.tolist()) for step, layers in of_mode if worst in layers]
    if len(history) > 1:
        paths.append(folder / "over-time.png")
        plot_over_time(*zip(*history, strict=True), paths[-1], worst)
    if last[worst].pairs is not None and len(last[worst].load) > 1:
        paths.append(folder / "pairs.png")
        plot_pairs(last[worst], paths[-1], worst)
    return paths
