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
// A panel of right stays in the first cache while all rows of left go by, from the second cache.
// The first panel packs a block of left before it is multiplied. If right's rows are dense, one
// or two blocks read them in place; of more the first one does, and packs them for the others. The
// innermost loop prefetches what comes next, of out and of an operand: the next panel, or the next
// block of left while that is not packed. It asks for at most one cache line of each for every k.
// (On a Sapphire Rapids several lines for every k were slower.)
//
// The terms of a sum are added in the order of k, whatever the number of rows and columns. A sum
// over the rows of an expert may have a million terms: by_blocks adds up those of each block first.

#pragma once

#include "lanes.h"

namespace moe_ext {

// Prefetches the memory of a matrix, one cache line a call. The addresses need not be valid.
class Ahead {
 public:
  explicit Ahead(const Matrix& matrix) {
    const Matrix dense = matrix.column_stride == 1 ? matrix : matrix.transposed();
    bytes_ = dense.columns * dense.width();
    apart_ = dense.row_stride * dense.width();
    rows_ = bytes_ > 0 ? dense.rows : 0;
    begin_row(reinterpret_cast<uintptr_t>(dense.data));
  }

  // Prefetches into the first cache. On a Sapphire Rapids the second cache alone makes 16 and 24
  // rows 3 to 6 % slower, and 64 rows no faster.
  MOE_EXT_INLINE void ask() {
    if (rows_ == 0) return;
    __builtin_prefetch(reinterpret_cast<const void*>(line_));
    line_ += kLine;
    if (line_ < end_) return;
    --rows_;
    begin_row(row_ + apart_);
  }

  // At most so many calls of ask() ask for a line.
  int64_t asks() const { return rows_ * (bytes_ / kLine + 2); }

 private:
  static constexpr uintptr_t kLine = 64;

  MOE_EXT_INLINE void begin_row(uintptr_t row) {
    row_ = row;
    line_ = row - row % kLine;
    end_ = row + bytes_;
  }

  uintptr_t row_, line_, end_;
  int64_t bytes_, apart_, rows_;
};

struct BlockProduct {
  Matrix out, left, right;  // out has dense rows; left and right are dense in one dimension
  const Matrix* first;      // null: 0
  bool by_blocks = false;

  template <int bytes>
  MOE_EXT_INLINE void run(Panel& packed_left, Panel& packed_right) const {
    using Lanes = Vector<float, bytes>;
    constexpr int64_t kLanes = bytes / sizeof(float), kRows = kRowsOf<Lanes>, kColumns = 2 * kLanes;
    // Rows are divided evenly among blocks.
    const int64_t blocks = (left.rows + kRows - 1) / kRows;
    const int64_t block = blocks ? (left.rows + blocks - 1) / blocks : 1;
    const int64_t deepest = std::min(kDeep, left.columns);
    // Registers of left are written kRows numbers apart, so the last one goes past its block, into
    // the next one, which is packed after it.
    const int64_t numbers = blocks * kRows * deepest + kLanes - kRows;
    float* a = floats(packed_left.get(ScalarType::Float, 1, numbers));
    float* b = floats(packed_right.get(ScalarType::Float, kColumns, deepest));
    if (left.columns == 0) return start();
    for (int64_t k = 0; k < left.columns; k += kDeep) {
      const int64_t deep = std::min(kDeep, left.columns - k);
      const Matrix lefts = left.column_range(k, k + deep);
      const auto left_of = [&](int64_t n) { return rows_of(lefts, n * block, block); };
      for (int64_t j = 0; j < out.columns; j += kColumns) {
        const Matrix panel = panel_of(k, j, kColumns);
        const bool is_whole = panel.columns == kColumns;
        Lines lines{b, kColumns, nullptr};
        if (is_whole && panel.column_stride == 1) {
          lines = {floats(panel), panel.row_stride, blocks > 2 ? b : nullptr};
        } else {
          // Zeros replace old numbers: subnormal ones would slow the products down.
          if (!is_whole) std::memset(b, 0, kColumns * deep * sizeof(float));
          for (int64_t i = 0; i < panel.columns; i += kLanes) {
            pack<Lanes>(rows_of(panel.transposed(), i, kLanes), b + i, kColumns);
          }
        }
        const auto block_of = [&](int64_t n) {
          const int64_t column = n < blocks ? j : j + kColumns;
          const Matrix columns = rows_of(out.transposed(), column, kColumns).transposed();
          return rows_of(columns, n % blocks * block, block);
        };
        Ahead next(j + kColumns < out.columns ? panel_of(k, j + kColumns, kColumns)
                                              : panel_of(k + kDeep, 0, kColumns));
        for (int64_t n = 0; n < blocks; ++n) {
          float* packed = a + n * kRows * deep;
          if (j == 0) pack<Lanes>(left_of(n), packed, kRows);
          Ahead next_left(left_of(n + 1));
          const Block at{block_of(n), n * block, j, k == 0};
          multiply_block<Lanes>(packed, lines, deep, at, Ahead(block_of(n + 1)),
                                j == 0 && n + 1 < blocks ? next_left : next);
          if (lines.copy) lines = {b, kColumns, nullptr};
        }
      }
    }
  }

 private:
  template <typename Lanes>
  static constexpr int64_t kRowsOf = sizeof(Lanes) == 64   ? 12
                                     : sizeof(Lanes) == 32 ? 6
                                                           : 4;
  static constexpr int64_t kDeep = 256;

  // Rows of right, each `apart` numbers after the one before. `multiply` packs them into `copy`
  // unless it is null.
  struct Lines {
    const float* at;
    int64_t apart;
    float* copy;
  };

  // A block of out, whose first element is [row, column]; `starts`: from `first`.
  struct Block {
    Matrix out;
    int64_t row, column;
    bool starts;
  };

  static float* floats(const Matrix& matrix) { return reinterpret_cast<float*>(matrix.data); }

  // Up to `count` rows from `begin` on.
  static Matrix rows_of(const Matrix& matrix, int64_t begin, int64_t count) {
    begin = std::min(begin, matrix.rows);
    return matrix.row_range(begin, std::min(begin + count, matrix.rows));
  }

  // Up to kDeep rows and `columns` columns of right.
  Matrix panel_of(int64_t k, int64_t column, int64_t columns) const {
    const Matrix rows = rows_of(right, k, kDeep);
    return rows_of(rows.transposed(), column, columns).transposed();
  }

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

  // to[k * apart + i] = matrix[i, k] for all rows i, up to the number of lanes. The other lanes are
  // written over by the next k, or have sums that nobody reads.
  template <typename Lanes>
  static MOE_EXT_INLINE void pack(const Matrix& matrix, float* to, int64_t apart) {
    constexpr int64_t kLanes = sizeof(Lanes) / sizeof(float);
    if (matrix.row_stride != 1) {
      return with_count<kLanes / 4>(parts(matrix.rows, 4),
                                    [&](auto fours) __attribute__((always_inline)) {
                                      pack_lines<Lanes, fours>(matrix, to, apart);
                                    });
    }
    with_count<kLanes>(matrix.rows, [&](auto n) __attribute__((always_inline)) {
      for (int64_t k = 0; k < matrix.columns; ++k) {
        std::memcpy(to + k * apart, floats(matrix) + k * matrix.column_stride, n * sizeof(float));
      }
    });
  }

  // The same of rows that are dense, four columns of all at a time.
  template <typename Lanes, int64_t fours>
  static MOE_EXT_INLINE void pack_lines(const Matrix& matrix, float* to, int64_t apart) {
    const int64_t rows = matrix.rows, deep = matrix.columns, stride = matrix.row_stride;
    // lines: the first row of every four. last: from there to the rows of the last four, which may
    // be fewer. A stride needs fewer registers than an address for every row.
    const float* lines[fours];
    for (int64_t i = 0; i < fours; ++i) lines[i] = floats(matrix) + 4 * i * stride;
    int64_t last[4];
    for (int64_t r = 0; r < 4; ++r) last[r] = std::min(r, rows - 4 * (fours - 1) - 1) * stride;
    int64_t k = 0;
    for (; k + 4 <= deep; k += 4) {
      Lanes four[4];
      for (int64_t r = 0; r < 4; ++r) {
        load_fours<fours>(four[r], [&](int64_t i) __attribute__((always_inline)) {
          return lines[i] + (i + 1 < fours ? r * stride : last[r]);
        });
      }
      transpose(four);
      for (int64_t r = 0; r < 4; ++r) store(four[r], to + (k + r) * apart);
      for (int64_t i = 0; i < fours; ++i) lines[i] += 4;
    }
    for (; k < deep; ++k) {
      for (int64_t i = 0; i < rows; ++i) to[k * apart + i] = floats(matrix)[i * stride + k];
    }
  }

  // Four numbers from each of at(0), at(1), ..., and zeros.
  template <int64_t count, typename V, typename At>
  static MOE_EXT_INLINE void load_fours(V& v, const At& at) {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
    // GCC would build the register in memory, and its load would wait for the stores.
    struct Four {
      float numbers[4];
    };
    const auto four = [&](int64_t i) __attribute__((always_inline)) {
      return reinterpret_cast<const Four*>(at(i));
    };
    V whole;
    if constexpr (sizeof(V) == 64) {
      asm("vmovups %1, %x0" : "=v"(whole) : "m"(*four(0)));
      if constexpr (count > 1) asm("vinsertf32x4 $1, %1, %0, %0" : "+v"(whole) : "m"(*four(1)));
      if constexpr (count > 2) asm("vinsertf32x4 $2, %1, %0, %0" : "+v"(whole) : "m"(*four(2)));
      if constexpr (count > 3) asm("vinsertf32x4 $3, %1, %0, %0" : "+v"(whole) : "m"(*four(3)));
    } else if constexpr (sizeof(V) == 32) {
      asm("vmovups %1, %x0" : "=x"(whole) : "m"(*four(0)));
      if constexpr (count > 1) asm("vinsertf128 $1, %1, %0, %0" : "+x"(whole) : "m"(*four(1)));
    } else {
      load(whole, at(0));
    }
    v = whole;
#else
    float fours[sizeof(V) / sizeof(float)] = {};
    for (int64_t i = 0; i < count; ++i) std::memcpy(fours + 4 * i, at(i), 16);
    load(v, fours);
#endif
  }

  // Adds to a block of out, and prefetches the block after it and what comes next of an operand.
  template <typename Lanes>
  MOE_EXT_INLINE void multiply_block(const float* a, const Lines& lines, int64_t deep,
                                     const Block& block, const Ahead& after, Ahead& next) const {
    constexpr int64_t kColumns = 2 * sizeof(Lanes) / sizeof(float);
    const auto [part, row, column, starts] = block;
    float piece[kRowsOf<Lanes> * kColumns];
    const bool is_whole = part.columns == kColumns;
    float* to = is_whole ? floats(part) : piece;
    const int64_t stride = is_whole ? part.row_stride : kColumns;
    const bool adds = !starts || (first && first->data == out.data), later = by_blocks && adds;
    const bool is_zero = later || (starts && !first);
    if (!is_zero && !(is_whole && adds)) {
      for (int64_t i = 0; i < part.rows; ++i) {
        for (int64_t j = 0; j < part.columns; ++j) {
          to[i * stride + j] =
              adds ? floats(part)[i * part.row_stride + j] : first_of(row + i, column + j);
        }
        // Not old numbers: subnormal ones would slow the sums down.
        for (int64_t j = part.columns; j < kColumns; ++j) to[i * stride + j] = 0;
      }
    }
    with_count<kRowsOf<Lanes>>(part.rows, [&](auto n) __attribute__((always_inline)) {
      multiply<Lanes, n>(a, lines, deep, to, stride, is_zero, later && is_whole, after, next);
    });
    if (is_whole) return;
    for (int64_t i = 0; i < part.rows; ++i) {
      float* line = floats(part) + i * part.row_stride;
      for (int64_t j = 0; j < part.columns; ++j) {
        const float sum = piece[i * kColumns + j];
        line[j] = later ? line[j] + sum : sum;
      }
    }
  }

  // A core that runs a second thread has half of its instructions for each. (On such an Emerald
  // Rapids 24 products kept their rate beside 12 instructions, and lost a fifth beside 28.) So
  // steps have few: only the first ones ask for lines of out, the last ones for none, and every
  // third row is broadcast as it is multiplied; all rows would be too many loads. Without the
  // pragmas the sums would be in memory.
  template <typename Lanes, int64_t count>
  static MOE_EXT_INLINE void multiply(const float* a, const Lines& lines, int64_t deep, float* to,
                                      int64_t stride, bool is_zero, bool later, const Ahead& after,
                                      Ahead& next) {
    constexpr int64_t kWidth = sizeof(Lanes) / sizeof(float);
    Lanes sums[count][2]{};
    if (!is_zero) {
#pragma GCC unroll 12
      for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 2
        for (int p = 0; p < 2; ++p) load(sums[i][p], to + i * stride + p * kWidth);
      }
    }
    Ahead of_out = after, of_operand = next;  // copies, which may stay in registers
    const float* b = lines.at;
    float* copy = lines.copy;
    const auto step = [&](bool copies) __attribute__((always_inline)) {
      Lanes right[2];
#pragma GCC unroll 2
      for (int p = 0; p < 2; ++p) load(right[p], b + p * kWidth);
      if (copies) {
#pragma GCC unroll 2
        for (int p = 0; p < 2; ++p) store(right[p], copy + p * kWidth);
        copy += 2 * kWidth;
      }
#pragma GCC unroll 12
      for (int64_t i = 0; i < count; ++i) add_row(sums[i], right, a + i, i % 3 == 1);
      a += kRowsOf<Lanes>;
      b += lines.apart;
    };
    int64_t k = 0;
    for (const int64_t end = std::min(deep, of_out.asks()); k < end; ++k) {
      of_out.ask();
      of_operand.ask();
      step(copy != nullptr);
    }
    if (copy) {
      for (; k < deep; ++k) {
        of_operand.ask();
        step(true);
      }
    }
    for (const int64_t end = std::min(deep, k + of_operand.asks()); k < end; ++k) {
      of_operand.ask();
      step(false);
    }
#pragma GCC unroll 2
    for (; k < deep; ++k) step(false);
    next = of_operand;
#pragma GCC unroll 12
    for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 2
      for (int p = 0; p < 2; ++p) {
        float* place = to + i * stride + p * kWidth;
        if (later) {
          Lanes before;
          load(before, place);
          sums[i][p] += before;
        }
        store(sums[i][p], place);
      }
    }
  }

  // Adds a number of left times two registers of right. from_memory: it is broadcast for each of
  // both products, by the instructions that multiply.
  template <typename Lanes>
  static MOE_EXT_INLINE void add_row(Lanes (&sums)[2], const Lanes (&right)[2], const float* left,
                                     bool from_memory) {
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      if (from_memory) {
        Widened<Lanes, 1>::add_lines_from(sums[p], right[p], *left);
      } else {
        Widened<Lanes, 1>::add_lines(sums[p], right[p], *left);
      }
    }
  }
};

}  // namespace moe_ext
