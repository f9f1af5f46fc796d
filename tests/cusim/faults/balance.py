"""Faults of balance."""

from . import BARRIER

MUTANTS = {
    "balance.cu": [
        (BARRIER, "", "mine[e] = 0;"),
        (BARRIER, "", "atomicAdd(&mine[e], 1);"),
        (BARRIER, "", "half /= 2) {"),
        ("atomicAdd(&mine[e], 1);", "++mine[e];"),
        ("e >= 0 && e < num_experts", "e < num_experts"),
        ("e >= 0 && e < num_experts", "e >= 0"),
        ("k < choices", "k <= choices"),
        ("int64_t{blockIdx.x} * kThreads + threadIdx.x;", "threadIdx.x;"),
        ("counts += int64_t{blockIdx.x} * num_experts;", ""),
        ("block < blocks", "block < 1"),
        ("/ num_tokens * share", "* share"),
        ("threadIdx.x < half", "threadIdx.x <= half"),
        ("half = kThreads / 2", "half = kThreads / 4"),
        ("(call.num_tokens) : 1;", "(call.num_tokens) : 0;"),
        ("call.choices < call.top_k", "false"),
    ],
}
