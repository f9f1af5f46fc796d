"""Faults of the activations."""

from . import BARRIER, Mutant

TESTS = ["activate"]
MUTANTS = [
    Mutant("activate.cu", "if (!cell.exists) return;", ""),
    Mutant("activation.cuh", "load(row + columns + column)};", "load(row + column)};"),
    Mutant("activation.cuh", "if constexpr (kGated) store(row", "store(row"),
    Mutant("activation.cuh", "return kGated ? 2 * columns : columns;", "return columns;"),
    Mutant(
        "activation.cuh",
        "inner.up.at[j] = vectors[(2 * j + 1) / kSize].at[(2 * j + 1) % kSize]",
        "inner.up.at[j] = vectors[2 * j / kSize].at[2 * j % kSize]",
    ),
    Mutant(
        "activation.cuh",
        "vectors[2 * j / kSize].at[2 * j % kSize] = gate",
        "vectors[0].at[j] = gate",
    ),
    Mutant("activation.cuh", "x <= kLimit ? slope : 0", "slope"),
    Mutant("activation.cuh", "x > kLimit ? kLimit : x", "x"),
    Mutant("activation.cuh", "of_gate.value * of_up.slope", "of_gate.value"),
    Mutant("activation.cuh", "value * factor(kActivation, up.at[j]).value", "value * up.at[j]"),
    Mutant("activation.cuh", "x < 0 ? tail : 1 - tail", "tail"),
    Mutant("activation.cuh", "below + x * density", "below"),
    Mutant("activation.cuh", "kLog2e = 1.44269504f", "kLog2e = 1.4427f * 1.01f"),
    Mutant(
        "activation.cuh", "sizeof(T) > 2 || kActivation == Activation::kRelu ||", "sizeof(T) > 2 ||"
    ),
    Mutant("activate.cu", "if (blockIdx.x < sweeps)", "if (blockIdx.x <= sweeps)"),
    Mutant("activate.cu", "route < num_routes && row_of", "row_of"),
    Mutant("activate.cu", "row_of(routes, route) < 0) store", "row_of(routes, route) <= 0) store"),
    Mutant("activate.cu", "if (column < columns) store", "store"),
    Mutant("activation.cuh", "of_gate.slope * of_up.value", "of_gate.slope"),
    Mutant("activation.cuh", "dot += grad.at[j] * result", "dot += weighted * result"),
    Mutant("activate.cu", BARRIER, "", after="routes.weights) + route) : 1;\n  }"),
    Mutant("activate.cu", BARRIER, "", after="routes.weights) + *found);\n  }"),
    Mutant("activate.cu", BARRIER, "", after="partial[warp] = sum;"),
    Mutant("activate.cu", "if (lane == 0) partial[warp]", "if (lane <= 1) partial[warp]"),
    Mutant("activate.cu", "if (threadIdx.x > 0) return;", ""),
    Mutant("activate.cu", "/ kWarp; ++w) total", "/ kWarp - 1; ++w) total"),
]
