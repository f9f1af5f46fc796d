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
// sums to rows of the result, unless they are turned. If a part does not write, and has at most
// four columns for its last register, a register holds their sums with four lines:
//
//     line a   a0 .. a3 | a4 .. a7 | ..          a0 .. a3 | b0 .. b3 | c0 .. c3 | d0 .. d3
//     line b   b0 .. b3 | b4 .. b7 | ..    ->    a4 .. a7 | b4 .. b7 | c4 .. c7 | d4 .. d7
//     line c   ..                                ..
//
// Each register of the right has four pairs of each line, and is multiplied four times: by the
// first pairs of the columns, with a0 in all numbers of a, b0 in those of b, ..
//
// Sums are added in the same order everywhere.

#pragma once

#include "tile_loops.h"

#if defined(MOE_EXT_ASSEMBLES_TILES) && !defined(MOE_EXT_EMULATES_TILES)
#define MOE_EXT_PAIR_LOOPS
namespace moe_ext {

class PairLoops {
 public:
  // TileLoops explains these. The first two matter little on a Zen 5.
  static constexpr int64_t kPart = 16, kPackedBytes = 1 << 19, kMostTurned = 256;
  static constexpr int64_t kReads = 1;
  static constexpr bool kStreams = false;
  static constexpr bool kWritesRows = true;

  static bool joins(int64_t columns, bool turned) {
    return columns > layout::kBand && columns <= 3 * kTileLines + (turned ? kFour : 0);
  }

  template <bool tall, bool wide>
  void multiply(const Part& part, float* sums) {
    const int64_t registers = parts(part.columns, kTileLines);
    const int64_t last = part.columns - (registers - 1) * kTileLines;
    const bool has_fours = last <= kFour && !part.target.data;
    switch (registers - has_fours) {
      case 3: multiply_by<8, 3>(part, sums); break;
      case 2: multiply_by<8, 2>(part, sums); break;
      // Eight sums would wait for each other, so one register of columns takes 16 lines. The first
      // cache cannot hold 16 lines that are pages apart.
      case 1:
        part.lines.stride % kPage == 0 ? multiply_by<8, 1>(part, sums)
                                       : multiply_by<16, 1>(part, sums);
        break;
      default: break;
    }
    if (has_fours) multiply_fours<(tall ? 2 : 1) * kTileLines>(part, registers - 1, sums);
  }

 private:
  using Floats = layout::Floats;
  static constexpr int64_t kTileSums = kTileLines * kTileLines, kTilesOfBand = 4;
  static constexpr int64_t kPage = 2048;  // numbers
  static constexpr int64_t kFour = 4;

  // The tile of sums of a band, and of the band that is joined to it, for a register of columns.
  static constexpr int64_t tile_of(int64_t column) {
    return column / 2 * kTilesOfBand + column % 2;
  }

  // Lines of a part take turns, and each asks for its share of the lines that are needed next.
  struct Turn {
    int64_t index, count;
  };

  static MOE_EXT_INLINE void ask_next(const Part& part, int64_t number, Turn turn) {
    for (int64_t i = turn.index; i < part.asked.count; i += turn.count) {
      __builtin_prefetch(part.asked.first + number * 2 + i * part.asked.stride, 0, 2);
    }
  }

  template <int64_t kLines, int64_t kColumns>
  static void multiply_by(const Part& part, float* sums) {
    layout::apart([&](auto) __attribute__((always_inline)) {
      // All parts of a tile must begin with the same line, whether they take 8 or 16 at once.
      constexpr int64_t kFrom = kColumns == 1 ? kTileLines : kLines;
      const int64_t begin = part.first_line / kFrom * kFrom;
      Turn turn{0, parts(part.end_line - begin, kLines)};
      for (int64_t i = begin; i < part.end_line; i += kLines, ++turn.index) {
        const int64_t tile = i / kTileLines, line = i % kTileLines;
        multiply_lines<kLines, kColumns>(i, part, turn,
                                         sums + (2 * tile * kTileLines + line) * kTileLines);
      }
    });
  }

  // Multiplies kLines lines from `first` on. Without the pragmas GCC unrolls the loops too late and
  // keeps the sums in memory.
  template <int64_t kLines, int64_t kColumns>
  static MOE_EXT_INLINE void multiply_lines(int64_t first, const Part& part, Turn turn,
                                            float* memory) {
    const auto place = [&](int64_t i, int64_t c) __attribute__((always_inline)) {
      return memory + i * kTileLines + tile_of(c) * kTileSums;
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
      ask_next(part, part.numbers - left, turn);
      const uint16_t* band = packed;
      // A pair, or a number: the numbers after an odd one are not its line's.
      const auto add = [&](auto numbers) __attribute__((always_inline)) {
        Floats columns[kColumns];
#pragma GCC unroll 3
        for (int64_t c = 0; c < kColumns; ++c) {
          load(columns[c], band + (c < 2 ? c * layout::kTileNumbers : joined));
        }
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLines; ++i) {
          std::memcpy(&numbers, at[i / 4] + i % 4 * stride, sizeof(numbers));
          const Floats line = Floats(uint32_t{numbers} - layout::Pairs{});
#pragma GCC unroll 3
          for (int64_t c = 0; c < kColumns; ++c) add_pairs(sums[i][c], line, columns[c]);
        }
#pragma GCC unroll 4
        for (int64_t i = 0; i < kLines / 4; ++i) at[i] += 4;
        band += layout::kStep;
      };
      const int64_t numbers = std::min(left, layout::kStep);
      for (int64_t p = 0; p < numbers / 2; ++p) add(uint32_t{});
      if (numbers % 2 != 0) add(uint16_t{});
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

  // The products of kLines lines with a register's columns, of which there are at most four.
  template <int64_t kLines>
  static void multiply_fours(const Part& part, int64_t column, float* sums) {
    layout::apart([&](auto) __attribute__((always_inline)) {
      const uint16_t* band = column < 2 ? part.packed : part.joined;
      multiply_groups<kLines / kFour>(part, band + column % 2 * layout::kTileNumbers,
                                      sums + tile_of(column) * kTileSums, column == 0);
    });
  }

  // is_alone: whether the part has no other columns
  template <int64_t kGroups>
  static MOE_EXT_INLINE void multiply_groups(const Part& part, const uint16_t* packed,
                                             float* memory, bool is_alone) {
    const auto place = [&](int64_t i) __attribute__((always_inline)) {
      return memory + (i / kTileLines * 2 * kTileLines + i % kTileLines) * kTileLines;
    };
    Floats sums[kGroups];
#pragma GCC unroll 8
    for (int64_t g = 0; g < kGroups; ++g) {
      sums[g] = Floats{};
      if (part.starts) continue;
      Floats lines[kFour];
#pragma GCC unroll 4
      for (int64_t i = 0; i < kFour; ++i) load(lines[i], place(g * kFour + i));
      layout::turn_lanes(lines);
      sums[g] = lines[0];
    }
    const uint16_t* from = part.lines.numbers;
    for (int64_t left = part.numbers; left > 0; left -= layout::kStep) {
      if (is_alone) ask_next(part, part.numbers - left, {0, 1});
#pragma GCC unroll 2
      for (int64_t tile = 0; tile < kGroups; tile += kFour) {
        layout::Pairs lines[kFour][kFour];
#pragma GCC unroll 4
        for (int64_t g = 0; g < kFour; ++g) {
#pragma GCC unroll 4
          for (int64_t i = 0; i < kFour; ++i) {
            const uint16_t* line = from + ((tile + g) * kFour + i) * part.lines.stride;
            left < layout::kStep ? load_first<64>(lines[g][i], line, left * 2)
                                 : load(lines[g][i], line);
          }
          layout::turn_lanes(lines[g]);
        }
#pragma GCC unroll 4
        for (int64_t i = 0; i < kFour; ++i) {
          const uint16_t* columns = packed + i * kFour * layout::kStep;
          add_fours<0>(sums + tile, lines, i, columns);
          add_fours<1>(sums + tile, lines, i, columns);
          add_fours<2>(sums + tile, lines, i, columns);
          add_fours<3>(sums + tile, lines, i, columns);
        }
      }
      from += part.lines.step;
      packed += layout::kBandNumbers;
    }
#pragma GCC unroll 8
    for (int64_t g = 0; g < kGroups; ++g) {
      Floats lines[kFour] = {sums[g], sums[g], sums[g], sums[g]};
      layout::turn_lanes(lines);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kFour; ++i) store(lines[i], place(g * kFour + i));
    }
  }

  // The products of the i-th four pairs of the lines of four groups, the p-th of them.
  template <int p>
  static MOE_EXT_INLINE void add_fours(Floats* sums, const layout::Pairs (&lines)[kFour][kFour],
                                       int64_t i, const uint16_t* packed) {
    layout::Pairs columns;
    const uint16_t* four = packed + p * layout::kStep;
    asm("vbroadcasti32x4 %1, %0"
        : "=v"(columns)
        : "m"(*reinterpret_cast<const uint16_t (*)[2 * kFour]>(four)));
#pragma GCC unroll 4
    for (int64_t g = 0; g < kFour; ++g) {
      layout::Pairs line;
      shuffle<p, p, p, p>(line, lines[g][i], lines[g][i]);
      add_pairs(sums[g], line, columns);
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
        layout::write(numbers, std::min(part.columns - column, layout::kBand), row + column * 2);
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
        layout::write_floats(sums[i][c], part.columns - column, to.adds, row + column * 4);
      }
    }
  }
};

}  // namespace moe_ext
#endif
