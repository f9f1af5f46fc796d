"""Faults of the functions that all kernels share."""

from . import Mutant

TESTS = []  # all
MUTANTS = [
    Mutant("vec.cuh", "__float_as_uint(x + 0.0f)", "__float_as_uint(x)"),
    Mutant("vec.cuh", "bits >> 31 ? ~bits", "bits >> 31 ? bits"),
    Mutant("vec.cuh", "if (lane >= distance) x += below;", "if (lane > distance) x += below;"),
    Mutant("vec.cuh", "lanes = kLanes / 2; lanes > 0", "lanes = kLanes / 2; lanes > 1"),
]
