"""Faults of the activations."""

from . import BARRIER

MUTANTS = {
    "activate.cu": [
        ("if (!cell.exists) return;", ""),
        ("if (blockIdx.x < sweeps)", "if (blockIdx.x <= sweeps)"),
        ("route < num_routes && row_of", "row_of"),
        ("row_of(routes, route) < 0) store", "row_of(routes, route) <= 0) store"),
        ("if (column < columns) store", "store"),
        (BARRIER, "", "routes.weights) + route) : 1;\n  }"),
        (BARRIER, "", "routes.weights) + *found);\n  }"),
        (BARRIER, "", "partial[warp] = sum;"),
        ("if (lane == 0) partial[warp]", "if (lane <= 1) partial[warp]"),
        ("if (threadIdx.x > 0) return;", ""),
        ("/ kWarp; ++w) total", "/ kWarp - 1; ++w) total"),
    ],
    "activation.cuh": [
        ("load(row + columns + column)};", "load(row + column)};"),
        ("if constexpr (kGated) store(row", "store(row"),
        ("return kGated ? 2 * columns : columns;", "return columns;"),
        (
            "inner.up.at[j] = vectors[(2 * j + 1) / kSize].at[(2 * j + 1) % kSize]",
            "inner.up.at[j] = vectors[2 * j / kSize].at[2 * j % kSize]",
        ),
        ("vectors[2 * j / kSize].at[2 * j % kSize] = gate", "vectors[0].at[j] = gate"),
        ("x <= kLimit ? slope : 0", "slope"),
        ("x > kLimit ? kLimit : x", "x"),
        ("of_gate.value * of_up.slope", "of_gate.value"),
        ("value * factor(kActivation, up.at[j]).value", "value * up.at[j]"),
        ("x < 0 ? tail : 1 - tail", "tail"),
        ("below + x * density", "below"),
        ("kLog2e = 1.44269504f", "kLog2e = 1.4427f * 1.01f"),
        ("sizeof(T) > 2 || kActivation == Activation::kRelu ||", "sizeof(T) > 2 ||"),
        ("of_gate.slope * of_up.value", "of_gate.slope"),
        ("dot += grad.at[j] * result", "dot += weighted * result"),
    ],
}
