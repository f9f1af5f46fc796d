"""Write readings of `stats` to JSON lines or TensorBoard.

A sink is any function of a reading and a step. For Weights and Biases:

    lambda reading, step: wandb.log(reading.scalars(), step=step)
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from mmap import ACCESS_READ, mmap
from operator import index
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .reading import MODES, LayerStats, Reading

Sink = Callable[[Reading, int], None]

_LIMIT = 2**63  # counts are summed in int64


def _is_integer(value: Any) -> bool:
    return type(value) is int and -_LIMIT <= value < _LIMIT


def _are_counts(value: Any) -> bool:
    is_of_integers = type(value) is list and set(map(type, value)) == {int}
    return is_of_integers and min(value) >= 0 and sum(value) < _LIMIT


def _are_pairs(value: Any) -> bool:
    if type(value) is not list or not all(map(_are_counts, value)):
        return False
    is_symmetric = list(zip(*value, strict=False)) == list(map(tuple, value))
    return is_symmetric and sum(map(sum, value)) < _LIMIT


def _is_number(value: Any) -> bool:
    return type(value) is float or _is_integer(value) or value in ("nan", "inf", "-inf")


def _are_numbers(value: Any) -> bool:
    return type(value) is list and all(map(_is_number, value))


def _is_name(value: Any) -> bool:
    return type(value) is str and value != "" and value.isprintable()


def _on_cpu(value: list) -> Tensor:
    return torch.tensor(value, device="cpu")


def _numbers(value: list) -> Tensor:
    return torch.tensor([*map(float, value)], dtype=torch.float64, device="cpu")


class _Field(NamedTuple):
    """An entry of a line: its contract in words and as a test, and its conversion."""

    must_be: str
    fits: Callable[[Any], bool]
    read: Callable[[Any], Any]


_COUNT = _Field("an integer >= 0", lambda value: _is_integer(value) and value >= 0, int)
_LOAD = _Field("a list of integers >= 0", _are_counts, _on_cpu)
_NUMBER = _Field('a number, "nan", "inf" or "-inf"', _is_number, float)
_FIELDS = {
    "step": _Field("an integer of 64 bits", _is_integer, int),
    "mode": _Field(f"one of {', '.join(MODES)}", lambda value: value in MODES, str),
    "layer": _Field("a name of printable characters", _is_name, str),
    "tokens": _COUNT,
    "calls": _COUNT,
    "load": _LOAD,
    "kept": _LOAD,
    "l_aux": _NUMBER,
    "importance": _Field("a list of numbers", _are_numbers, _numbers),
    "router_entropy": _NUMBER,
    "z_loss": _NUMBER,
    "agreement": _NUMBER,
    "pairs": _Field("a symmetric matrix of integers >= 0", _are_pairs, _on_cpu),
}


_BEGIN = b'{"step": '  # of every line


class JsonLines:
    """Append readings to a file: a line for every layer and mode. `read_json_lines` reads it.

    Every reading is written at once, so an interrupted run keeps its readings.

    Args:
        path: the file; a cut-off last line is replaced

    Raises:
        FileNotFoundError: the file's folder does not exist
        ValueError: in a call, the file begins with something else than a reading
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise FileNotFoundError(
                f"JsonLines: the folder of path must exist, got {self.path}; create "
                f"{self.path.parent} first, with mkdir"
            )

    def __call__(self, reading: Reading, step: int) -> None:
        lines = []
        for mode in MODES:
            for name, layer in getattr(reading, mode).items():
                line = {"step": index(step), "mode": mode, "layer": name, **layer._asdict()}
                known = {key: _json(value) for key, value in line.items() if value is not None}
                lines.append(json.dumps(known, allow_nan=False) + "\n")
        with self.path.open("a+b") as file:
            file.seek(0)
            begin = file.read(len(_BEGIN))
            if begin != _BEGIN[: len(begin)]:
                raise ValueError(
                    f"JsonLines: {self.path} must be a file of readings, or new, but begins with "
                    f"{begin!r}; choose another path"
                )
            file.truncate(_end_of_last_line(file))
            file.write("".join(lines).encode())


def _json(value):
    """Convert a value for JSON, which has no NaN and no infinities: they become strings."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [_json(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _end_of_last_line(file: BinaryIO) -> int:
    """Return the offset after the last newline: a killed run may leave a part of a line."""
    if file.seek(0, os.SEEK_END) == 0:
        return 0  # mmap refuses an empty file
    with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        return content.rfind(b"\n") + 1


def read_json_lines(path: Path | str) -> Iterator[tuple[int, Reading]]:
    """Yield (step, reading) for the readings in a file that JsonLines wrote, in its order.

    A cut-off last line is ignored.

    Args:
        path: the file

    Raises:
        ValueError: a line is not one that JsonLines writes; the text names the file and the line
    """
    step, reading = None, Reading({}, {})
    with Path(path).open("rb") as lines:  # in binary mode lines end at b"\n" only
        for number, text in enumerate(lines, start=1):
            if not text.endswith(b"\n"):
                break
            try:
                here, mode, name, layer = _parsed(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number}: not a line of moe_ext's stats: {error}; delete the "
                    "line to read the others"
                ) from error
            # A reading begins with its training lines.
            is_past = mode == MODES[0] and reading.eval
            if step is not None and (here != step or name in getattr(reading, mode) or is_past):
                yield step, reading
                reading = Reading({}, {})
            step = here
            getattr(reading, mode)[name] = layer
    if step is not None:
        yield step, reading


def _parsed(text: bytes) -> tuple[int, str, str, LayerStats]:
    """Return (step, mode, layer, statistics) of a line.

    Raises ValueError, or RecursionError for JSON that is nested too deeply.
    """
    line = json.loads(text.decode())
    if type(line) is not dict:
        raise ValueError(f"it must be a JSON object, got {shortened(line)}")
    if unknown := line.keys() - _FIELDS.keys():
        raise ValueError(f"its keys must be among {', '.join(_FIELDS)}, got {shortened(unknown)}")
    for name, field in _FIELDS.items():
        if name not in line and name not in LayerStats._field_defaults:
            raise ValueError(f"{name} must be {field.must_be}, but is missing")
        if name in line and not field.fits(line[name]):
            raise ValueError(f"{name} must be {field.must_be}, got {shortened(line[name])}")
    values = {name: _FIELDS[name].read(value) for name, value in line.items()}
    step, mode, name = (values.pop(key) for key in ("step", "mode", "layer"))
    layer = LayerStats(**values)
    for key in ("kept", "importance", "pairs"):
        if key in values and len(values[key]) != len(layer.load):
            raise ValueError(
                f"{key} must be of {len(layer.load)} experts, as load, got {len(values[key])}"
            )
    if (layer.kept > layer.load).any():
        raise ValueError(
            f"kept must be at most load, {shortened(line['load'])}, got {shortened(line['kept'])}"
        )
    return step, mode, name, layer


class TensorBoard:
    """Write numbers to a torch.utils.tensorboard.SummaryWriter.

    Args:
        writer: the writer, or an object with its add_scalar(name, value, step)
        per_layer: write the numbers of every layer, not only their mean and the worst

    Raises:
        ValueError: the writer has no add_scalar
    """

    def __init__(self, writer: Any, *, per_layer: bool = False) -> None:
        if not callable(getattr(writer, "add_scalar", None)):
            raise ValueError(
                "TensorBoard: writer must have add_scalar, as torch.utils.tensorboard."
                f"SummaryWriter(folder) does, got {writer!r}"
            )
        self.writer = writer
        self.per_layer = per_layer

    def __call__(self, reading: Reading, step: int) -> None:
        for name, value in reading.scalars(per_layer=self.per_layer).items():
            self.writer.add_scalar(name, value, step)
