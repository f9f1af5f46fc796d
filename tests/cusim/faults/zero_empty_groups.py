"""Faults of zero_empty_groups."""

from . import Mutant

FILE = "zero_empty_groups.cu"
TESTS = ["zero_empty_groups"]
MUTANTS = [
    Mutant(FILE, "load(offsets + group + 1) > load(offsets + group)", "false"),
    Mutant(FILE, "offsets + group + 1) > load", "offsets + group + 1) >= load"),
    Mutant(FILE, "sums += group * size;", ""),
    Mutant(FILE, "i < size;", "i <= size;"),
    Mutant(FILE, "i = block * kThreads + threadIdx.x", "i = threadIdx.x + kThreads"),
    Mutant(FILE, "blockIdx.x / blocks_of_group", "blockIdx.x"),
    Mutant(FILE, "divide_up(bytes, kBytesOfBlock)", "bytes / kBytesOfBlock"),
    Mutant(FILE, " && aligned(sums)", ""),
    Mutant(FILE, "bytes % sizeof(uint4) == 0 && ", ""),
]
