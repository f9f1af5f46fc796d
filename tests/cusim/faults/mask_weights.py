"""Faults of mask_weights and of the normalization that it shares with the gate."""

TESTS = ["gate", "mask_weights"]
MUTANTS = {
    "mask_weights.cu": [
        ("if (token >= num_tokens) return;", ""),
        ("blockDim.x + threadIdx.x", "blockDim.x + threadIdx.x + 1"),
        ("if (load(slots + k) < 0) continue;", ""),
        ("load(slots + k) >= 0;", "true;"),
        ("kept.divide(eps);", "kept.divide();"),
        ("if (!grad) kept.shift = kept.mean = 0;", ""),
        ("kept.centred(load(from + k))", "load(from + k)"),
        ("/ kept.divisor * scale", "/ kept.divisor"),
        ("if (normalize) {", "if (true) {"),
        ("divide_up(call.num_tokens, kThreads)", "call.num_tokens / kThreads"),
    ],
    "scoring.h": [
        ("return sum < eps ? eps : sum;", "return sum;"),
        ("if (sum < eps) mean = shift = 0;", ""),
        ("if (p > largest) {", "if (largest == -INFINITY) {"),
        ("mean += sum * (shift - g);", ""),
        ("return g - shift - mean;", "return g - (shift + mean);"),
    ],
}
