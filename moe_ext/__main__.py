"""`python -m moe_ext <command>`."""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch


class Refused(Exception):
    """A command cannot run: an error text and the exit code."""


def demo(arguments: argparse.Namespace) -> int:
    try:
        from .cli import demo
    except ImportError as error:
        raise Refused(f"{error}; pip install tqdm matplotlib", 1) from error
    try:
        torch.empty(0, device=arguments.device)
        arguments.out.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError, OSError) as error:
        raise Refused(error, 2) from error
    steps = arguments.steps or demo.Config.steps
    # A short run is evaluated at least three times too.
    every = min(demo.Config.eval_every, -(-steps // 3))
    config = demo.Config(steps=steps, seed=arguments.seed, eval_every=every)
    try:
        demo.run(config, arguments.device, arguments.out)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the results so far are in {arguments.out}", file=sys.stderr)
        return 130
    return 0


def plot(arguments: argparse.Namespace) -> int:
    from .monitor.sinks import read_json_lines

    try:
        readings = list(read_json_lines(arguments.run_file))
    except (OSError, ValueError) as error:
        raise Refused(error, 2) from error
    if not readings:
        raise Refused(f"{arguments.run_file} has no complete line", 2)
    step, last = readings[-1]
    names = list(last.train or last.eval)
    if arguments.layer not in (None, *names):
        raise Refused(f"--layer must be {' or '.join(names)}, got {arguments.layer}", 2)
    print(f"step {step}\n{last}")
    if arguments.text:
        return 0
    try:
        from .monitor.plot import plot_run
    except ImportError as error:
        raise Refused(f"{error}; pip install matplotlib, or --text", 1) from error
    out = arguments.out or arguments.run_file.parent
    try:
        out.mkdir(parents=True, exist_ok=True)
        print("\n".join(map(str, plot_run(readings, out, arguments.layer))))
    except (OSError, ValueError) as error:
        raise Refused(error, 2) from error
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    from .cli.doctor import examine

    report = examine()
    print(json.dumps(report.as_dict(), indent=1, allow_nan=False) if arguments.json else report)
    return 0 if report.is_well else 1


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be in 0..2**63 - 1, got {value}")
    return value


def device(text: str) -> str:
    if text.split(":")[0] not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text}")
    return text


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moe_ext",
        description="Mixture-of-experts layers for PyTorch. Start with doctor, then demo.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(run: Callable, text: str) -> argparse.ArgumentParser:
        parse = commands.add_parser(run.__name__, help=text, description=f"{text}.".capitalize())
        parse.set_defaults(run=run)
        return parse

    parse = command(doctor, "check the installation, and say how to fix each problem")
    parse.add_argument("--json", action="store_true", help="print the report as JSON")
    parse = command(demo, "train a small language model with experts and a dense one, and compare")
    text = "steps for each model (500, a minute or two)"
    parse.add_argument("--steps", type=positive, help=text)
    parse.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:N (cpu)")
    text = "the same seed gives the same numbers (0)"
    parse.add_argument("--seed", type=seed, default=0, help=text)
    text = "folder for results and pictures (demo-out)"
    parse.add_argument("--out", type=Path, default=Path("demo-out"), help=text)
    parse = command(plot, "print and draw the experts' load that a run has recorded")
    text = "file that sinks.JsonLines wrote, such as demo-out/stats.jsonl"
    parse.add_argument("run_file", type=Path, metavar="run.jsonl", help=text)
    parse.add_argument("--out", type=Path, help="folder for the pictures (that of run.jsonl)")
    text = "layer to draw over time and by pairs of experts (the least even one)"
    parse.add_argument("--layer", help=text)
    parse.add_argument("--text", action="store_true", help="print the table, draw no pictures")
    return parser


def main() -> int:
    # A terminal's encoding may lack the bars of a table.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    arguments = parser().parse_args()
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
    except Refused as refused:
        text, code = refused.args
        print(f"moe_ext {arguments.command}: {text}", file=sys.stderr)
    except BrokenPipeError:
        # The reader closed the pipe, as head does. Python flushes the rest at its end: discard it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell reports a program that SIGPIPE ended
    return code


if __name__ == "__main__":
    sys.exit(main())
