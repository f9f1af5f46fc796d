"""Arguments and result files that all benches share."""

import json
import platform
import re
import time
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from torch import Tensor

RESULTS = Path(__file__).resolve().parent / "results"
LINE = 1200  # a record that is longer than this takes a line for each of its items


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    name = model[1] if model else platform.processor() or "CPU"
    return f"{name}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def setting(device: torch.device) -> dict:
    """Where and when a result file was measured, and with which versions."""
    import moe_ext

    return {
        "machine": machine(device),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "moe_ext": moe_ext.__version__,
    }


def as_json(value, depth: int = 1) -> str:
    """JSON with a line for each record. Floats keep seven digits."""
    if isinstance(value, float):
        value = float(f"{value:.7g}")
    if not isinstance(value, dict | list | tuple):
        return json.dumps(value)
    is_dict = isinstance(value, dict)
    values = [as_json(item, depth + 1) for item in (value.values() if is_dict else value)]
    if is_dict:
        values = [f"{json.dumps(str(key))}: {v}" for key, v in zip(value, values, strict=True)]
    start, end = "{}" if is_dict else "[]"
    line = f"{start}{', '.join(values)}{end}"
    if depth > 1 and len(line) <= LINE and "\n" not in line:
        return line
    margin = "\n" + " " * depth
    return f"{start}{margin}{f',{margin}'.join(values)}{margin[:-1]}{end}"


def keep(report: dict, name: str | None, out: Path | None) -> None:
    """Write the report to `out`, or to the file of this name among the machine's results."""
    path = out or (RESULTS / slug(report["machine"]) / f"{name}.json" if name else None)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(as_json(report) + "\n")
        print(path)


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def require(name: str, error: float, most: float) -> None:
    """Raise if a relative error is NaN or more than `most`."""
    if not error <= most:
        raise AssertionError(f"{name}: relative error {error:.2g}")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def parser(doc: str, seconds: float | None = None) -> ArgumentParser:
    """A bench's parser. seconds: the default of --seconds, None without that option."""
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    if seconds is not None:
        text = f"seconds to spend on each timing ({seconds})"
        parser.add_argument("--seconds", type=float, default=seconds, help=text)
    parser.add_argument("--out", type=Path, help="write the result to this file")
    return parser
