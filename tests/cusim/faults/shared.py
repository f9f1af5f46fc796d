"""Faults of the functions that all kernels share."""

from . import Mutant

TESTS = []  # all
MUTANTS = [
    Mutant("vec.cuh", "__float_as_uint(x + 0.0f)", "__float_as_uint(x)"),
    Mutant("vec.cuh", "static_cast<unsigned>(static_cast<int>(bits) >> 31) | 1u << 31", "1u << 31"),
    Mutant("vec.cuh", "if (lane >= distance) x += below;", "if (lane > distance) x += below;"),
    Mutant("vec.cuh", "word & 0xffff0000u", "word"),
    Mutant("vec.cuh", "wide.at[j], wide.at[j + 1]", "wide.at[j + 1], wide.at[j]"),
    Mutant("vec.cuh", "lanes = kLanes / 2; lanes > 0", "lanes = kLanes / 2; lanes > 1"),
]
