"""Pictures, with matplotlib, as PNG files."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Okabe and Ito's palette: told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#56B4E9", "#E69F00", "#009E73", "#CC79A7")


def plot_curves(curves: dict[str, list[tuple[int, float]]], path: Path, ylabel: str) -> None:
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
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_load(load: list[list[float]], path: Path) -> None:
    """A heat-map of layer by expert. load: shares of the layer's routes; 1 / E is an even one."""
    layers, experts = len(load), len(load[0])
    figure, axes = plt.subplots(
        figsize=(1.8 + 0.7 * experts, 1.6 + 0.6 * layers), layout="constrained"
    )
    even = 1 / experts
    image = axes.imshow(load, cmap="cividis", vmin=0, vmax=2 * even, aspect="auto")
    for layer in range(layers):
        for expert in range(experts):
            share = load[layer][expert]
            axes.text(
                expert,
                layer,
                f"{100 * share:.0f}%",
                ha="center",
                va="center",
                color="white" if share < even else "black",
            )
    axes.set_xticks(range(experts))
    axes.set_yticks(range(layers))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(f"share of routes; even is {100 * even:.1f}%")
    figure.colorbar(image, label="share of routes")
    figure.savefig(path, dpi=130)
    plt.close(figure)
