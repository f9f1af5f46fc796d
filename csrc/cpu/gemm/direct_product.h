// out [n, N] = left [n, K] @ right [K, N] + first [1, N] of floats, without packing an operand: for
// few rows, or few terms, packing takes longer than it saves. One thread of an x86 CPU with
// AVX-512.
//
//               3 registers
//             ┌─────────────┐ right            for each k load them,
//             └─────────────┘                  and for each of kRows rows
//    left ┌─┐ ┌─────────────┐                    broadcast a number of left
//   kRows │ │ │    sums     │                    sums += it * right
//         └─┘ └─────────────┘
//
// The terms of a sum are added in the order of k, whatever the number of rows and columns.

#pragma once

#include <algorithm>

#include "../machine/lanes.h"

namespace moe_ext {

struct DirectProduct {
  Matrix out, left, right;  // out and right: dense rows of whole registers; left: any strides
  const Matrix* first;      // one row for all of out's; null: 0

  template <int bytes>
  MOE_EXT_INLINE void run() const {
    using Lanes = Vector<float, bytes>;
    constexpr int64_t kLanes = bytes / sizeof(float);
    const int64_t registers = out.columns / kLanes;
    const int64_t twos = registers == 1 ? 0 : (kMost - registers % kMost) % kMost;
    const int64_t threes = (registers - 2 * twos) / kMost;
    // So many columns of right as the first cache holds go by all rows.
    const int64_t line = std::max<int64_t>(1, left.columns * kMost * bytes);
    const int64_t at_once = std::max<int64_t>(1, kCached / line);
    int64_t column = 0;
    for (int64_t i = 0; i < threes; i += at_once) {
      const int64_t count = std::min(at_once, threes - i);
      add_columns<Lanes, kMost>(column, count);
      column += count * kMost * kLanes;
    }
    if (twos > 0) add_columns<Lanes, 2>(column, twos);
    if (registers == 1) add_columns<Lanes, 1>(0, 1);
  }

 private:
  static constexpr int64_t kMost = 3, kCached = 24 << 10;

  // So many rows have their sums in registers.
  template <int64_t width>
  static constexpr int64_t kRows = width == 1 ? 16 : 8;

  static float* floats(const Matrix& matrix) { return row_of<float>(matrix, 0); }

  // `count` times `width` registers of all rows.
  template <typename Lanes, int64_t width>
  MOE_EXT_INLINE void add_columns(int64_t column, int64_t count) const {
    constexpr int64_t kMostRows = kRows<width>, kColumns = width * sizeof(Lanes) / 4;
    const int64_t block = parts(left.rows, parts(left.rows, kMostRows));
    for (int64_t row = 0; row < left.rows; row += block) {
      const auto add_rows = [&](auto n) __attribute__((always_inline)) {
        for (int64_t i = 0; i < count; ++i) add<Lanes, n, width>(row, column + i * kColumns);
      };
      with_count<kMostRows>(std::min(block, left.rows - row), add_rows);
    }
  }

  // Without the pragmas the sums would be in memory.
  template <typename Lanes, int64_t count, int64_t width>
  MOE_EXT_INLINE void add(int64_t row, int64_t column) const {
    constexpr int64_t kLanes = sizeof(Lanes) / sizeof(float);
    Lanes sums[count][width]{};
    float* to = floats(out) + row * out.row_stride + column;
    if (first) {
      const float* from = floats(*first) + column;
#pragma GCC unroll 16
      for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 3
        for (int64_t p = 0; p < width; ++p) load(sums[i][p], from + p * kLanes);
      }
    }
    const int64_t apart = left.row_stride, next_a = left.column_stride, next_b = right.row_stride;
    const float* a = floats(left) + row * apart;
    const float* more = count > 8 ? a + 8 * apart : a;
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
    // Two addresses need fewer registers than strides of up to 15 rows.
    if (count > 8) asm("" : "+r"(more));
#endif
    const float* b = floats(right) + column;
    for (int64_t k = 0; k < left.columns; ++k) {
      Lanes line[width];
#pragma GCC unroll 3
      for (int64_t p = 0; p < width; ++p) {
        load(line[p], b + p * kLanes);
        __builtin_prefetch(b + (width + p) * kLanes);
      }
#pragma GCC unroll 16
      for (int64_t i = 0; i < count; ++i) {
        const float* number = i < 8 ? a + i * apart : more + (i - 8) * apart;
#pragma GCC unroll 3
        for (int64_t p = 0; p < width; ++p) {
          if constexpr (width == 1) {
            Widened<Lanes, 1>::add_lines_from(sums[i][p], line[p], *number);
          } else {
            Widened<Lanes, 1>::add_lines(sums[i][p], line[p], *number);
          }
        }
      }
      a += next_a;
      if (count > 8) more += next_a;
      b += next_b;
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 3
      for (int64_t p = 0; p < width; ++p) store(sums[i][p], to + i * out.row_stride + p * kLanes);
    }
  }
};

}  // namespace moe_ext
