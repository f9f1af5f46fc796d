"""Faults of the functions that all kernels share."""

TESTS = []  # all
MUTANTS = {
    "vec.cuh": [
        ("__float_as_uint(x + 0.0f)", "__float_as_uint(x)"),
        ("static_cast<unsigned>(static_cast<int>(bits) >> 31) | 1u << 31", "1u << 31"),
        ("if (lane >= distance) x += below;", "if (lane > distance) x += below;"),
        ("word & 0xffff0000u", "word"),
        ("wide.at[j], wide.at[j + 1]", "wide.at[j + 1], wide.at[j]"),
        ("lanes = kLanes / 2; lanes > 0", "lanes = kLanes / 2; lanes > 1"),
    ],
}
