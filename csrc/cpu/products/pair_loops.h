// The innermost products of tile_product.h in registers, by AVX512-BF16:
//
//                     a band of 32 columns      for each pair of numbers
//                      ┌─────────┬────────┐       load the columns' pairs       (2 registers)
//                      └─────────┴────────┘       for each of 8 lines
//         8 lines ┌──┐ ┌─────────┬────────┐         broadcast its pair          (1 register)
//                 │  │ │      sums        │         add products to its sums    (16 registers)
//                 └──┘ └─────────┴────────┘
//
// If a band and at most 16 columns are left, a third register holds these. The last part writes its
// sums to rows of the result.

#pragma once

#include "tile_loops.h"

#if defined(MOE_EXT_ASSEMBLES_TILES) && !defined(MOE_EXT_EMULATES_TILES)
#define MOE_EXT_PAIR_LOOPS
namespace moe_ext {

class PairLoops {
 public:
  // TileLoops explains these. The first two matter little on a Zen 5.
  static constexpr int64_t kPart = 16, kPackedBytes = 1 << 19, kMostTurned = 128;
  static constexpr int64_t kReads = 2;
  static constexpr bool kWritesRows = true, kJoins = true;

  template <bool tall, bool wide>
  MOE_EXT_INLINE void multiply(const Part& part, float* sums) {
    for (int64_t i = 0; i < part.asked.count; ++i) {
      const char* line = part.asked.first + i * part.asked.stride;
      for (int64_t k = 0; k < part.numbers * 2; k += 64) __builtin_prefetch(line + k, 0, 2);
    }
    // Eight sums would wait for each other, so one register of columns takes 16 lines. The first
    // cache cannot hold 16 lines that are pages apart.
    if (part.joined) return multiply_by<8, 3>(part, sums);
    if (wide) return multiply_by<8, 2>(part, sums);
    part.lines.stride % kPage == 0 ? multiply_by<8, 1>(part, sums) : multiply_by<16, 1>(part, sums);
  }

 private:
  using Floats = layout::Floats;
  static constexpr int64_t kTileSums = kTileLines * kTileLines, kTilesOfBand = 4;
  static constexpr int64_t kPage = 2048;  // numbers

  template <int64_t kLines, int64_t kColumns>
  static MOE_EXT_INLINE void multiply_by(const Part& part, float* sums) {
    // All parts of a tile must begin with the same line, whether they take 8 or 16 at once.
    constexpr int64_t kFrom = kColumns == 1 ? kTileLines : kLines;
    for (int64_t i = part.first_line / kFrom * kFrom; i < part.end_line; i += kLines) {
      const int64_t tile = i / kTileLines, line = i % kTileLines;
      multiply_lines<kLines, kColumns>(i, part, sums + (2 * tile * kTileLines + line) * kTileLines);
    }
  }

  // Multiplies kLines lines from `first` on. Without the pragmas GCC unrolls the loops too late and
  // keeps the sums in memory.
  template <int64_t kLines, int64_t kColumns>
  static MOE_EXT_INLINE void multiply_lines(int64_t first, const Part& part, float* memory) {
    const auto place = [&](int64_t i, int64_t c) __attribute__((always_inline)) {
      return memory + i * kTileLines + (c < 2 ? c : kTilesOfBand) * kTileSums;
    };
    if (part.target.data) {
      layout::ask(part.target.data + first * part.target.stride, part.target.stride, kLines);
    }
    Floats sums[kLines][kColumns];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLines; ++i) {
#pragma GCC unroll 3
      for (int64_t c = 0; c < kColumns; ++c) {
        sums[i][c] = Floats{};
        if (!part.starts) load(sums[i][c], place(i, c));
      }
    }
    const int64_t stride = part.lines.stride * 2;
    const int64_t joined = kColumns > 2 ? part.joined - part.packed : 0;
    const uint16_t *from = part.lines.numbers + first * part.lines.stride, *packed = part.packed;
    for (int64_t left = part.numbers; left > 0; left -= layout::kStep) {
      // Every fourth line has an address of its own. Eight addresses would not fit into registers.
      const char* at[kLines / 4];
#pragma GCC unroll 4
      for (int64_t i = 0; i < kLines / 4; ++i) {
        at[i] = reinterpret_cast<const char*>(from) + 4 * i * stride;
      }
      const uint16_t* band = packed;
      const int64_t pairs = parts(std::min(left, layout::kStep), 2);
      for (int64_t p = 0; p < pairs; ++p, band += layout::kStep) {
        Floats columns[kColumns];
#pragma GCC unroll 3
        for (int64_t c = 0; c < kColumns; ++c) {
          load(columns[c], band + (c < 2 ? c * layout::kTileNumbers : joined));
        }
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLines; ++i) {
          uint32_t pair;
          std::memcpy(&pair, at[i / 4] + i % 4 * stride, sizeof(pair));
          const Floats line = Floats(pair - layout::Pairs{});
#pragma GCC unroll 3
          for (int64_t c = 0; c < kColumns; ++c) add_pairs(sums[i][c], line, columns[c]);
        }
#pragma GCC unroll 4
        for (int64_t i = 0; i < kLines / 4; ++i) at[i] += 4;
      }
      from += part.lines.step;
      packed += layout::kBandNumbers;
    }
    if (part.target.data) return write(part, first, sums);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLines; ++i) {
#pragma GCC unroll 3
      for (int64_t c = 0; c < kColumns; ++c) store(sums[i][c], place(i, c));
    }
  }

  template <int64_t kLines, int64_t kColumns>
  static MOE_EXT_INLINE void write(const Part& part, int64_t first,
                                   const Floats (&sums)[kLines][kColumns]) {
    const Target& to = part.target;
    if (to.is_float) return write_floats(part, first, sums);
    Floats bias[kColumns];
    for (int64_t c = 0; c < kColumns; ++c) load(bias[c], to.bias + c * kTileLines);
    char* row = to.data + first * to.stride;
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLines; ++i, row += to.stride) {
      if (first + i >= part.end_line) return;
#pragma GCC unroll 2
      for (int64_t c = 0; c < kColumns; c += 2) {
        const int64_t next = std::min(c + 1, kColumns - 1), column = c * kTileLines;
        layout::Numbers numbers;
        layout::narrow(sums[i][c] + bias[c], sums[i][next] + bias[next], numbers);
        layout::write(numbers, std::min(to.columns - column, layout::kBand), row + column * 2);
      }
    }
  }

  template <int64_t kLines, int64_t kColumns>
  static MOE_EXT_INLINE void write_floats(const Part& part, int64_t first,
                                          const Floats (&sums)[kLines][kColumns]) {
    const Target& to = part.target;
    char* row = to.data + first * to.stride;
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLines; ++i, row += to.stride) {
      if (first + i >= part.end_line) return;
      if (first + i < part.first_line) continue;  // the strip before has added it
#pragma GCC unroll 3
      for (int64_t c = 0; c < kColumns; ++c) {
        const int64_t column = c * kTileLines;
        layout::write_floats(sums[i][c], to.columns - column, to.adds, row + column * 4);
      }
    }
  }
};

}  // namespace moe_ext
#endif
