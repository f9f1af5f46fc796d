// out [n, N] = rows [n, M] @ weight [N, M]^T + bias [1, N] of floats, for up to some dozens of
// rows, where the rows of the weight are dense. One thread of an x86 CPU with AVX-512.
//
// Four numbers of a line of the weight at a time are spread over a register, from the weight's own
// memory. The rows are packed four at a time, so that a register has four numbers of each:
//
//    row 0 │ a b c d ┐                            w x y z │ a line of the weight
//    row 1 │ e f g h │  a b c d e f g h i j k l m n o p
//    row 2 │ i j k l │  × × × × × × × × × × × × × × × ×
//    row 3 │ m n o p ┘  w x y z w x y z w x y z w x y z  is added to sums of four rows
//
// Lanes that are sums over every fourth term of a row are added up at the end. With a sum per row
// in a lane, few rows would leave lanes empty; with one row in a register, as in few_rows.h,
// sixteen lanes would be added up for each number of out.
//
// The order of a sum's terms depends neither on the number of rows nor on that of columns.

#pragma once

#include <algorithm>

#include "../machine/lanes.h"
#include "pack.h"

namespace moe_ext {

struct QuadProduct {
  static constexpr int64_t kLeastColumns = 16;

  Matrix out, rows, weight;  // dense rows; N >= kLeastColumns
  const Matrix* bias;        // null: 0

  template <int bytes>
  MOE_EXT_INLINE void run(Panel& memory) const {
    using Lanes = Vector<float, bytes>;
    const int64_t fours = parts(rows.columns, kFour), registers = parts(rows.rows, kRows<Lanes>);
    const int64_t block = parts(registers, parts(registers, kMost));
    const Matrix panel = memory.get(ScalarType::Float, fours * registers, bytes / sizeof(float));
    auto* packed = reinterpret_cast<Lanes*>(panel.data);
    for (int64_t r = 0; r < registers; r += block) {
      pack_block(packed + r * fours, r, std::min(block, registers - r));
    }
    with_count<kMost>(block, [&](auto most) __attribute__((always_inline)) {
      constexpr int64_t width = most == 1 ? 16 : most <= 3 ? 8 : 4;
      static_assert(width <= kLeastColumns);
      for (int64_t j = 0; j < weight.rows; j += width) {
        const int64_t column = std::min(j, weight.rows - width);  // some columns may come again
        for (int64_t r = 0; r < registers; r += block) {
          const auto multiply_block = [&](auto n) __attribute__((always_inline)) {
            multiply<Lanes, n, width>(packed + r * fours, r, column);
          };
          with_count<most>(std::min(block, registers - r), multiply_block);
        }
      }
    });
  }

 private:
  // Registers of a block: their sums with four columns, and they themselves, fit into the CPU's.
  static constexpr int64_t kMost = 6, kFour = 4, kLine = 64;

  template <typename Lanes>
  static constexpr int64_t kRows = sizeof(Lanes) / sizeof(float) / kFour;

  // Packs `count` registers from the first on, those of the same columns after each other. The last
  // row takes the place of rows that are missing.
  template <typename Lanes>
  MOE_EXT_INLINE void pack_block(Lanes* to, int64_t first, int64_t count) const {
    const int64_t full = rows.columns / kFour, rest = rows.columns % kFour;
    for (int64_t r = 0; r < count; ++r) {
      const float* lines[kRows<Lanes>];
      for (int64_t i = 0; i < kRows<Lanes>; ++i) {
        const int64_t row = (first + r) * kRows<Lanes> + i;
        lines[i] = row_of<const float>(rows, std::min(row, rows.rows - 1));
      }
      const auto pack_fours = [&](int64_t v, const auto& at) __attribute__((always_inline)) {
        load_fours<kRows<Lanes>>(to[v * count + r], at);
      };
      for (int64_t v = 0; v < full; ++v) {
        pack_fours(v,
                   [&](int64_t i) __attribute__((always_inline)) { return lines[i] + v * kFour; });
      }
      if (rest == 0) continue;
      float last[kRows<Lanes>][kFour]{};
      for (int64_t i = 0; i < kRows<Lanes>; ++i) {
        std::copy_n(lines[i] + full * kFour, rest, last[i]);
      }
      pack_fours(full, [&](int64_t i) __attribute__((always_inline)) { return last[i]; });
    }
  }

  // The products of `count` registers of rows, from `first` on, with `width` lines. Without the
  // pragmas the sums would be in memory.
  template <typename Lanes, int64_t count, int64_t width>
  MOE_EXT_INLINE void multiply(const Lanes* packed, int64_t first, int64_t column) const {
    Lanes sums[width][count]{};
    const float* line = row_of<const float>(weight, column);
    const int64_t stride = weight.row_stride;
    // The loop asks for as many lines as it reads, those that follow in memory: beyond the weight's
    // last ones these need not be memory of ours. It asks for the second cache, as on Intel's CPUs
    // lines.h does.
    auto next = reinterpret_cast<uintptr_t>(line) + width * stride * sizeof(float);
    const auto add_fours = [&](const float* fours, int64_t apart) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int64_t c = 0; c < width; ++c) {
        Lanes four;
        spread(four, fours + c * apart);
#pragma GCC unroll 6
        for (int64_t r = 0; r < count; ++r) add_product(sums[c][r], four, packed[r]);
      }
      packed += count;
    };
    for (int64_t v = 0; v < rows.columns / kFour; ++v, line += kFour) {
      add_fours(line, stride);
#pragma GCC unroll 4
      for (int64_t i = 0; i < width / kFour; ++i, next += kLine) {
        __builtin_prefetch(reinterpret_cast<const void*>(next), 0, 2);
      }
    }
    if (const int64_t rest = rows.columns % kFour) {
      float last[width][kFour]{};
      for (int64_t c = 0; c < width; ++c) std::copy_n(line + c * stride, rest, last[c]);
      add_fours(last[0], kFour);
    }
#pragma GCC unroll 4
    for (int64_t c = 0; c < width; c += kFour) {
      Lanes more{};
      if (bias) spread(more, row_of<const float>(*bias, 0) + column + c);
#pragma GCC unroll 6
      for (int64_t r = 0; r < count; ++r) {
        Lanes four[kFour] = {sums[c][r], sums[c + 1][r], sums[c + 2][r], sums[c + 3][r]};
        transpose(four);
        four[0] = (four[0] + four[1]) + (four[2] + four[3]) + more;
        store_fours(four[0], (first + r) * kRows<Lanes>, column + c,
                    std::make_integer_sequence<int, kRows<Lanes>>{});
      }
    }
  }

  // The same four numbers in all of a register.
  template <typename Lanes>
  static MOE_EXT_INLINE void spread(Lanes& all, const float* four) {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
    if constexpr (sizeof(Lanes) == 64) {
      Lanes whole;
      asm("vbroadcastf32x4 %1, %0"
          : "=v"(whole)
          : "m"(*reinterpret_cast<const float (*)[kFour]>(four)));
      all = whole;
      return;
    }
#endif
    load_fours<kRows<Lanes>>(all, [&](int64_t) { return four; });
  }

  // Writes four columns of the rows that there are from `row` on.
  template <typename Lanes, int... i>
  MOE_EXT_INLINE void store_fours(const Lanes& lanes, int64_t row, int64_t column,
                                  std::integer_sequence<int, i...>) const {
    float* to = row_of<float>(out, row) + column;
    const int64_t count = rows.rows - row;
    ((i < count ? store_four<i>(lanes, to + i * out.row_stride) : void()), ...);
  }

  template <int i, typename Lanes>
  static MOE_EXT_INLINE void store_four(const Lanes& lanes, float* to) {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
    if constexpr (sizeof(Lanes) == 64) {
      asm("vextractf32x4 %2, %1, %0"
          : "=m"(*reinterpret_cast<float (*)[kFour]>(to))
          : "v"(lanes), "i"(i));
      return;
    }
#endif
    std::memcpy(to, reinterpret_cast<const char*>(&lanes) + i * 16, 16);
  }
};

}  // namespace moe_ext
