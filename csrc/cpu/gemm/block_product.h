// A product of matrices of any layout in float32, on one thread of an x86 CPU:
//
//   out [n, N] = left [n, K] @ right [K, N] + first        first: a row for all, or 0; or out
//                                                          itself, if that has floats
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
// The first panel packs a block of left before it is multiplied. If right has floats, and its rows
// are dense and no index picks them, one or two blocks read them in place; of more the first one
// does, and packs them for the others. The innermost loop prefetches what comes next, where sums go
// and of an operand: the next panel, or the next block of left while that is not packed. It asks
// for at most one cache line of each for every k; where many blocks share a panel, the next one is
// asked for by one of two or of four k. (A core waits for a dozen or two of lines at once. On an
// Emerald Rapids 64 rows and more are up to a tenth faster so, where operands come from the last
// cache.)
//
// Numbers of 16 bits become floats as they are packed. Sums wait for the next block of k in memory
// of their own, one block of out after the other, and the last block of k writes them to out. (Rows
// of out that are a multiple of 2 KiB apart share few places in the first cache. With sums in them
// steps took up to 5 % more time on a Granite Rapids.)
//
// The terms of a sum are added in the order of k, whatever the number of rows and columns. A sum
// over the rows of an expert may have a million terms: by_blocks adds up those of each block first.

#pragma once

#include "../machine/ahead.h"
#include "../machine/around_caches.h"
#include "../machine/lanes.h"
#include "pack.h"

namespace moe_ext {

struct BlockProduct {
  Matrix out;           // dense rows
  Indexed left, right;  // rows or columns are dense; those that an index picks, each by itself
  const Matrix* first;  // of out's dtype; null: 0
  bool by_blocks = false;
  bool around = false;  // out's rows are aligned to cache lines, and written around the caches

  bool is_possible() const {
    return out.dtype != ScalarType::Double && out.column_stride == 1 && left.is_dense() &&
           right.is_dense();
  }

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
    const int64_t numbers = parts(blocks * kRows * deepest + kLanes - kRows, kColumns) * kColumns;
    const int64_t panels = deepest < left.columns ? parts(out.columns, kColumns) : 0;
    const int64_t waiting = panels * blocks * block * kColumns;
    float* a = floats(packed_left.get(ScalarType::Float, 1, numbers + waiting));
    float* b = floats(packed_right.get(ScalarType::Float, kColumns, deepest));
    if (left.columns == 0) return start();
    const int64_t steps = blocks > 8 ? 4 : blocks > 4 ? 2 : 1;
    for (int64_t k = 0; k < left.columns; k += kDeep) {
      const int64_t deep = std::min(kDeep, left.columns - k);
      const Indexed lefts = left.column_range(k, k + deep);
      const auto left_of = [&](int64_t n) { return rows_of(lefts, n * block, block); };
      for (int64_t j = 0; j < out.columns; j += kColumns) {
        const Indexed panel = panel_of(k, j, kColumns);
        const bool is_whole = panel.columns == kColumns;
        Lines lines{b, kColumns, nullptr};
        if (is_whole && panel.has_rows_in_place() && panel.dtype == ScalarType::Float) {
          lines = {floats(panel.matrix()), panel.row_stride, blocks > 2 ? b : nullptr};
        } else {
          // Zeros replace old numbers: subnormal ones would slow the products down.
          if (!is_whole) std::memset(b, 0, kColumns * deep * sizeof(float));
          for (int64_t i = 0; i < panel.columns; i += kLanes) {
            pack<Lanes>(rows_of(panel.transposed(), i, kLanes), b + i, kColumns);
          }
        }
        const auto block_of_out = [&](int64_t n) {
          const int64_t column = n < blocks ? j : j + kColumns;
          const Matrix columns = rows_of(out.transposed(), column, kColumns).transposed();
          return rows_of(columns, n % blocks * block, block);
        };
        const auto waiting_block = [&](int64_t n) {
          float* sums = a + numbers + (j / kColumns * blocks + n) * block * kColumns;
          return float_rows(sums, block_of_out(n).rows, kColumns);
        };
        const bool is_last = k + deep == left.columns, goes_around = around && is_last;
        const auto target = [&](int64_t n) { return is_last ? block_of_out(n) : waiting_block(n); };
        Ahead next(j + kColumns < out.columns ? panel_of(k, j + kColumns, kColumns)
                                              : panel_of(k + kDeep, 0, kColumns));
        for (int64_t n = 0; n < blocks; ++n) {
          float* packed = a + n * kRows * deep;
          if (j == 0) pack<Lanes>(left_of(n), packed, kRows);
          const bool packs_next = j == 0 && n + 1 < blocks;
          Ahead next_left(left_of(n + 1));
          Matrix before{};
          if (k > 0) {
            before = waiting_block(n);
          } else if (adds_to_out()) {
            before = block_of_out(n);
          }
          multiply_block<Lanes>(packed, lines, deep, {before, target(n), j, goes_around},
                                Ahead(goes_around ? Matrix{} : target(n + 1)),
                                packs_next ? next_left : next, packs_next ? 1 : steps);
          if (lines.copy) lines = {b, kColumns, nullptr};
        }
      }
    }
    if (around) finish_around();
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

  // A block of out from a column on: its sums so far, if there are any, and where they go.
  struct Block {
    Matrix before, target;
    int64_t column;
    bool goes_around;
  };

  // Rows of floats that registers come from and go to. from: null: zero; later: whether it is added
  // last.
  struct Places {
    const float* from;
    int64_t from_apart;
    float* to;
    int64_t to_apart;
    bool later, goes_around;
  };

  bool adds_to_out() const { return first && first->data == out.data; }

  static float* floats(const Matrix& matrix) { return reinterpret_cast<float*>(matrix.data); }

  static Matrix float_rows(float* data, int64_t rows, int64_t columns) {
    return {reinterpret_cast<char*>(data), ScalarType::Float, rows, columns, columns, 1};
  }

  // Writes rows of floats in the dtype of `to`.
  template <int bytes>
  static MOE_EXT_INLINE void write(const Matrix& from, const Matrix& to) {
    visit_float_or_16bit(to.dtype, [&](auto zero) __attribute__((always_inline)) {
      for (int64_t i = 0; i < to.rows; ++i) {
        const float* row = row_of<const float>(from, i);
        convert<bytes>(row, to.columns, row_of<decltype(zero)>(to, i));
      }
    });
  }

  // Up to `count` rows from `begin` on.
  template <typename M>
  static M rows_of(const M& matrix, int64_t begin, int64_t count) {
    begin = std::min(begin, matrix.rows);
    return matrix.row_range(begin, std::min(begin + count, matrix.rows));
  }

  // Up to kDeep rows and `columns` columns of right.
  Indexed panel_of(int64_t k, int64_t column, int64_t columns) const {
    const Indexed rows = rows_of(right, k, kDeep);
    return rows_of(rows.transposed(), column, columns).transposed();
  }

  // Without terms.
  MOE_EXT_INLINE void start() const {
    if (adds_to_out()) return;
    for (int64_t i = 0; i < out.rows; ++i) {
      for (int64_t j = 0; j < out.columns; ++j) {
        float sum = first_of(j);
        write<16>(float_rows(&sum, 1, 1), out.row_range(i, i + 1).column_range(j, j + 1));
      }
    }
  }

  // A number of `first`, which is one row, or null.
  MOE_EXT_INLINE float first_of(int64_t column) const {
    if (!first) return 0;
    const int64_t at = column * first->column_stride;
    return visit_float_or_16bit(first->dtype, [&](auto zero) {
      return static_cast<float>(reinterpret_cast<const decltype(zero)*>(first->data)[at]);
    });
  }

  // Adds to a block of out, and prefetches the block after it and, a line for so many steps, what
  // comes next of an operand.
  template <typename Lanes>
  MOE_EXT_INLINE void multiply_block(const float* a, const Lines& lines, int64_t deep,
                                     const Block& block, const Ahead& after, Ahead& next,
                                     int64_t steps) const {
    constexpr int64_t kColumns = 2 * sizeof(Lanes) / sizeof(float);
    const auto& [before, target, column, goes_around] = block;
    float begun[kRowsOf<Lanes> * kColumns], piece[kRowsOf<Lanes> * kColumns];
    const bool is_whole = target.columns == kColumns && target.dtype == ScalarType::Float;
    Places at{nullptr, kColumns, piece, kColumns, by_blocks && before.data, false};
    if (is_whole) {
      at.to = floats(target);
      at.to_apart = target.row_stride;
      at.goes_around = goes_around;
    }
    if (before.data && before.columns == kColumns) {
      at.from = floats(before);
      at.from_apart = before.row_stride;
    } else if (before.data || first) {
      at.from = begun;
      if (!before.data) at.from_apart = 0;  // one row for all
      // Not old numbers: subnormal ones would slow the sums down.
      std::fill_n(begun, kRowsOf<Lanes> * kColumns, 0.0f);
      for (int64_t j = 0; j < std::min(kColumns, out.columns - column); ++j) {
        if (!before.data) begun[j] = first_of(column + j);
        for (int64_t i = 0; i < before.rows; ++i) {
          begun[i * kColumns + j] = floats(before)[i * before.row_stride + j];
        }
      }
    }
    with_count<kRowsOf<Lanes>>(target.rows, [&](auto n) __attribute__((always_inline)) {
      multiply<Lanes, n>(a, lines, deep, at, after, next, steps);
    });
    if (!is_whole) write<sizeof(Lanes)>(float_rows(piece, target.rows, kColumns), target);
  }

  // A core that runs a second thread has half of its instructions for each. (On such an Emerald
  // Rapids 24 products kept their rate beside 12 instructions, and lost a fifth beside 28.) So
  // steps have few, about 16 beside 24 products: the last ones ask for no lines. Lines of out are
  // asked for at once where those of an operand follow, else by every fourth step: wide gradients
  // take up to 5 % less time so on a Granite Rapids. Without the pragmas the sums would be in
  // memory; were the last loop unrolled, GCC would keep one of AVX2's there.
  template <typename Lanes, int64_t count>
  static MOE_EXT_INLINE void multiply(const float* a, const Lines& lines, int64_t deep,
                                      const Places& at, const Ahead& after, Ahead& next,
                                      int64_t steps) {
    constexpr int64_t kWidth = sizeof(Lanes) / sizeof(float);
    Lanes sums[count][2]{};
    if (at.from && !at.later) {
#pragma GCC unroll 12
      for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 2
        for (int p = 0; p < 2; ++p) {
          load(sums[i][p], at.from + i * at.from_apart + p * kWidth);
        }
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
      for (int64_t i = 0; i < count; ++i) add_row(sums[i], right, a[i]);
      a += kRowsOf<Lanes>;
      b += lines.apart;
    };
    int64_t k = 0;
    const auto ask_every = [&](auto n, Ahead& ahead) __attribute__((always_inline)) {
      for (const int64_t end = std::min(deep, k + n * ahead.asks()); k + n <= end; k += n) {
        ahead.ask();
#pragma GCC unroll 4
        for (int64_t i = 0; i < n; ++i) step(false);
      }
    };
    using Four = std::integral_constant<int64_t, 4>;
    if (copy || of_operand.asks() > 0) {
      for (const int64_t end = std::min(deep, of_out.asks()); k < end; ++k) {
        of_out.ask();
        if (steps == 1) of_operand.ask();
        step(copy != nullptr);
      }
    } else {
      ask_every(Four{}, of_out);
    }
    if (copy) {
      for (; k < deep; ++k) {
        if (steps == 1) of_operand.ask();
        step(true);
      }
    }
    if (steps == 1) {
      ask_every(std::integral_constant<int64_t, 1>{}, of_operand);
    } else if (steps == 2) {
      ask_every(std::integral_constant<int64_t, 2>{}, of_operand);
    } else {
      ask_every(Four{}, of_operand);
    }
    for (; k < deep; ++k) step(false);
    next = of_operand;
#pragma GCC unroll 12
    for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 2
      for (int p = 0; p < 2; ++p) {
        float* place = at.to + i * at.to_apart + p * kWidth;
        if (at.later) {
          Lanes before;
          load(before, at.from + i * at.from_apart + p * kWidth);
          sums[i][p] += before;
        }
        if (at.goes_around) {
          store_around(sums[i][p], place);
        } else {
          store(sums[i][p], place);
        }
      }
    }
  }

  // Adds a number of left times two registers of right. (Steps in which both products of every
  // third number broadcast it have fewer instructions and more loads: they took 1 to 4 % more time
  // on a Granite Rapids, beside a busy second core too. Other CPUs were not measured.)
  template <typename Lanes>
  static MOE_EXT_INLINE void add_row(Lanes (&sums)[2], const Lanes (&right)[2], float left) {
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) Widened<Lanes, 1>::add_lines(sums[p], right[p], left);
  }
};

}  // namespace moe_ext
