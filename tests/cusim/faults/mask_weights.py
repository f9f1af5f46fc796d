"""Faults of mask_weights and of the normalization that it shares with the gate."""

from . import Mutant

TESTS = ["gate", "mask_weights"]
MUTANTS = [
    Mutant("mask_weights.cu", "if (token >= num_tokens) return;", ""),
    Mutant("mask_weights.cu", "blockDim.x + threadIdx.x", "blockDim.x + threadIdx.x + 1"),
    Mutant("mask_weights.cu", "if (load(slots + k) < 0) continue;", ""),
    Mutant("mask_weights.cu", "load(slots + k) >= 0;", "true;"),
    Mutant("mask_weights.cu", "kept.divide(eps);", "kept.divide();"),
    Mutant("mask_weights.cu", "if (!grad) kept.shift = kept.mean = 0;", ""),
    Mutant("mask_weights.cu", "kept.centred(load(from + k))", "load(from + k)"),
    Mutant("mask_weights.cu", "/ kept.divisor * scale", "/ kept.divisor"),
    Mutant("mask_weights.cu", "if (normalize) {", "if (true) {"),
    Mutant("mask_weights.cu", "divide_up(call.num_tokens, kThreads)", "call.num_tokens / kThreads"),
    Mutant("scoring.h", "return sum < eps ? eps : sum;", "return sum;"),
    Mutant("scoring.h", "if (sum < eps) mean = shift = 0;", ""),
    Mutant("scoring.h", "if (p > largest) {", "if (largest == -INFINITY) {"),
    Mutant("scoring.h", "mean += sum * (shift - g);", ""),
    Mutant("scoring.h", "return g - shift - mean;", "return g - (shift + mean);"),
]
