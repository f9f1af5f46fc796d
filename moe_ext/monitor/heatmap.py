"""The load of experts as text, for terminals."""

from collections.abc import Mapping, Sequence

# By height: colours differ between terminals, and between readers.
BARS = "▁▂▃▄▅▆▇█"
IDLE = "·"


def text_heatmap(shares: Mapping[str, Sequence[float]], columns: int = 64) -> str:
    """A line of bars for every layer, a bar for every expert; layers with more experts than
    `columns` take several lines.

    shares: by layer, of the layer's routes, [E] each
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
