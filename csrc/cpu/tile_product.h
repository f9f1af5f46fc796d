// A product of bfloat16 matrices on tiles (tiles.h), on one thread:
//
//   out [n, N] = left [n, K] @ right [K, N] + first        first: a row for all, or 0
//
// One operand gives lines of dense numbers, which are read from where they lie if they can be. The
// other gives columns, which are packed. A block of them stays in the second cache while all lines
// go by.
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
// If the columns of right are dense in memory, they are the lines, and the result is turned as it
// is written: rows times a weight's transposed read the weight in the order of memory, once for
// each block of rows. Few rows are one block. But where left is dense too and has more lines than
// right has columns, those are packed, which are fewer.
//
// The steps of a sum are added in their order, whatever the number of rows and columns.

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
      const bool left_has_more = left.column_stride == 1 && left.rows > right.columns;
      if (right.row_stride == 1 && !left_has_more) {
        multiply(right.transposed(), left.transposed(), true, tiles, memory);
      } else {
        multiply(left, right, false, tiles, memory);
      }
    }
  }

 private:
  using Floats = layout::Floats;
  using Pairs = layout::Pairs;
  using Lines = layout::Lines;
  static constexpr int64_t kTile = layout::kTile, kStep = layout::kStep;
  static constexpr int64_t kStrip = layout::kStrip, kBand = layout::kBand;
  static constexpr int64_t kTileSums = kTile * kTile, kSums = 4 * kTileSums;
  static constexpr int64_t kPart = 8, kDeep = 64;  // steps
  // For many strips, a block is many steps of some columns. For few, it is one part of many
  // columns, read in the order of memory where rows are dense. The sums of all strips stay while
  // blocks go by.
  static constexpr int64_t kPackedBytes = 1 << 20, kSumsBytes = 1 << 19, kFewStrips = 4;
  // Lines so many numbers apart push each other out of the first cache, where many bands read them.
  static constexpr int64_t kHalfPage = 1024, kManyBands = 8;

  // A thread's memory.
  struct Room {
    uint16_t* packed;  // [bands, steps, 2, 16, 16, 2]: tiles of pairs of numbers
    uint16_t* copied;  // [steps, 32, 32]: lines that do not lie as they are wanted
    float* sums;       // [bands, 4, 16, 16] of a strip
    float* bias;       // [N], filled up with zeros
  };

  // The columns and steps that are packed at a time.
  struct Block {
    int64_t first_column, columns, bands, steps;
    bool starts, ends;  // with the first step of all, with the last
  };

  // The lines of a strip, as far as the steps of a block go.
  struct Strip {
    Matrix lines;
    int64_t first;  // of all lines
  };

  // Each step asks for so many cache lines ahead of their use.
  struct Asked {
    const char* first;
    int64_t stride, count;
  };

  // turned: lines are columns of out
  MOE_EXT_INLINE void multiply(const Matrix& lines, const Matrix& columns, bool turned,
                               Tiles& tiles, Panel& memory) const {
    const int64_t steps = std::max<int64_t>(1, parts(lines.columns, kStep));
    const int64_t strips = parts(lines.rows, kStrip);
    const bool few = strips <= kFewStrips;
    const int64_t all = parts(columns.columns, kBand);
    const int64_t fit = kPackedBytes / (layout::kBandNumbers * 2);  // bands times steps
    const int64_t deep = std::min(few ? kPart : kDeep, steps);
    const int64_t most = few ? kSumsBytes / (strips * kSums * 4) : fit / deep;
    const int64_t bands = std::clamp<int64_t>(most, 1, all);
    const int64_t apart = deep < steps ? bands * kSums : 0;  // sums of a strip and of the next
    const Room room = room_for(bands, deep, apart ? strips : 1, memory);
    // The last lines are multiplied again where there are not enough after them.
    const auto strip = [&](int64_t i, int64_t step) {
      const int64_t first = std::max<int64_t>(0, std::min(i * kStrip, lines.rows - kStrip));
      return Strip{lines.row_range(first, std::min(first + kStrip, lines.rows))
                       .column_range(step * kStep, std::min((step + deep) * kStep, lines.columns)),
                   first};
    };
    for (int64_t c = 0; c < columns.columns; c += bands * kBand) {
      const int64_t width = std::min(bands * kBand, columns.columns - c);
      for (int64_t s = 0; s < steps; s += deep) {
        const bool ends = s + deep >= steps;
        const Block block{c, width, parts(width, kBand), std::min(deep, steps - s), s == 0, ends};
        layout::pack(columns.row_range(s * kStep, std::min((s + deep) * kStep, columns.rows))
                         .column_range(c, c + width),
                     block.bands, block.steps, room.packed);
        for (int64_t i = 0; i < strips; ++i) {
          Room own = room;
          own.sums += i * apart;
          const bool is_last = i + 1 == strips;
          const char* next = nullptr;
          if (lines.column_stride == 1 && !(is_last && ends)) {
            next = (is_last ? strip(0, s + deep) : strip(i + 1, s)).lines.data;
          }
          multiply_strip(tiles, strip(i, s), next, turned, block, own);
        }
      }
    }
  }

  MOE_EXT_INLINE Room room_for(int64_t bands, int64_t steps, int64_t strips, Panel& memory) const {
    const int64_t packed = bands * steps * layout::kBandNumbers / 2,
                  copied = steps * kStrip * kStep / 2;
    const int64_t sums = strips * bands * kSums, bias = parts(out.columns, kBand) * kBand;
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

  // A strip's products with all that is packed. next: the lines that are needed next, or null.
  MOE_EXT_INLINE void multiply_strip(Tiles& tiles, const Strip& strip, const char* next,
                                     bool turned, const Block& block, const Room& room) const {
    const Matrix& all = strip.lines;
    const bool collide = all.row_stride % kHalfPage == 0 && block.bands >= kManyBands;
    const bool lie = all.column_stride == 1 && all.rows == kStrip && !collide;
    const int64_t whole = lie ? all.columns / kStep : 0;  // steps where they lie
    // The others are copied: all, or what is left after the last whole step.
    if (whole < block.steps) {
      layout::copy(all.column_range(whole * kStep, all.columns), block.steps - whole, room.copied);
    }
    for (int64_t s = 0, end; s < block.steps; s = end) {
      end = std::min(s + kPart, s < whole ? whole : block.steps);
      const Lines lines =
          s < whole ? Lines{layout::numbers(all) + s * kStep, all.row_stride, kStep}
                    : Lines{room.copied + (s - whole) * kStrip * kStep, kStep, kStrip * kStep};
      for (int64_t b = 0; b < block.bands; ++b) {
        // Each band asks for its share of the next lines.
        const int64_t stride = all.row_stride * 2;
        const Asked asked{next + s * kTileBytes + b * stride, block.bands * stride,
                          next && b < kStrip ? parts(kStrip - b, block.bands) : 0};
        const uint16_t* packed = room.packed + (b * block.steps + s) * layout::kBandNumbers;
        float* sums = room.sums + b * kSums;
        const int64_t columns = std::min(kBand, block.columns - b * kBand);
        multiply_some(tiles, lines, packed, end - s, asked, block.starts && s == 0,
                      all.rows > kTile, columns > kTile, sums);
        if (turned && block.ends && end == block.steps) {
          write_turned(sums, strip, block.first_column + b * kBand, columns, room);
        }
      }
    }
    if (!turned && block.ends) write(strip, block, room);
  }

  // tall, wide: whether a strip has lines for its second tile, a band columns
  static MOE_EXT_INLINE void multiply_some(Tiles& tiles, const Lines& lines, const uint16_t* packed,
                                           int64_t steps, const Asked& asked, bool starts,
                                           bool tall, bool wide, float* sums) {
    const auto multiply = [&](auto tall, auto wide) __attribute__((always_inline)) {
      multiply_part<tall.value, wide.value>(tiles, lines, packed, steps, asked, starts, sums);
    };
    using Yes = std::true_type;
    using No = std::false_type;
    if (tall) return wide ? multiply(Yes{}, Yes{}) : multiply(Yes{}, No{});
    wide ? multiply(No{}, Yes{}) : multiply(No{}, No{});
  }

  template <bool tall, bool wide>
  static MOE_EXT_INLINE void multiply_part(Tiles& tiles, const Lines& lines, const uint16_t* packed,
                                           int64_t steps, const Asked& asked, bool starts,
                                           float* sums) {
    if (starts) {
      tiles.zero<0>();
      if constexpr (wide) tiles.zero<1>();
      if constexpr (tall) tiles.zero<2>();
      if constexpr (tall && wide) tiles.zero<3>();
    } else {
      tiles.load<0>(sums, kTileBytes);
      if constexpr (wide) tiles.load<1>(sums + kTileSums, kTileBytes);
      if constexpr (tall) tiles.load<2>(sums + 2 * kTileSums, kTileBytes);
      if constexpr (tall && wide) tiles.load<3>(sums + 3 * kTileSums, kTileBytes);
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
      if constexpr (wide) {
        tiles.load<7>(packed + layout::kTileNumbers, kTileBytes);
        tiles.multiply<1, 4, 7>();
      }
      if constexpr (tall) {
        tiles.load<5>(from + kTile * lines.stride, stride);
        tiles.multiply<2, 5, 6>();
      }
      if constexpr (tall && wide) tiles.multiply<3, 5, 7>();
    }
    tiles.store<0>(sums);
    if constexpr (wide) tiles.store<1>(sums + kTileSums);
    if constexpr (tall) tiles.store<2>(sums + 2 * kTileSums);
    if constexpr (tall && wide) tiles.store<3>(sums + 3 * kTileSums);
  }

  // Rows of out: the sums of a strip.
  MOE_EXT_INLINE void write(const Strip& strip, const Block& block, const Room& room) const {
    for (int64_t i = 0; i < strip.lines.rows; ++i) {
      const float* line = room.sums + i / kTile * 2 * kTileSums + i % kTile * kTile;
      for (int64_t b = 0; b < block.bands; ++b, line += kSums) {
        const int64_t column = block.first_column + b * kBand;
        Floats halves[2], bias;
        for (int64_t c = 0; c < 2; ++c) {
          load(halves[c], line + c * kTileSums);
          load(bias, room.bias + column + c * kTile);
          halves[c] += bias;
        }
        layout::Numbers numbers;
        layout::narrow(halves[0], halves[1], numbers);
        write_numbers(numbers, std::min(kBand, block.columns - b * kBand), strip.first + i, column);
      }
    }
  }

  // Columns of out, as many as the strip has lines: its sums with `rows` columns of a band.
  MOE_EXT_INLINE void write_turned(const float* sums, const Strip& strip, int64_t row, int64_t rows,
                                   const Room& room) const {
    const float* bias = room.bias + strip.first;
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
        layout::Numbers numbers;
        layout::narrow(even, odd, numbers);
        layout::zip(numbers, places<layout::Numbers>{});
        pairs[p] = Pairs(numbers);
      }
      layout::turn(pairs);
      for (int64_t j = 0; j < std::min(kTile, rows - c); ++j) {
        write_numbers(layout::Numbers(pairs[j]), strip.lines.rows, row + c + j, strip.first);
      }
    }
  }

  // As many of the numbers as there are columns.
  MOE_EXT_INLINE void write_numbers(const layout::Numbers& numbers, int64_t columns, int64_t row,
                                    int64_t column) const {
    char* to = out.data + (row * out.row_stride + column) * 2;
    if (columns == kBand) return store(numbers, to);
    const layout::Numbers copy = numbers;  // with an address, numbers would leave its register
    std::memcpy(to, &copy, columns * 2);
  }
};

}  // namespace moe_ext
#endif
