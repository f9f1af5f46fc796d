"""Faults of the gate and its gradient."""

from . import BARRIER, Mutant

TESTS = ["gate"]
MUTANTS = [
    Mutant("gate.cu", BARRIER, "", after="/ divisor * scale);"),
    Mutant("gate.cu", BARRIER, "", after="half > 0; half /= 2) {"),
    Mutant("gate.cu", "active = token < num_tokens", "active = token <= num_tokens", "Sum* sums"),
    Mutant("gate_row.cuh", "if (first + j >= num_experts)", "if (first + j > num_experts)"),
    Mutant(
        "gate_row.cuh", "if (first + j < num_experts) store", "if (first + j <= num_experts) store"
    ),
    *(
        Mutant(
            "gate_row.cuh",
            "if (vectorised && first < num_experts) {",
            "if (vectorised) {",
            after=f"static void {function}(",
        )
        for function in ("read", "write")
    ),
    Mutant("gate.cu", "-INFINITY, row", "INFINITY, row", after="keys[kValues];"),
    Mutant("gate.cu", "-INFINITY, row", "0, row", after="if (choice_scores != logits)"),
    Mutant("gate_row.cuh", "std::isnan(score) ? ~decltype(key){0} : key", "key"),
    Mutant("gate.cu", "if (K > kLanes) store(weights", "if (K > 2 * kLanes) store(weights"),
    Mutant("gate.cu", "normalize ? clamped(chosen_sum) : 1", "clamped(chosen_sum)"),
    Mutant("gate_row.cuh", "kThreads + kWarp / kPack", "kThreads - kWarp / kPack"),
    Mutant("gate_row.cuh", "if (keys[i] == best) id =", "if (keys[i] >= best - 1) id ="),
    Mutant(
        "gate_row.cuh",
        "for (int i = L::kValues - 1; i >= 0; --i)",
        "for (int i = 0; i < L::kValues; ++i)",
    ),
    Mutant(
        "gate_row.cuh",
        "== static_cast<int>(id)) keys[i] = 0",
        "== static_cast<int>(id)) keys[i] = 1",
        equivalent="the key of -inf is the least of any score and far above 1",
    ),
    Mutant("gate_row.cuh", "== static_cast<int>(id)) keys[i] = 0;", "== static_cast<int>(id)) {}"),
    Mutant("gate.cu", "int count = min(K - k, kLanes)", "int count = kLanes"),
    Mutant("gate.cu", "if (i == lane) mine = id;", "mine = id;"),
    Mutant("gate.cu", "lanes_sum<kLanes>(lane < count ? p : 0)", "lanes_sum<kLanes>(p)"),
    Mutant("gate.cu", "if (lane >= count || !active) continue;", "if (lane >= count) continue;"),
    Mutant("gate_row.cuh", "L::index_of(id) == i", "L::index_of(id) == i + 1"),
    Mutant(
        "gate.cu",
        "for (int k = lane; k < K; k += kLanes)",
        "for (int k = lane; k < K - 1; k += kLanes)",
    ),
    Mutant("gate.cu", "g < L::kRows; ++g", "g < L::kRows - 1; ++g"),
    Mutant("gate.cu", "if (part == 0 && e < num_experts) store", "if (part == 0) store"),
    Mutant("gate.cu", "b += kSumParts", "b += kSumParts + 1"),
    Mutant("gate.cu", "half > 0; half /= 2", "half > 1; half /= 2"),
    Mutant(
        "gate.cu",
        "first += int64_t{gridDim.x} * L::kRows",
        "first += int64_t{gridDim.x} * L::kRows + 1",
    ),
    Mutant("gate.cu", "if (blocks == 1) return;", "if (blocks <= 2) return;"),
    Mutant("gate.cu", "aligned(call.choice_scores) && ", ""),
    Mutant("gate.cu", "if (is_expert(id)) chosen_sum.add", "chosen_sum.add"),
    Mutant("gate.cu", "if (!is_expert(id)) continue;", ""),
    Mutant("gate.cu", "chosen_sum.centred(load(grad_chosen + k))", "load(grad_chosen + k)"),
    Mutant("gate.cu", "if (is_most(p[i])) shift = grad[i];", ""),
    Mutant("gate.cu", "shift = lanes_sum<kLanes>(shift);", ""),
    Mutant("gate.cu", "x = std::exp(x - largest)", "x = std::exp(x)"),
    Mutant("gate.cu", "if (active) {", "{"),
]
