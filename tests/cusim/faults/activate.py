"""Faults of the activations."""

from . import BARRIER, Mutant

TESTS = ["activate"]
MUTANTS = [
    Mutant("activate.cu", "if (row >= routes.num_rows) return;", ""),
    Mutant("activate.cu", "cell = int64_t{blockIdx.x} * blockDim.x", "cell = int64_t{blockIdx.x}"),
    Mutant("activate.cu", "load(at + columns)", "load(at)"),
    Mutant("activate.cu", "if (gated) up = load", "up = load"),
    Mutant(
        "activate.cu",
        "row * columns * (gated ? 2 : 1) + column;\n    gate",
        "row * columns + column;\n    gate",
    ),
    Mutant("activate.cu", "if (blockIdx.x < sweeps)", "if (blockIdx.x <= sweeps)"),
    Mutant("activate.cu", "route < num_routes && row_of", "row_of"),
    Mutant("activate.cu", "row_of(routes, route) < 0) store", "row_of(routes, route) <= 0) store"),
    Mutant("activate.cu", "if (column < columns) store", "store"),
    Mutant("activate.cu", "grad * of_gate.slope * up", "grad * of_gate.slope"),
    Mutant("activate.cu", "dot += grad * result", "dot += weight * grad * result"),
    Mutant("activate.cu", BARRIER, ""),
    Mutant("activate.cu", "if (lane == 0) partial[warp]", "if (lane <= 1) partial[warp]"),
    Mutant("activate.cu", "if (threadIdx.x > 0) return;", ""),
    Mutant("activate.cu", "/ kWarp; ++w) total", "/ kWarp - 1; ++w) total"),
]
