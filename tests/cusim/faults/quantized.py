"""Faults of the products of packed weights."""

from . import BARRIER

MUTANTS = {
    "products/packed.cuh": [
        ("line_ < weights_.lines && column < weights_.width", "true"),
        ("line_ < weights_.lines && column", "column"),
        ("weights_.lines && column < weights_.width", "weights_.lines"),
        ("existing(line_, weights.lines)", "line_"),
        ("existing(column_, weights.width)", "column_"),
        ("next_line_ < weights_.lines && next_column_ < weights_.width", "true"),
        ("scale_.next(next_line_ - before, next_column_);", ""),
        ("at_ += lines * weights_.num_scales, zero_at_", "zero_at_"),
        ("zero_at_ += lines * zeros_of_line();", "zero_at_ += 0;"),
        ("group % 2 * 4 & 15", "0 & 15"),
        ("bits_ << 16", "bits_ << 15"),
        ("bits_ << 23", "bits_ << 22"),
        ("is_odd_ = !is_odd_;", ""),
        ("(code ^ 128)", "code"),
        ("word >> bit & 15", "word >> bit & 7"),
        ("vector() + unpacked", "vector() + i"),
        ("bytes_of(column_)),", "0),"),
        ("kSliceDepth<T> * bytes_of(weights_.width)", "bytes_of(weights_.width)"),
        ("codes.at[2], codes.at[3]", "codes.at[0], codes.at[1]"),
        ("j ^ 2 * half()", "j"),
    ],
    "products/quantized.cu": [
        (BARRIER, "", "weights.numbers.of[threadIdx.x];"),
        ("while (int64_t{1} << shift < group)", "while (int64_t{2} << shift < group)"),
    ],
    "products/main_loop.cuh": [
        ("right.ready(slice + kRightStart)", "right.ready(slice)"),
    ],
}
