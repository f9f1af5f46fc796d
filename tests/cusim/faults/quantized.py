"""Faults of the products of packed weights."""

from . import BARRIER, Mutant

TESTS = ["quantized"]
PACKED, KERNEL = "products/packed.cuh", "products/quantized.cu"
MUTANTS = [
    Mutant(PACKED, "line_ < weights_.lines && column < weights_.width", "true"),
    Mutant(PACKED, "line_ < weights_.lines && column", "column"),
    Mutant(PACKED, "weights_.lines && column < weights_.width", "weights_.lines"),
    Mutant(PACKED, "existing(line_, weights.lines)", "line_"),
    Mutant(PACKED, "existing(column_, weights.width)", "column_"),
    Mutant(PACKED, "next_line_ < weights_.lines && next_column_ < weights_.width", "true"),
    Mutant(PACKED, "scale_.next(next_line_ - before, next_column_);", ""),
    Mutant(PACKED, "at_ += lines * weights_.num_scales, zero_at_", "zero_at_"),
    Mutant(PACKED, "zero_at_ += lines * zeros_of_line();", "zero_at_ += 0;"),
    Mutant(PACKED, "group % 2 * 4 & 15", "0 & 15"),
    Mutant(PACKED, "bits_ << 16", "bits_ << 15"),
    Mutant(PACKED, "bits_ << 23", "bits_ << 22"),
    Mutant(PACKED, "is_odd_ = !is_odd_;", ""),
    Mutant(PACKED, "(code ^ 128)", "code"),
    Mutant(PACKED, "word >> bit & 15", "word >> bit & 7"),
    Mutant(PACKED, "vector() + unpacked", "vector() + i"),
    Mutant(PACKED, "bytes_of(column_)),", "0),"),
    Mutant(PACKED, "kSliceDepth<T> * bytes_of(weights_.width)", "bytes_of(weights_.width)"),
    Mutant(PACKED, "codes.at[2], codes.at[3]", "codes.at[0], codes.at[1]"),
    Mutant(PACKED, "j ^ 2 * half()", "j"),
    Mutant(KERNEL, BARRIER, "", after="weights.numbers.of[threadIdx.x];"),
    Mutant(KERNEL, "while (int64_t{1} << shift < group)", "while (int64_t{2} << shift < group)"),
    Mutant("products/main_loop.cuh", "right.ready(slice + kRightStart)", "right.ready(slice)"),
]
