// Loops ask for the memory of a matrix before they use it.

#pragma once

#include <cstdint>

#include "matrix.h"
#include "vector.h"

namespace moe_ext {

// Prefetches the memory of a matrix, one cache line a call. Its addresses need not be valid; its
// index is read.
class Ahead {
 public:
  explicit Ahead(const Indexed& matrix) {
    const Indexed dense = matrix.has_dense_rows() ? matrix : matrix.transposed();
    bytes_ = dense.columns * dense.width();
    apart_ = dense.row_stride * dense.width();
    rows_ = bytes_ > 0 ? dense.rows : 0;
    first_ = reinterpret_cast<uintptr_t>(dense.data);
    index_ = dense.row_index;
    begin_row(index_ && rows_ > 0 ? first_ + *index_ * apart_ : first_);
  }

  // Prefetches into the first cache. On a Sapphire Rapids the second cache alone makes 16 and 24
  // rows 3 to 6 % slower, and 64 rows no faster.
  MOE_EXT_INLINE void ask() {
    if (rows_ == 0) return;
    __builtin_prefetch(reinterpret_cast<const void*>(line_));
    line_ += kLine;
    if (line_ < end_) return;
    if (--rows_ == 0) return;
    begin_row(index_ ? first_ + *++index_ * apart_ : row_ + apart_);
  }

  // At most so many calls of ask() ask for a line.
  int64_t asks() const { return is_narrow() ? rows_ : rows_ * ((bytes_ + 2 * kLine - 2) / kLine); }

 private:
  static constexpr uintptr_t kLine = 64;

  bool is_narrow() const { return bytes_ < static_cast<int64_t>(kLine); }

  MOE_EXT_INLINE void begin_row(uintptr_t row) {
    row_ = row;
    // The line that a narrow row begins in was mostly asked for with the columns before. (Gradients
    // whose rows of left are cut into such pieces take up to 3 % less time on a Granite Rapids.)
    line_ = is_narrow() ? row + bytes_ - 1 : row;
    line_ -= line_ % kLine;
    end_ = row + bytes_;
  }

  uintptr_t first_, row_, line_, end_;
  int64_t bytes_, apart_, rows_;
  const int32_t* index_;
};

}  // namespace moe_ext
