"""Expert capacity: the rows an expert may have."""

import math


def float32(x):
    """Round x > 0 to float32 by arithmetic that torch.compile traces with x unknown.

    It keeps 24 bits of a double. A logarithm that rounds up to the next integer changes the grid
    only for an x that becomes that power of two anyway.
    """
    scale = 2.0 ** (23 - math.floor(math.log2(x)))
    return round(x * scale) / scale


def expert_capacity(num_tokens: int, num_experts: int, factor: float, min_capacity: int) -> int:
    """Compute max(ceil(num_tokens / num_experts * factor), min_capacity).

    The product is a float32 one, as on tensors; float64 differs for some sizes, in both
    directions (25 tokens, 2 experts, factor 1.2: 16 against 15).
    """
    if num_tokens == 0 or factor <= 0:
        return min_capacity
    # The ratio makes the factor a constant for torch.compile; num_tokens may stay unknown.
    numerator, denominator = float(factor).as_integer_ratio()
    product = float32(num_tokens / num_experts) * float32(numerator / denominator)
    return max(math.ceil(float32(product)), min_capacity)
