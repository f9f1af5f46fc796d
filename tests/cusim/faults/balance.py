"""Faults of balance."""

from . import BARRIER, Mutant

TESTS = ["balance"]
MUTANTS = [
    Mutant("balance.cu", BARRIER, "", after="mine[e] = 0;"),
    Mutant("balance.cu", BARRIER, "", after="atomicAdd(&mine[e], 1);"),
    Mutant("balance.cu", BARRIER, "", after="half /= 2) {"),
    Mutant("balance.cu", "atomicAdd(&mine[e], 1);", "++mine[e];"),
    Mutant("balance.cu", "e >= 0 && e < num_experts", "e < num_experts"),
    Mutant("balance.cu", "e >= 0 && e < num_experts", "e >= 0"),
    Mutant("balance.cu", "k < choices", "k <= choices"),
    Mutant("balance.cu", "int64_t{blockIdx.x} * kThreads + threadIdx.x;", "threadIdx.x;"),
    Mutant("balance.cu", "counts += int64_t{blockIdx.x} * num_experts;", ""),
    Mutant("balance.cu", "block < blocks", "block < 1"),
    Mutant("balance.cu", "/ num_tokens * share", "* share"),
    Mutant("balance.cu", "threadIdx.x < half", "threadIdx.x <= half"),
    Mutant("balance.cu", "half = kThreads / 2", "half = kThreads / 4"),
    Mutant("balance.cu", "(call.num_tokens) : 1;", "(call.num_tokens) : 0;"),
    Mutant("balance.cu", "call.choices < call.top_k", "false"),
]
