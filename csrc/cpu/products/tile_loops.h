// The innermost products of tile_product.h on tiles of AMX.

#pragma once

#include "tile_layout.h"

#if defined(MOE_EXT_TILES)
namespace moe_ext {

// The lines that a part prefetches into the second cache.
struct Asked {
  const char* first;
  int64_t stride, count;
  // 0: each step prefetches 64 bytes of all lines. (All lines at once would wait for memory:
  // products of 28 rows took 1.25 times as long on a Zen 5.) Else the part prefetches so many steps
  // of one line after the other.
  int64_t steps;
};

// Rows of out that a strip's sums with a band make; null: sums are kept.
struct Target {
  char* data;
  int64_t stride;       // bytes
  const float* bias;    // of its columns
  bool is_float, adds;  // whether out has floats, to which sums are added
};

// The products of a strip's lines with a band, as far as a part of the steps goes.
struct Part {
  layout::Lines lines;
  const uint16_t* packed;
  const uint16_t* joined;  // the next band, multiplied here too; or null
  layout::Packing packing;
  int64_t numbers;               // of a line, before zeros fill its last step
  int64_t columns;               // of the band and what is joined
  int64_t first_line, end_line;  // whose sums are wanted
  bool starts;                   // with the first step of a sum
  Asked asked;
  Target target;
};

class TileLoops {
 public:
  static constexpr int64_t kPart = 8;  // steps, whose lines stay in the first cache
  static constexpr int64_t kPackedBytes = 1 << 20;
  // With at most so many rows, a weight gives the lines and the rows give the columns.
  static constexpr int64_t kMostTurned = INT64_MAX;
  // A multiple of so many numbers is read from memory without a copy that zeros fill up.
  static constexpr int64_t kReads = layout::kStep;
  // Whether columns that fit into one tile are packed narrow and prefetch the next lines in order:
  // they wait for memory. (Emerald Rapids: 3 to 7 % less time for 1 to 16 rows. Prefetches in order
  // made 20 and 24 rows 2 to 3 % slower.)
  static constexpr bool kStreams = true;
  static constexpr bool kWritesRows = false;

  // Whether a part multiplies two bands, where so many columns are left.
  static bool joins(int64_t, bool) { return false; }

  // tall, wide: whether a strip has lines for its second tile, a band columns
  template <bool tall, bool wide>
  MOE_EXT_INLINE void multiply(const Part& part, float* sums) {
    constexpr int64_t kSums = kTileLines * kTileLines;
    if (part.starts) {
      tiles_.zero<0>();
      if constexpr (wide) tiles_.zero<1>();
      if constexpr (tall) tiles_.zero<2>();
      if constexpr (tall && wide) tiles_.zero<3>();
    } else {
      tiles_.load<0>(sums, kTileBytes);
      if constexpr (wide) tiles_.load<1>(sums + kSums, kTileBytes);
      if constexpr (tall) tiles_.load<2>(sums + 2 * kSums, kTileBytes);
      if constexpr (tall && wide) tiles_.load<3>(sums + 3 * kSums, kTileBytes);
    }
    const layout::Lines lines = part.lines;
    const Asked asked = part.asked;
    const uint16_t *from = lines.numbers, *band = part.packed;
    const int64_t stride = lines.stride * 2, steps = parts(part.numbers, layout::kStep);
    const int64_t line = part.packing.line * 2;
    for (int64_t s = 0; s < steps; ++s, from += lines.step, band += part.packing.step) {
      ask(asked, s, steps);
      tiles_.load<4>(from, stride);
      tiles_.load<6>(band, line);
      tiles_.multiply<0, 4, 6>();
      if constexpr (wide) {
        tiles_.load<7>(band + layout::kTileNumbers, kTileBytes);
        tiles_.multiply<1, 4, 7>();
      }
      if constexpr (tall) {
        tiles_.load<5>(from + kTileLines * lines.stride, stride);
        tiles_.multiply<2, 5, 6>();
      }
      if constexpr (tall && wide) tiles_.multiply<3, 5, 7>();
    }
    tiles_.store<0>(sums);
    if constexpr (wide) tiles_.store<1>(sums + kSums);
    if constexpr (tall) tiles_.store<2>(sums + 2 * kSums);
    if constexpr (tall && wide) tiles_.store<3>(sums + 3 * kSums);
  }

 private:
  static MOE_EXT_INLINE void ask(const Asked& asked, int64_t step, int64_t steps) {
    if (asked.steps == 0) {
      for (int64_t i = 0; i < asked.count; ++i) {
        __builtin_prefetch(asked.first + i * asked.stride + step * kTileBytes, 0, 2);
      }
      return;
    }
    const int64_t lines = parts(asked.count, steps);
    const char* line = asked.first + step * lines * asked.stride;
    for (int64_t i = 0; i < lines; ++i, line += asked.stride) {
      for (int64_t j = 0; j < asked.steps; ++j) __builtin_prefetch(line + j * kTileBytes, 0, 2);
    }
  }

  Tiles tiles_;
};

}  // namespace moe_ext
#else
namespace moe_ext {

class TileLoops {};

}  // namespace moe_ext
#endif
