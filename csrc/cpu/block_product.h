// A product of float matrices of any layout, on one thread of an x86 CPU:
//
//   out [n, N] = left [n, K] @ right [K, N] + first        first: a row for all, out itself, or 0
//
// A block of both operands is packed, so that the innermost loop reads memory in order:
//
//            kColumns                 for each k of a block
//          ┌──────────┐ right           load kColumns of right              (2 registers)
//          └──────────┘                 for each of kRows rows
//   left ┌┐┌──────────┐                   broadcast one number of left      (1 register)
//   kRows│││   sums   │                   sums += it * right                (2 kRows registers)
//        └┘└──────────┘
//
// A panel of right stays in the first cache while all rows of left go by, from the second.
// The terms of a sum are added in the order of k, whatever the number of rows and columns.

#pragma once

#include "matrix.h"
#include "vector.h"

namespace moe_ext {

struct BlockProduct {
  Matrix out, left, right;  // out has dense rows; left and right are dense in one dimension
  const Matrix* first;      // null: 0

  template <int bytes>
  MOE_EXT_INLINE void run(Panel& packed_left, Panel& packed_right) const {
    using Lanes = Vector<float, bytes>;
    constexpr int64_t kRows = kRowsOf<bytes>, kColumns = kColumnsOf<bytes>;
    // Rows are divided evenly among blocks.
    const int64_t blocks = (left.rows + kRows - 1) / kRows;
    const int64_t block = blocks ? (left.rows + blocks - 1) / blocks : 1;
    const int64_t deepest = std::min(kDeep, left.columns);
    float* a = floats(packed_left.get(ScalarType::Float, blocks * kRows, deepest));
    float* b = floats(packed_right.get(ScalarType::Float, kColumns, deepest));
    if (left.columns == 0) return start();
    for (int64_t k = 0; k < left.columns; k += kDeep) {
      const int64_t deep = std::min(kDeep, left.columns - k);
      const Matrix lefts = left.column_range(k, k + deep);
      for (int64_t n = 0; n < blocks; ++n) {
        const int64_t i = n * block, rows = std::min(block, left.rows - i);
        pack<kRows>(lefts.row_range(i, i + rows), a + n * kRows * deep);
      }
      for (int64_t j = 0; j < out.columns; j += kColumns) {
        const int64_t end = std::min(j + kColumns, out.columns);
        pack<kColumns, true>(right.row_range(k, k + deep).column_range(j, end).transposed(), b);
        for (int64_t n = 0; n < blocks; ++n) {
          const int64_t i = n * block, rows = std::min(block, left.rows - i);
          multiply_block<Lanes>(a + n * kRows * deep, b, deep,
                                out.row_range(i, i + rows).column_range(j, end), i, j, k == 0);
        }
      }
    }
  }

 private:
  template <int bytes>
  static constexpr int64_t kRowsOf = bytes == 64   ? 12
                                     : bytes == 32 ? 6
                                                   : 4;
  template <int bytes>
  static constexpr int64_t kColumnsOf = 2 * bytes / sizeof(float);
  static constexpr int64_t kDeep = 256;

  static float* floats(const Matrix& matrix) { return reinterpret_cast<float*>(matrix.data); }

  // Without terms.
  MOE_EXT_INLINE void start() const {
    for (int64_t i = 0; i < out.rows; ++i) {
      for (int64_t j = 0; j < out.columns; ++j) {
        floats(out)[i * out.row_stride + j] = first_of(i, j);
      }
    }
  }

  MOE_EXT_INLINE float first_of(int64_t row, int64_t column) const {
    if (!first) return 0;
    const int64_t of_row = first->rows == 1 ? 0 : row;
    return floats(*first)[of_row * first->row_stride + column * first->column_stride];
  }

  // to[k * width + i] = matrix[i, k], 0 for rows that are missing. prepares: asks for the rows
  // after them.
  template <int64_t width, bool prepares = false>
  static MOE_EXT_INLINE void pack(const Matrix& matrix, float* to) {
    const int64_t rows = matrix.rows, deep = matrix.columns;
    const float* from = floats(matrix);
    if (rows < width) std::memset(to, 0, width * deep * sizeof(float));
    if (matrix.row_stride == 1) {
      for (int64_t k = 0; k < deep; ++k) {
        const float* line = from + k * matrix.column_stride;
        if constexpr (prepares) prefetch_far<width>(line + width);
        if (rows == width) {
          std::memcpy(to + k * width, line, width * sizeof(float));
        } else {
          std::memcpy(to + k * width, line, rows * sizeof(float));
        }
      }
      return;
    }
    using Four = Vector<float, 16>;
    const int64_t stride = matrix.row_stride;
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
      const float* line = from + i * stride;
      int64_t k = 0;
      for (; k + 4 <= deep; k += 4) {
        Four four[4];
        if constexpr (prepares) {
          if (k % 16 == 0) {
            for (int r = 0; r < 4; ++r) prefetch_far<16>(line + (width + r) * stride + k);
          }
        }
        for (int r = 0; r < 4; ++r) load(four[r], line + r * stride + k);
        transpose(four);
        for (int r = 0; r < 4; ++r) store(four[r], to + (k + r) * width + i);
      }
      for (; k < deep; ++k) {
        for (int r = 0; r < 4; ++r) to[k * width + i + r] = line[r * stride + k];
      }
    }
    for (; i < rows; ++i) {
      for (int64_t k = 0; k < deep; ++k) to[k * width + i] = from[i * stride + k];
    }
  }

  // Into the second cache; where the numbers lie need not be memory of ours.
  template <int64_t size>
  static MOE_EXT_INLINE void prefetch_far(const float* numbers) {
    for (int64_t i = 0; i < size; i += 16) __builtin_prefetch(numbers + i, 0, 2);
  }

  // Adds to a block of out, whose first element is [row, column]; `starts`: from `first`.
  template <typename Lanes>
  MOE_EXT_INLINE void multiply_block(const float* a, const float* b, int64_t deep,
                                     const Matrix& block, int64_t row, int64_t column,
                                     bool starts) const {
    constexpr int64_t kColumns = kColumnsOf<sizeof(Lanes)>;
    float piece[kRowsOf<sizeof(Lanes)> * kColumns];
    const bool is_whole = block.columns == kColumns;
    float* to = is_whole ? floats(block) : piece;
    const int64_t stride = is_whole ? block.row_stride : kColumns;
    const bool is_zero = starts && !first, adds = !starts || (first && first->data == out.data);
    if (!is_zero && !(is_whole && adds)) {
      for (int64_t i = 0; i < block.rows; ++i) {
        for (int64_t j = 0; j < block.columns; ++j) {
          to[i * stride + j] =
              adds ? floats(block)[i * block.row_stride + j] : first_of(row + i, column + j);
        }
      }
    }
    constexpr int64_t kMost = kRowsOf<sizeof(Lanes)>;
    with_count<kMost>(block.rows, [&](auto n) __attribute__((always_inline)) {
      multiply<Lanes, n>(a, b, deep, to, stride, is_zero);
    });
    if (is_whole) return;
    for (int64_t i = 0; i < block.rows; ++i) {
      std::memcpy(floats(block) + i * block.row_stride, piece + i * kColumns,
                  block.columns * sizeof(float));
    }
  }

  template <typename Lanes, int64_t count>
  static MOE_EXT_INLINE void multiply(const float* a, const float* b, int64_t deep, float* to,
                                      int64_t stride, bool is_zero) {
    constexpr int64_t kColumns = kColumnsOf<sizeof(Lanes)>, kWidth = kColumns / 2;
    Lanes sums[count][2]{};
    if (!is_zero) {
      for (int64_t i = 0; i < count; ++i) {
        for (int p = 0; p < 2; ++p) load(sums[i][p], to + i * stride + p * kWidth);
      }
    }
    for (int64_t k = 0; k < deep; ++k, a += kRowsOf<sizeof(Lanes)>, b += kColumns) {
      Lanes right[2];
      for (int p = 0; p < 2; ++p) load(right[p], b + p * kWidth);
      for (int64_t i = 0; i < count; ++i) {
        const Lanes left = a[i] - Lanes{};  // 0 + a[i] would be computed, since it differs for -0
        for (int p = 0; p < 2; ++p) sums[i][p] += left * right[p];
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int p = 0; p < 2; ++p) store(sums[i][p], to + i * stride + p * kWidth);
    }
  }
};

}  // namespace moe_ext
