"""Faults of the activations."""

from . import BARRIER, Mutant

TESTS = ["activate"]
MUTANTS = [
    Mutant("activate.cu", "if (!cell.exists) return;", ""),
    Mutant("activate.cu", "load(at + columns)", "load(at)"),
    Mutant("activate.cu", "if constexpr (kGated) up = load", "up = load"),
    Mutant(
        "activate.cu",
        "row * columns * (kGated ? 2 : 1) + column;\n    gate",
        "row * columns + column;\n    gate",
    ),
    Mutant("activation.cuh", "x < 0 ? tail : 1 - tail", "tail"),
    Mutant("activation.cuh", "below + x * density", "below"),
    Mutant("activation.cuh", "kLog2e = 1.44269504f", "kLog2e = 1.4427f * 1.01f"),
    Mutant("activation.cuh", "kActivation == Activation::kRelu", "false"),
    Mutant("activate.cu", "if (blockIdx.x < sweeps)", "if (blockIdx.x <= sweeps)"),
    Mutant("activate.cu", "route < num_routes && row_of", "row_of"),
    Mutant("activate.cu", "row_of(routes, route) < 0) store", "row_of(routes, route) <= 0) store"),
    Mutant("activate.cu", "if (column < columns) store", "store"),
    Mutant("activation.cuh", "of_gate.slope * factor", "of_gate.slope"),
    Mutant("activation.cuh", "dot += grad.at[j] * result", "dot += weighted * result"),
    Mutant("activate.cu", BARRIER, "", after="routes.weights) + route) : 1;\n  }"),
    Mutant("activate.cu", BARRIER, "", after="routes.weights) + *found);\n  }"),
    Mutant("activate.cu", BARRIER, "", after="partial[warp] = sum;"),
    Mutant("activate.cu", "if (lane == 0) partial[warp]", "if (lane <= 1) partial[warp]"),
    Mutant("activate.cu", "if (threadIdx.x > 0) return;", ""),
    Mutant("activate.cu", "/ kWarp; ++w) total", "/ kWarp - 1; ++w) total"),
]
