// The innermost products of tile_product.h on tiles of AMX.

#pragma once

#include "tile_layout.h"

#if defined(MOE_EXT_TILES)
namespace moe_ext {

// The lines that a part prefetches into the second cache.
struct Asked {
  const char* first;
  int64_t stride, count;  // of lines, a whole strip where steps > 0
  // 0: each step prefetches 64 bytes of all lines. (All lines at once would wait for memory:
  // products of 28 rows took 1.25 times as long on a Zen 5.) Else so many steps of the lines are
  // divided evenly among the steps of the part.
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
  static constexpr int64_t kPart = 8;  // steps, whose lines stay in the first cache for all bands
  static constexpr int64_t kPackedBytes = 1 << 20;
  // With at most so many rows, a weight gives the lines and the rows give the columns.
  static constexpr int64_t kMostTurned = INT64_MAX;
  // A multiple of so many numbers is read from memory without a copy that zeros fill up.
  static constexpr int64_t kReads = layout::kStep;
  // Whether a single band streams, and columns that fit into one tile are packed narrow. (Experts
  // of 1 to 200 tokens take up to a quarter less time on an Intel CPU with 2 MB of second cache.)
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
    layout::apart([&](auto) __attribute__((always_inline)) {
      const Asked asked = part.asked;
      const int64_t steps = parts(part.numbers, layout::kStep);
      Operands at(part);
      if constexpr (tall) {
        if (asked.steps > 0) {
          InQuarters quarters(asked, 2 * steps);
          const auto ask = [&]() __attribute__((always_inline)) { quarters.ask(); };
          for (int64_t s = 0; s < steps; ++s) multiply_step<tall, wide>(at, ask);
          return;
        }
      }
      for (int64_t s = 0; s < steps; ++s) {
        for (int64_t i = 0; i < asked.count; ++i) {
          __builtin_prefetch(asked.first + i * asked.stride + s * kTileBytes, 0, 2);
        }
        multiply_step<tall, wide>(at, [] {});
      }
    });
    tiles_.store<0>(sums);
    if constexpr (wide) tiles_.store<1>(sums + kSums);
    if constexpr (tall) tiles_.store<2>(sums + 2 * kSums);
    if constexpr (tall && wide) tiles_.store<3>(sums + 3 * kSums);
  }

 private:
  // Where the operands of a step are.
  struct Operands {
    const uint16_t *lines, *band;
    int64_t lines_stride, lines_step, band_stride, band_step;  // numbers

    MOE_EXT_INLINE explicit Operands(const Part& part)
        : lines(part.lines.numbers),
          band(part.packed),
          lines_stride(part.lines.stride),
          lines_step(part.lines.step),
          band_stride(part.packing.line),
          band_step(part.packing.step) {}
  };

  // ask: called before each tile of lines. (The loops alone took up to 6 % longer for one token
  // where a step asked for its whole share at once.)
  template <bool tall, bool wide, typename Ask>
  MOE_EXT_INLINE void multiply_step(Operands& at, const Ask& ask) {
    ask();
    tiles_.load<4>(at.lines, at.lines_stride * 2);
    tiles_.load<6>(at.band, at.band_stride * 2);
    tiles_.multiply<0, 4, 6>();
    if constexpr (wide) {
      tiles_.load<7>(at.band + layout::kTileNumbers, kTileBytes);
      tiles_.multiply<1, 4, 7>();
    }
    if constexpr (tall) {
      ask();
      tiles_.load<5>(at.lines + kTileLines * at.lines_stride, at.lines_stride * 2);
      tiles_.multiply<2, 5, 6>();
    }
    if constexpr (tall && wide) tiles_.multiply<3, 5, 7>();
    at.lines += at.lines_step;
    at.band += at.band_step;
  }

  // Prefetches each quarter of a strip's lines in the order of memory, as much each of so many
  // times. Quarters take turns, so that the CPU finds the addresses of four pages at once. (In
  // small pages experts of one to 64 tokens whose lines have 4 KiB and more took 7 to 11 % less
  // time on an Intel CPU; others, and those in huge pages, about the same.)
  class InQuarters {
   public:
    MOE_EXT_INLINE InQuarters(const Asked& asked, int64_t times)
        : line_(asked.first),
          stride_(asked.stride),
          apart_(kStrip / kAtOnce * asked.stride),
          bytes_(asked.steps * kTileBytes),
          left_(kStrip / kAtOnce * asked.steps),
          share_(parts(left_, times)) {}

    MOE_EXT_INLINE void ask() {
      const int64_t count = std::min(share_, left_);
      left_ -= count;
      for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 4
        for (int64_t j = 0; j < kAtOnce; ++j) {
          __builtin_prefetch(line_ + place_ + j * apart_, 0, 2);
        }
        place_ += kTileBytes;
        if (place_ == bytes_) {
          place_ = 0;
          line_ += stride_;
        }
      }
    }

   private:
    static constexpr int64_t kStrip = layout::kStrip, kAtOnce = 4;
    static_assert(kStrip % kAtOnce == 0);

    const char* line_;
    int64_t stride_, apart_, bytes_, left_, share_, place_ = 0;
  };

  Tiles tiles_;
};

}  // namespace moe_ext
#else
namespace moe_ext {

class TileLoops {};

}  // namespace moe_ext
#endif
