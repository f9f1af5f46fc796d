"""Draw readings as PNG files with matplotlib, in colours for colour-blind readers."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from .reading import Reading

# Okabe and Ito's palette.
COLOURS = ("#0072B2", "#D55E00", "#56B4E9", "#E69F00", "#009E73", "#CC79A7")
# The brightness of this scale rises evenly. Idle experts have a colour outside of it.
SCALE = colormaps["cividis"].with_extremes(under=COLOURS[1], bad="0.85")
LEAST = 1e-12
DOTS_PER_INCH = 130
# Above these numbers of columns and rows, a heat map has no numbers in it and not every name.
MOST_NUMBERS, MOST_NAMES = 16, 40
# Where chance gives nine pairs, one standard deviation is a third of them: fewer are noise.
FEW_PAIRS = 9


def _figure(width: float, height: float):
    # Not with pyplot, whose state belongs to the user, as in a notebook.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Figure, path: Path) -> None:
    # A $ in the name of a layer would begin a formula.
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def plot_curves(
    curves: dict[str, list[tuple[float, float]]], path: Path, title: str, ylabel: str
) -> None:
    """Draw a line for every curve; the legend gives the last values.

    The second half of the curves has the colours of the first half, dotted.

    Args:
        curves: points (step, value) by name
        path: the PNG file
        title: title of the picture
        ylabel: label of the vertical axis
    """
    figure, axes = _figure(7, 4.2)
    solid = -(-len(curves) // 2)
    for i, (name, points) in enumerate(curves.items()):
        if points:
            steps, values = zip(*points, strict=True)
            label, colour = f"{name}: {values[-1]:.3f} at the end", COLOURS[i % solid]
            style = "-" if i < solid else ":"
            axes.plot(steps, values, style, label=label, color=colour, lw=1.8, marker=".")
    axes.set(title=title, xlabel="training step", ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_load(shares: dict[str, Sequence[float]], path: Path, when: str) -> None:
    """Draw a heat map of layer by expert, on a scale up to twice the even share.

    Args:
        shares: by layer, [E] each, an expert's part of the layer's routes; E may differ
        path: the PNG file
        when: the time of the reading, for the title
    """
    experts = max(map(len, shares.values()))
    figure, axes = _map_of(list(shares), experts)
    over_even = [
        [share * len(row) for share in row] + [math.nan] * (experts - len(row))
        for row in shares.values()
    ]
    _heat_map(figure, axes, over_even)
    if experts <= MOST_NUMBERS:
        for layer, row in enumerate(shares.values()):
            for expert, share in enumerate(row):
                colour = "white" if share * len(row) < 1 else "black"
                label = f"{100 * share:.0f}%" if share > 0.005 else "<1%" if share else "idle"
                axes.text(expert, layer, label, ha="center", va="center", color=colour)
    axes.set_title(f"Load of each expert, % of its layer's token-expert pairs\n{when}")
    _save(figure, path)


def plot_errors(errors: Mapping[str, Sequence[float]], path: Path, title: str) -> None:
    """Draw a heat map of layer by expert, in % from no error to the largest.

    Args:
        errors: by layer, [E] each, of 1; NaN where an expert has none. E may differ
        path: the PNG file
        title: title of the picture
    """
    experts = max(map(len, errors.values()))
    figure, axes = _map_of(list(errors), experts)
    rows = [[*row] + [math.nan] * (experts - len(row)) for row in errors.values()]
    most = max((value for row in rows for value in row if value == value), default=0) or LEAST
    image = axes.imshow(rows, cmap=SCALE, vmin=0, vmax=most, aspect="auto", interpolation="none")
    figure.colorbar(image, label="error / norm", format=PercentFormatter(1))
    if experts <= MOST_NUMBERS:
        for layer, row in enumerate(rows):
            for expert, value in enumerate(row):
                if value == value:
                    colour = "white" if value < most / 2 else "black"
                    label = f"{100 * value:.3g}"
                    axes.text(expert, layer, label, ha="center", va="center", color=colour)
    axes.set_title(title)
    _save(figure, path)


def _map_of(layers: Sequence[str], experts: int):
    """Room for a heat map of layer by expert."""
    count = len(layers)
    width = 0.55 * experts if experts <= MOST_NUMBERS else min(0.12 * experts, 14)
    height = 0.6 * count if count <= MOST_NUMBERS else min(0.25 * count, 12)
    figure, axes = _figure(2.6 + width, 1.6 + height)
    if experts <= MOST_NUMBERS:
        axes.set_xticks(range(experts))
    every = -(-count // MOST_NAMES)
    axes.set_yticks(range(0, count, every), layers[::every])
    axes.set(xlabel="expert (number)", ylabel="layer")
    return figure, axes


def _heat_map(figure: Figure, axes, over_even: list[list[float]]) -> None:
    image = axes.imshow(
        over_even, cmap=SCALE, vmin=LEAST, vmax=2, aspect="auto", interpolation="none"
    )
    bar = figure.colorbar(image, extend="both", label="load / even share")
    bar.set_ticks([LEAST, 1, 2], labels=["> 0", "1", "2"])
    # The tip below the scale has the colour of idle experts.
    bar.ax.text(0.5, -0.06, "idle", transform=bar.ax.transAxes, ha="center", va="top")


def plot_over_time(
    steps: Sequence[int], shares: Sequence[Sequence[float]], path: Path, layer: str
) -> None:
    """Draw a layer's load by step and expert.

    Args:
        steps: the steps of the readings; they may repeat
        shares: by reading, [E] each, an expert's part of the layer's routes
        path: the PNG file
        layer: the layer's name, for the title
    """
    experts, count = len(shares[0]), len(shares)
    figure, axes = _figure(7.5, min(max(1.6 + 0.22 * experts, 3), 9))
    _heat_map(figure, axes, [[row[e] * experts for row in shares] for e in range(experts)])
    marks = range(0, count, -(-count // 8))
    axes.set_xticks(marks, [str(steps[i]) for i in marks])
    if experts <= MOST_NUMBERS:
        axes.set_yticks(range(experts))
    axes.set_xlabel("training step at the end of each reading")
    axes.set_ylabel("expert (number)")
    axes.set_title(f"Load of each expert over time\n{layer}")
    _save(figure, path)


def plot_sorted(shares: dict[str, Sequence[float]], path: Path, when: str) -> None:
    """Draw every layer's load over the even share, the busiest expert first.

    A flat line at 1 is an even load; a line that ends at zero has idle experts. Up to six layers
    have colours and names; of more layers only the least and the most even.

    Args:
        shares: by layer, [E] each, an expert's part of the layer's routes; E may differ
        path: the PNG file
        when: the time of the reading, for the title
    """
    uneven = {name: max(row) * len(row) for name, row in shares.items()}
    named = sorted(uneven, key=lambda name: uneven[name])
    if len(named) > len(COLOURS):
        named = [named[0], named[-1]]
    figure, axes = _figure(7, 4.2)
    for name, row in shares.items():
        values = [share * len(row) for share in sorted(row, reverse=True)]
        ranks = [(i + 0.5) / len(row) for i in range(len(row))]
        if name in named:
            colour = COLOURS[named.index(name)]
            axes.plot(ranks, values, color=colour, lw=1.8, label=name, zorder=3)
        else:
            axes.plot(ranks, values, color="0.8", lw=0.8, zorder=1)
    axes.axhline(1, color="black", lw=0.8, ls="--", label="1: all experts alike")
    axes.set_ylim(bottom=0)
    xlabel = "experts sorted by load, busiest first (fraction of the layer's experts)"
    title = f"How evenly each layer uses its experts\n{when}"
    axes.set(title=title, xlim=(0, 1), xlabel=xlabel, ylabel="load / even share")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_pairs(pairs: Tensor, path: Path, layer: str) -> None:
    """Draw how often two experts are chosen together, relative to chance at their loads.

    Args:
        pairs: [E, E], as `LayerStats.pairs`
        path: the PNG file
        layer: the layer's name, for the title
    """
    lift, experts = co_routing(pairs), len(pairs)
    size = 2.2 + min(max(0.3 * experts, 2.5), 8)
    figure, axes = _figure(size + 1, size)
    axes.set_facecolor("0.85")
    # Blue and red differ equally in brightness from the middle.
    image = axes.imshow(lift.tolist(), cmap="RdBu_r", vmin=0, vmax=2, interpolation="none")
    if experts <= MOST_NUMBERS:
        axes.set_xticks(range(experts))
        axes.set_yticks(range(experts))
    axes.set_xlabel("expert (number)\ngrey: the expert itself, or too few tokens to tell")
    axes.set_ylabel("expert (number)")
    axes.set_title(f"Pairs of experts that tokens choose together\n{layer}")
    bar = figure.colorbar(image, extend="max", shrink=0.8, label="tokens / expected by chance")
    bar.set_ticks([0, 1, 2], labels=["0", "1", "2"])
    _save(figure, path)


def co_routing(pairs: Tensor, rounds: int = 100) -> Tensor:
    """Divide the counts of pairs by those expected by chance.

    By chance, pairs are drawn by a propensity of each expert, which is fitted to its load.

    Args:
        pairs: [E, E], as `LayerStats.pairs`
        rounds: iterations of the fit

    Returns:
        [E, E] float64; NaN on the diagonal and where chance gives fewer than FEW_PAIRS
    """
    together = pairs.double().clone().fill_diagonal_(0)
    load = together.sum(dim=1)
    propensity = load / load.sum().sqrt().clamp(min=1)
    for _ in range(rounds):  # towards propensity[i] * sum of the others' = load[i]
        fitted = load / (propensity.sum() - propensity).clamp(min=1e-300)
        propensity = (propensity * fitted).sqrt()
    expected = propensity.unsqueeze(0) * propensity.unsqueeze(1)
    expected.fill_diagonal_(0)
    return torch.where(expected >= FEW_PAIRS, together / expected, torch.nan)


def plot_run(
    readings: Sequence[tuple[int, Reading]], folder: Path, layer: str | None = None
) -> list[Path]:
    """Draw all pictures of a run, from its training, or from its evaluation if it has no training.

    load.png and sorted.png show the last reading. over-time.png shows one layer, and pairs.png the
    same layer if readings are detailed.

    Args:
        readings: (step, reading) each
        folder: the folder for the files
        layer: the name of the one layer; None takes the least even layer of the last reading

    Returns:
        the files

    Raises:
        ValueError: the layer is not in the last reading, or no layer was called
    """
    mode = "train" if any(reading.train for _, reading in readings) else "eval"
    of_mode = [(step, getattr(reading, mode)) for step, reading in readings]
    of_mode = [(step, layers) for step, layers in of_mode if layers]
    if not of_mode:
        raise ValueError(
            "plot_run: readings must have a layer that was called, got none; call the model "
            "between stats.track and stats.read"
        )
    last_step, last = of_mode[-1]
    worst = max(last, key=lambda name: last[name].max_over_mean)
    chosen = worst if layer is None else layer
    if chosen not in last:
        raise ValueError(f"plot_run: layer must be {' or '.join(last)}, got {chosen}")
    during = {"train": "training", "eval": "evaluation"}[mode]
    when = f"{during}, reading at step {last_step}"
    title = f"layer {chosen}" + (" (the least even)" if chosen == worst and len(last) > 1 else "")
    paths = [folder / "load.png", folder / "sorted.png"]
    shares = {name: of_layer.shares.tolist() for name, of_layer in last.items()}
    plot_load(shares, paths[0], when)
    plot_sorted(shares, paths[1], when)
    # A file may hold several runs, with different layers.
    experts = len(last[chosen].load)
    history = [
        (step, layers[chosen].shares.tolist())
        for step, layers in of_mode
        if chosen in layers and len(layers[chosen].load) == experts
    ]
    if len(history) > 1:
        paths.append(folder / "over-time.png")
        steps, over_time = zip(*history, strict=True)
        plot_over_time(steps, over_time, paths[-1], f"{title}, {during}")
    pairs = last[chosen].pairs
    if pairs is not None and pairs.sum() > pairs.trace():  # one choice per token has no pairs
        paths.append(folder / "pairs.png")
        plot_pairs(pairs, paths[-1], f"{title}\n{when}")
    return paths
