"""`python -m moe_ext <command>`."""

import argparse
import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch


def demo(arguments: argparse.Namespace) -> int:
    try:
        from .cli import demo
    except ImportError as error:
        print(f"moe_ext demo: {error}; pip install tqdm matplotlib", file=sys.stderr)
        return 1
    try:
        torch.empty(0, device=arguments.device)
        arguments.out.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError, OSError) as error:
        print(f"moe_ext demo: {error}", file=sys.stderr)
        return 2
    steps = arguments.steps or demo.Config.steps
    # A short run is looked at more than once too.
    every = min(demo.Config.eval_every, -(-steps // 3))
    config = replace(demo.Config(), steps=steps, seed=arguments.seed, eval_every=every)
    try:
        demo.run(config, arguments.device, arguments.out)
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was reached is in {arguments.out}", file=sys.stderr)
        return 130
    return 0


def plot(arguments: argparse.Namespace) -> int:
    from .monitor.sinks import read_json_lines

    try:
        readings = list(read_json_lines(arguments.run_file))
    except (OSError, ValueError) as error:
        print(f"moe_ext plot: {error}", file=sys.stderr)
        return 2
    if not readings:
        print(f"moe_ext plot: {arguments.run_file} has no whole line to read", file=sys.stderr)
        return 2
    step, last = readings[-1]
    names = list(last.train or last.eval)
    if arguments.layer not in (None, *names):
        print(
            f"moe_ext plot: --layer must be {' or '.join(names)}, got {arguments.layer}",
            file=sys.stderr,
        )
        return 2
    print(f"step {step}\n{last}")
    if arguments.text:
        return 0
    try:
        from .monitor.plot import plot_run
    except ImportError as error:
        print(f"moe_ext plot: {error}; pip install matplotlib, or --text", file=sys.stderr)
        return 1
    out = arguments.out or arguments.run_file.parent
    try:
        out.mkdir(parents=True, exist_ok=True)
        print("\n".join(map(str, plot_run(readings, out, arguments.layer))))
    except (OSError, ValueError) as error:
        print(f"moe_ext plot: {error}", file=sys.stderr)
        return 2
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


def main() -> int:
    # A terminal may not have the bars of a table.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(prog="python -m moe_ext")
    commands = parser.add_subparsers(dest="command", required=True)
    parse = commands.add_parser("demo", help="train a small MoE language model beside a dense one")
    parse.add_argument(
        "--steps", type=positive, help="steps per model (by default enough to compare the two)"
    )
    parse.add_argument("--device", type=device, default="cpu", help="cpu or cuda (cpu)")
    parse.add_argument(
        "--seed", type=seed, default=0, help="the same seed gives the same numbers (0)"
    )
    parse.add_argument("--out", type=Path, default=Path("demo-out"), help="folder (demo-out)")
    parse.set_defaults(run=demo)
    parse = commands.add_parser("plot", help="pictures and a table of what stats wrote down")
    parse.add_argument("run_file", type=Path, metavar="run.jsonl", help="of sinks.JsonLines")
    parse.add_argument("--out", type=Path, help="folder of the pictures (that of run.jsonl)")
    parse.add_argument("--layer", help="whose course and pairs to draw (the least even)")
    parse.add_argument("--text", action="store_true", help="no pictures, only the table")
    parse.set_defaults(run=plot)
    parse = commands.add_parser(
        "doctor", help="check the installation: what is built, what runs, how to fix it"
    )
    parse.add_argument("--json", action="store_true", help="fields for programs")
    parse.set_defaults(run=doctor)
    arguments = parser.parse_args()
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader closed the pipe, as head does. Python writes the rest when it ends: to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as of a program that SIGPIPE ends
    return code


if __name__ == "__main__":
    sys.exit(main())
