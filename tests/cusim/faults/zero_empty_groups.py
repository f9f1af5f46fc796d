"""Faults of zero_empty_groups."""

MUTANTS = {
    "zero_empty_groups.cu": [
        ("load(offsets + group + 1) > load(offsets + group)", "false"),
        ("offsets + group + 1) > load", "offsets + group + 1) >= load"),
        ("sums += group * size;", ""),
        ("i < size;", "i <= size;"),
        ("i = block * kThreads + threadIdx.x", "i = threadIdx.x + kThreads"),
        ("blockIdx.x / blocks_of_group", "blockIdx.x"),
        ("divide_up(bytes, kBytesOfBlock)", "bytes / kBytesOfBlock"),
        (" && aligned(sums)", ""),
        ("bytes % sizeof(uint4) == 0 && ", ""),
    ],
}
