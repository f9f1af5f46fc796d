// A product of bfloat16 matrices on tiles (tiles.h), on one thread:
//
//   out [n, N] = left [n, K] @ right [K, N] + first        first: a row for all, or 0
//
// One operand is read as lines of dense numbers, where they lie. Of the other one, columns are
// packed, a block that stays in the second cache while all lines go by.
//
//                  a band of 32 columns       for each step of 32 numbers
//                       ┌────┬────┐             load two tiles of the strip, two of the band
//                       │    │    │ packed      four products
//                       ├────┼────┤
//     a strip  ┌────┐   ┌────┬────┐           Bands take turns with a part of the steps, whose
//     of 32    │    │   │ 0  │ 1  │           lines stay in the first cache.
//     lines    ├────┤   ├────┼────┤
//              │    │   │ 2  │ 3  │ sums
//              └────┘   └────┴────┘
//
// Where the columns of right are dense, as those of a weight's transposed are, the lines are these,
// and what comes out is turned: a weight is read once, in the order of memory, and never copied, by
// one row as by many.
//
// The terms of a sum are added in the order of k, whatever the number of rows and columns.

#pragma once

#include <algorithm>
#include <type_traits>

#include "tile_layout.h"

#if defined(MOE_EXT_TILES)
namespace moe_ext {

struct TileProduct {
  Matrix out, left, right;  // dense in one dimension; out in that of its rows
  const Matrix* first;      // null: 0

  // tiles, memory: of the thread
  template <int bytes>
  MOE_EXT_INLINE void run(Tiles& tiles, Panel& memory) const {
    if constexpr (bytes == 64 || kEmulatesTiles) {
      if (right.row_stride == 1) {
        multiply(right.transposed(), left.transposed(), true, tiles, memory);
      } else {
        multiply(left, right, false, tiles, memory);
      }
    }
  }

 private:
  using Floats = Vector<float, 64>;
  using Pairs = layout::Pairs;
  using Lines = layout::Lines;
  static constexpr int64_t kTile = layout::kTile, kStep = layout::kStep;
  static constexpr int64_t kStrip = layout::kStrip, kBand = layout::kBand;
  static constexpr int64_t kTileSums = kTile * kTile, kSums = 4 * kTileSums;
  static constexpr int64_t kPart = 8;  // steps
  // Of many strips, a block is all steps of some columns. Of few, it is one part of many columns,
  // which are read in the order of memory, and the sums of all strips stay.
  static constexpr int64_t kPackedBytes = 1 << 20, kSumsBytes = 1 << 19, kFewStrips = 4;

  static constexpr int64_t kHalfPage = 1024, kManyBands = 8;  // numbers

  // A thread's memory.
  struct Room {
    uint16_t* packed;  // [bands, steps, 2, 16, 16, 2]: tiles of pairs of numbers
    uint16_t* copied;  // [steps, 32, 32]: lines that do not lie as they are wanted
    float* sums;       // [bands, 4, 16, 16] of a strip
    float* bias;       // [N], filled up with zeros
  };

  // What is packed: some columns and steps.
  struct Block {
    int64_t first_column, columns, bands, steps;
    bool starts, ends;  // with the first step of all, with the last
  };

  // Cache lines that are asked for ahead of their use, at each step.
  struct Asked {
    const char* first;
    int64_t stride, count;
  };

  // turned: lines are columns of out
  MOE_EXT_INLINE void multiply(const Matrix& lines, const Matrix& columns, bool turned,
                               Tiles& tiles, Panel& memory) const {
    const int64_t steps = std::max<int64_t>(1, layout::parts(lines.columns, kStep));
    const int64_t strips = layout::parts(lines.rows, kStrip),
                  all = layout::parts(columns.columns, kBand);
    const bool few = strips <= kFewStrips;
    const int64_t deep = few ? std::min(kPart, steps) : steps;
    const int64_t most =
        few ? kSumsBytes / (strips * kSums * 4) : kPackedBytes / (deep * layout::kBandNumbers * 2);
    const int64_t bands = std::clamp<int64_t>(most, 1, all);
    const Room room = room_for(bands, deep, few ? strips : 1, memory);
    for (int64_t c = 0; c < columns.columns; c += bands * kBand) {
      const int64_t width = std::min(bands * kBand, columns.columns - c);
      for (int64_t s = 0; s < steps; s += deep) {
        const int64_t begin = s * kStep, end = std::min(begin + deep * kStep, lines.columns);
        const Block block{c,
                          width,
                          layout::parts(width, kBand),
                          std::min(deep, steps - s),
                          s == 0,
                          s + deep >= steps};
        layout::pack(columns.row_range(begin, end).column_range(c, c + width), block.bands,
                     block.steps, room.packed);
        for (int64_t i = 0; i < strips; ++i) {
          // The last lines are multiplied again where there are not enough after them.
          const int64_t line = std::max<int64_t>(0, std::min(i * kStrip, lines.rows - kStrip));
          const Matrix strip =
              lines.row_range(line, std::min(line + kStrip, lines.rows)).column_range(begin, end);
          Room own = room;
          if (few) own.sums += i * bands * kSums;
          multiply_strip(tiles, strip, line, turned, block, own);
        }
      }
    }
  }

  MOE_EXT_INLINE Room room_for(int64_t bands, int64_t steps, int64_t strips, Panel& memory) const {
    const int64_t packed = bands * steps * layout::kBandNumbers / 2,
                  copied = steps * kStrip * kStep / 2;
    const int64_t sums = strips * bands * kSums, bias = layout::parts(out.columns, kBand) * kBand;
    const Matrix panel = memory.get(ScalarType::Float, 1, packed + copied + sums + bias);
    auto* floats = reinterpret_cast<float*>(panel.data);
    const Room room{reinterpret_cast<uint16_t*>(floats),
                    reinterpret_cast<uint16_t*>(floats + packed), floats + packed + copied,
                    floats + packed + copied + sums};
    std::fill_n(room.bias, bias, 0.0f);
    if (first) {
      const auto* row = reinterpret_cast<const torch::headeronly::BFloat16*>(first->data);
      for (int64_t i = 0; i < out.columns; ++i) {
        room.bias[i] = static_cast<float>(row[i * first->column_stride]);
      }
    }
    return room;
  }

  // A strip's products with all that is packed; its first line is the `line`-th.
  MOE_EXT_INLINE void multiply_strip(Tiles& tiles, const Matrix& strip, int64_t line, bool turned,
                                     const Block& block, const Room& room) const {
    // Lines half a page apart push each other out of the first cache.
    const bool collides = strip.row_stride % kHalfPage == 0 && block.bands >= kManyBands;
    const bool lies = strip.column_stride == 1 && strip.rows == kStrip && !collides;
    const int64_t whole = lies ? strip.columns / kStep : 0, bands = block.bands;
    const Lines lying{layout::numbers(strip), strip.row_stride, kStep};
    const Lines copied{room.copied, kStep, kStrip * kStep};
    // All lines, or what is left of them after the last whole step.
    if (whole < block.steps) {
      layout::copy(strip.column_range(whole * kStep, strip.columns), block.steps - whole,
                   room.copied);
    }
    for (int64_t s = 0, end; s < block.steps; s = end) {
      end = std::min(s + kPart, s < whole ? whole : block.steps);
      Lines lines = s < whole ? lying : copied;
      lines.numbers += (s < whole ? s : s - whole) * lines.step;
      // The next strip's lines are asked for by all bands, each its share.
      const char* next = strip.data + (kStrip * strip.row_stride + s * kStep) * 2;
      const int64_t stride = strip.row_stride * 2;
      for (int64_t b = 0; b < bands; ++b) {
        const Asked asked{next + b * stride, bands * stride,
                          layout::parts(std::max<int64_t>(0, kStrip - b), bands)};
        const uint16_t* packed = room.packed + (b * block.steps + s) * layout::kBandNumbers;
        float* sums = room.sums + b * kSums;
        multiply_some(tiles, lines, packed, end - s, asked, block.starts && s == 0,
                      strip.rows > kTile, block.columns - b * kBand > kTile, sums);
        if (turned && block.ends && end == block.steps) {
          write_turned(sums, room.bias + line, block.first_column + b * kBand,
                       std::min(kBand, block.columns - b * kBand), line, strip.rows);
        }
      }
    }
    if (!turned && block.ends) write(line, strip.rows, block, room);
  }

  // low, right: whether a strip has lines for its second tile, and a band columns
  static MOE_EXT_INLINE void multiply_some(Tiles& tiles, const Lines& lines, const uint16_t* packed,
                                           int64_t steps, const Asked& asked, bool starts, bool low,
                                           bool right, float* sums) {
    const auto multiply = [&](auto low, auto right) __attribute__((always_inline)) {
      multiply_part<low.value, right.value>(tiles, lines, packed, steps, asked, starts, sums);
    };
    using Yes = std::true_type;
    using No = std::false_type;
    if (low) return right ? multiply(Yes{}, Yes{}) : multiply(Yes{}, No{});
    right ? multiply(No{}, Yes{}) : multiply(No{}, No{});
  }

  template <bool low, bool right>
  static MOE_EXT_INLINE void multiply_part(Tiles& tiles, const Lines& lines, const uint16_t* packed,
                                           int64_t steps, const Asked& asked, bool starts,
                                           float* sums) {
    if (starts) {
      tiles.zero<0>();
      if constexpr (right) tiles.zero<1>();
      if constexpr (low) tiles.zero<2>();
      if constexpr (low && right) tiles.zero<3>();
    } else {
      tiles.load<0>(sums, kTileBytes);
      if constexpr (right) tiles.load<1>(sums + kTileSums, kTileBytes);
      if constexpr (low) tiles.load<2>(sums + 2 * kTileSums, kTileBytes);
      if constexpr (low && right) tiles.load<3>(sums + 3 * kTileSums, kTileBytes);
    }
    const uint16_t* from = lines.numbers;
    const int64_t stride = lines.stride * 2;
    for (int64_t s = 0; s < steps; ++s, from += lines.step, packed += layout::kBandNumbers) {
      for (int64_t i = 0; i < asked.count; ++i) {
        __builtin_prefetch(asked.first + i * asked.stride + s * kTileBytes, 0, 2);
      }
      tiles.load<4>(from, stride);
      tiles.load<6>(packed, kTileBytes);
      tiles.multiply<0, 4, 6>();
      if constexpr (right) {
        tiles.load<7>(packed + layout::kTileNumbers, kTileBytes);
        tiles.multiply<1, 4, 7>();
      }
      if constexpr (low) {
        tiles.load<5>(from + kTile * lines.stride, stride);
        tiles.multiply<2, 5, 6>();
      }
      if constexpr (low && right) tiles.multiply<3, 5, 7>();
    }
    tiles.store<0>(sums);
    if constexpr (right) tiles.store<1>(sums + kTileSums);
    if constexpr (low) tiles.store<2>(sums + 2 * kTileSums);
    if constexpr (low && right) tiles.store<3>(sums + 3 * kTileSums);
  }

  // Rows of out, from `row` on: the sums of a strip.
  MOE_EXT_INLINE void write(int64_t row, int64_t rows, const Block& block, const Room& room) const {
    for (int64_t i = 0; i < rows; ++i) {
      const float* line = room.sums + i / kTile * 2 * kTileSums + i % kTile * kTile;
      for (int64_t b = 0; b < block.bands; ++b, line += kSums) {
        const int64_t column = block.first_column + b * kBand;
        uint16_t rounded[kBand];
        for (int64_t c = 0; c < 2; ++c) {
          Floats values, bias;
          load(values, line + c * kTileSums);
          load(bias, room.bias + column + c * kTile);
          values += bias;
          Pairs bits;
          round_to_upper_half(values, bits);
          store(__builtin_convertvector(bits >> 16, Vector<uint16_t, 32>), rounded + c * kTile);
        }
        write_numbers(rounded, std::min(kBand, block.columns - b * kBand), row + i, column);
      }
    }
  }

  // Columns of out, from `column` on: the sums of a strip and a band. bias: of the lines
  MOE_EXT_INLINE void write_turned(const float* sums, const float* bias, int64_t row, int64_t rows,
                                   int64_t column, int64_t columns) const {
    for (int64_t c = 0; c < rows; c += kTile) {
      Pairs pairs[kTile];
#pragma GCC unroll 16
      for (int64_t p = 0; p < kTile; ++p) {
        const float* from = sums + (p / 8 * 2 + c / kTile) * kTileSums + 2 * p % kTile * kTile;
        Floats even, odd;
        load(even, from);
        load(odd, from + kTile);
        even += bias[2 * p];
        odd += bias[2 * p + 1];
        Pairs low, high;
        round_to_upper_half(even, low);
        round_to_upper_half(odd, high);
        pairs[p] = (low >> 16) | (high & 0xffff0000u);
      }
      layout::turn(pairs);
      for (int64_t j = 0; j < std::min(kTile, rows - c); ++j) {
        write_numbers(&pairs[j], columns, row + c + j, column);
      }
    }
  }

  // 32 numbers, or as many as there are columns.
  MOE_EXT_INLINE void write_numbers(const void* numbers, int64_t columns, int64_t row,
                                    int64_t column) const {
    char* to = out.data + (row * out.row_stride + column) * 2;
    if (columns == kBand) {
      std::memcpy(to, numbers, kBand * 2);
    } else {
      std::memcpy(to, numbers, columns * 2);
    }
  }
};

}  // namespace moe_ext
#endif
