"""Where readings of `stats` go: lines of JSON, or TensorBoard. Any function of a reading and a step
is another; for Weights and Biases that is

    lambda reading, step: wandb.log(reading.scalars(), step=step)
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .reading import MODES, LayerStats, Reading

Sink = Callable[[Reading, int], None]

# Of LayerStats, what is a list in a line; pairs are a list of lists.
_TENSORS = {
    "load": torch.int64,
    "kept": torch.int64,
    "importance": torch.float64,
    "pairs": torch.int64,
}

_FLOATS = "l_aux", "router_entropy", "z_loss", "agreement"


class JsonLines:
    """A file with a line for every layer and mode of every reading, as `read_json_lines` reads it.

    An interrupted run leaves what it had written.

    Args:
        path: is appended to, after its last whole line; its folder must be there
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def __call__(self, reading: Reading, step: int) -> None:
        lines = []
        for mode in MODES:
            for name, layer in getattr(reading, mode).items():
                line = {"step": step, "mode": mode, "layer": name, **layer._asdict()}
                for key in _TENSORS:
                    line[key] = None if line[key] is None else line[key].tolist()
                known = {key: _json(value) for key, value in line.items() if value is not None}
                lines.append(json.dumps(known, allow_nan=False) + "\n")
        with self.path.open("a+b") as file:
            file.truncate(_end_of_last_line(file))
            file.write("".join(lines).encode())


def _json(value):
    """JSON has no number for NaN and infinities."""
    if isinstance(value, list):
        return [_json(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: list) -> list:
    """What `_json` wrote."""
    return [float(one) if isinstance(one, str) else one for one in value]


def _end_of_last_line(file: BinaryIO, step: int = 1 << 16) -> int:
    """Behind the last newline: a run that was killed may have left a part of a line."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        begin = max(0, end - step)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def read_json_lines(path: Path | str) -> Iterator[tuple[int, Reading]]:
    """The readings in a file that JsonLines wrote, with their steps, in the file's order.

    A last line that was cut off is left out.

    Args:
        path: of the file

    Raises:
        ValueError: a line, which it names, is not understood
    """
    with Path(path).open() as lines:
        yield from _readings(path, lines)


def _readings(path: Path | str, lines: Iterable[str]) -> Iterator[tuple[int, Reading]]:
    step, reading = None, Reading({}, {})
    for number, text in enumerate(lines, start=1):
        if not text.endswith("\n"):
            break
        try:
            line = json.loads(text)
            here, mode, name = (line.pop(key) for key in ("step", "mode", "layer"))
            layers = {"train": reading.train, "eval": reading.eval}[mode]
            tensors = {
                key: torch.tensor(_numbers(line[key]), dtype=dtype)
                for key, dtype in _TENSORS.items()
                if key in line
            }
            numbers = {key: float(line[key]) for key in _FLOATS if key in line}
            layer = LayerStats(**line | tensors | numbers)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}: not a line of moe_ext's stats: {error}"
            ) from error
        is_past = mode == MODES[0] and reading.eval  # which comes first in every reading
        if step is not None and (here != step or name in layers or is_past):
            yield step, reading
            reading = Reading({}, {})
            layers = getattr(reading, mode)
        step = here
        layers[name] = layer
    if step is not None:
        yield step, reading


class TensorBoard:
    """Numbers to a torch.utils.tensorboard.SummaryWriter, or anything with its add_scalar.

    Args:
        writer: the writer
        per_layer: those of every layer, not only their mean and the worst
    """

    def __init__(self, writer: Any, *, per_layer: bool = False) -> None:
        self.writer = writer
        self.per_layer = per_layer

    def __call__(self, reading: Reading, step: int) -> None:
        for name, value in reading.scalars(per_layer=self.per_layer).items():
            self.writer.add_scalar(name, value, step)
