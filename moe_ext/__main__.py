"""`python -m moe_ext <command>`."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch


def demo(arguments: argparse.Namespace) -> int:
    try:
        from . import demo
    except ImportError as error:
        print(f"moe_ext demo: {error}; pip install 'moe_ext[demo]'", file=sys.stderr)
        return 1
    try:
        torch.empty(0, device=arguments.device)
        arguments.out.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, AssertionError, OSError) as error:
        print(f"moe_ext demo: {error}", file=sys.stderr)
        return 2
    config = replace(demo.Config(), steps=arguments.steps, seed=arguments.seed)
    try:
        demo.run(config, arguments.device, arguments.out)
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was reached is in {arguments.out}", file=sys.stderr)
        return 130
    return 0


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m moe_ext")
    commands = parser.add_subparsers(dest="command", required=True)
    parse = commands.add_parser("demo", help="train a small MoE language model beside a dense one")
    parse.add_argument("--steps", type=positive, default=1200, help="steps per model (1200)")
    parse.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    parse.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same numbers (0)"
    )
    parse.add_argument("--out", type=Path, default=Path("demo-out"), help="folder (demo-out)")
    parse.set_defaults(run=demo)
    arguments = parser.parse_args()
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
