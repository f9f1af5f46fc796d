"""The tests of this folder need the extra `peers`; without it they are left out."""

import importlib.util
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

# DeepSpeed looks for its accelerator when it is imported, here and in the processes of tests.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

PEERS = "accelerate", "bitsandbytes", "deepspeed", "peft", "transformers"
MISSING = [name for name in PEERS if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_report_header() -> list[str]:
    return [f"tests/peers: left out, {name} is missing" for name in MISSING]
