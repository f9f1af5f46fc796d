// A product of bfloat16 matrices on one thread, on tiles (tile_loops.h) or in registers
// (pair_loops.h):
//
//   out [n, N] = left [n, K] @ right [K, N] + first        first: a row for all, or 0
//
// out may have floats instead, to which the product is added where first is out itself.
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
// A single band, of few rows, waits for the memory of a weight. On tiles it streams: its sums stay
// in tiles for a longer part, and each quarter of a strip is asked for in the order of memory.
//
// If the columns of right are dense in memory, they are the lines, and the result is turned as it
// is written: rows times a weight's transposed read the weight in the order of memory, once for
// each block of rows. Few rows are one block. But where left is dense too and has more lines than
// right has columns, those are packed, which are fewer. In registers, kMostTurned lines suffice,
// because turning their results takes longer than packing a weight.
//
// The steps of a sum are added in their order, whatever the number of rows and columns.

#pragma once

#include <algorithm>
#include <type_traits>

#include "pair_loops.h"

#if defined(MOE_EXT_TILES)
namespace moe_ext {

struct TileProduct {
  Matrix out;           // dense rows
  Indexed left, right;  // rows or columns are dense; those that an index picks, each by itself
  const Matrix* first;  // null: 0
  // Tiles write the rows of out around the caches; the rows must be aligned to cache lines. Turned
  // results, and those of pair_loops.h, go through the caches all the same.
  bool around = false;

  // loops, memory: of the thread
  template <int bytes, typename Loops>
  MOE_EXT_INLINE void run(Loops& loops, Panel& memory) const {
    if constexpr (bytes == 64 || kEmulatesTiles) {
      const bool left_has_more =
          left.column_stride == 1 && left.rows > std::min(right.columns, Loops::kMostTurned);
      if (right.row_stride == 1 && !left_has_more && !is_float()) {
        multiply(right.transposed(), left.transposed(), true, loops, memory);
      } else {
        multiply(left, right, false, loops, memory);
        if (around && !Loops::kWritesRows) finish_around();
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
  static constexpr int64_t kDeep = 64;  // steps
  // A band that streams has parts of up to so many steps, so that few tiles of sums are stored and
  // loaded again, and blocks of which the lines of two strips fit into the second cache.
  static constexpr int64_t kStreamedPart = 64, kStreamedBlock = 256;
  // With many strips, a block is many steps of some columns. The lines of these steps stay in the
  // third cache while the blocks of other columns follow. With few strips, a block is one part of
  // many columns, which is read in the order of memory if rows are dense. The sums of all strips
  // stay in memory until the last step.
  static constexpr int64_t kSumsBytes = 1 << 19, kFewStrips = 4;
  // Lines so many numbers apart push each other out of the first cache, where many bands read them.
  static constexpr int64_t kHalfPage = 1024, kManyBands = 8;
  // Lines of more bytes are copied strip by strip.
  static constexpr int64_t kCopiedBytes = 1 << 21;

  // How a product is divided.
  struct Sizes {
    int64_t steps, strips;  // of all
    int64_t bands, deep;    // of a block, which is packed: its bands and steps
    int64_t group;          // bands whose sums stay while steps go by
    int64_t part;           // steps between loads of sums and their stores
    bool streams;           // whether a single band waits for memory
    bool lie;               // whether lines are read without a copy
    bool copied;            // whether the lines of all strips are copied before the first block
  };

  // A thread's memory.
  struct Room {
    uint16_t* packed;  // [bands, steps, 2, 16, 16, 2]: tiles of pairs of numbers, or a narrow band
    uint16_t* copied;  // [strips or 1, steps, 32, 32]: lines that cannot be read without a copy
    float* sums;       // [strips, group, 4, 16, 16]; [bands, 4, 16, 16] if one block has all steps
    float* bias;       // [N], filled up with zeros
  };

  // The columns and steps that are packed at a time.
  struct Block {
    int64_t first_column, columns, bands, steps;
    layout::Packing packing;
    bool starts, ends;  // with the first step of all, with the last
  };

  // The lines of a strip, as far as the steps of a block go.
  struct Strip {
    Indexed lines;
    int64_t first;    // of all lines
    int64_t skipped;  // lines that the strip before has
  };

  template <typename Loops>
  static MOE_EXT_INLINE Sizes sizes_of(const Indexed& lines, const Indexed& columns) {
    const int64_t strips = parts(lines.rows, kStrip), all = parts(columns.columns, kBand);
    const int64_t steps = std::max<int64_t>(1, parts(lines.columns, kStep));
    const bool streams =
        Loops::kStreams && all == 1 && lines.rows >= kStrip && lines.has_rows_in_place();
    const bool few = strips <= kFewStrips && !streams;
    int64_t deep = std::min(few ? Loops::kPart : kDeep, steps), part = Loops::kPart;
    if (streams) {
      // Evenly: a short part would have to ask for all lines of a long one.
      deep = parts(steps, parts(steps, kStreamedBlock));
      part = parts(deep, parts(deep, kStreamedPart));
    }
    const int64_t fit = Loops::kPackedBytes / (layout::kBandNumbers * 2 * deep);
    const int64_t most = few ? kSumsBytes / (strips * kSums * 4) : fit;
    const int64_t blocks = parts(all, std::max<int64_t>(1, most));
    const int64_t bands = parts(all, std::max<int64_t>(1, blocks));  // of nearly equal blocks
    const bool collide = lines.row_stride % kHalfPage == 0 && std::min(most, all) >= kManyBands;
    const bool lie = lines.has_rows_in_place() && !collide;
    const bool fits = strips * deep * kStrip * kStep * 2 <= kCopiedBytes;
    return {steps, strips, bands, deep, few ? bands : all, part, streams, lie, !lie && fits};
  }

  // turned: lines are columns of out
  template <typename Loops>
  MOE_EXT_INLINE void multiply(const Indexed& lines, const Indexed& columns, bool turned,
                               Loops& loops, Panel& memory) const {
    const Sizes n = sizes_of<Loops>(lines, columns);
    const Room room = room_for(n, memory);
    const auto strip = [&](int64_t i, int64_t step) {
      const int64_t first = first_of(i, lines), end = (step + n.deep) * kStep;
      return Strip{strip_of(i, lines).column_range(step * kStep, std::min(end, lines.columns)),
                   first, turned ? 0 : i * kStrip - first};
    };
    for (int64_t g = 0; g < columns.columns; g += n.group * kBand) {
      const Indexed group = columns.column_range(g, std::min(g + n.group * kBand, columns.columns));
      for (int64_t s = 0; s < n.steps; s += n.deep) {
        const int64_t steps = std::min(n.deep, n.steps - s);
        const bool ends = s + steps == n.steps;
        if (n.copied && (g == 0 || n.deep < n.steps)) {
          copy_all(lines.column_range(s * kStep, lines.columns), n, steps, room);
        }
        const Indexed rows = group.row_range(s * kStep, std::min((s + steps) * kStep, group.rows));
        for (int64_t c = 0; c < rows.columns; c += n.bands * kBand) {
          const int64_t width = std::min(n.bands * kBand, rows.columns - c);
          const layout::Packing packing = layout::packing_of(rows.columns, Loops::kStreams);
          const Block block{g + c, width, parts(width, kBand), steps, packing, s == 0, ends};
          layout::pack(rows.column_range(c, c + width), block.bands, steps, packing, room.packed);
          for (int64_t i = 0; i < n.strips; ++i) {
            Room own = room;
            if (n.deep < n.steps) own.sums += (i * n.group + c / kBand) * kSums;
            if (n.copied) own.copied += i * n.deep * kStrip * kStep;
            const bool is_last = i + 1 == n.strips;
            const int64_t after = is_last && c + width == rows.columns ? s + n.deep : s;
            const char* next = nullptr;
            if (lines.has_rows_in_place() && !n.copied && after < n.steps) {
              next = strip(is_last ? 0 : i + 1, after).lines.data;
            }
            multiply_strip(loops, n, strip(i, s), next, turned, block, own);
          }
        }
      }
    }
  }

  // The first line of strip i. The last strip repeats lines of the one before if too few are left.
  static int64_t first_of(int64_t i, const Indexed& lines) {
    return std::max<int64_t>(0, std::min(i * kStrip, lines.rows - kStrip));
  }

  static Indexed strip_of(int64_t i, const Indexed& lines) {
    const int64_t first = first_of(i, lines);
    return lines.row_range(first, std::min(first + kStrip, lines.rows));
  }

  // Copies the lines of all strips: dense ones strip by strip, others in the order of memory.
  MOE_EXT_INLINE void copy_all(const Indexed& lines, const Sizes& n, int64_t steps,
                               const Room& room) const {
    if (lines.has_dense_rows()) {
      for (int64_t i = 0; i < n.strips; ++i) {
        layout::copy(strip_of(i, lines), steps, room.copied + i * n.deep * kStrip * kStep);
      }
      return;
    }
    for (int64_t s = 0; s < steps; ++s) {
      for (int64_t i = 0; i < n.strips; ++i) {
        layout::copy(strip_of(i, lines).column_range(s * kStep, lines.columns), 1,
                     room.copied + (i * n.deep + s) * kStrip * kStep);
      }
    }
  }

  MOE_EXT_INLINE Room room_for(const Sizes& n, Panel& memory) const {
    const int64_t packed = n.bands * n.deep * layout::kBandNumbers / 2;
    const int64_t copied = (n.copied ? n.strips : 1) * n.deep * kStrip * kStep / 2;
    const int64_t sums = (n.deep < n.steps ? n.strips * n.group : n.bands) * kSums;
    const int64_t bias = parts(out.columns, kBand) * kBand;
    const Matrix panel = memory.get(ScalarType::Float, 1, packed + copied + sums + bias);
    auto* floats = reinterpret_cast<float*>(panel.data);
    const Room room{reinterpret_cast<uint16_t*>(floats),
                    reinterpret_cast<uint16_t*>(floats + packed), floats + packed + copied,
                    floats + packed + copied + sums};
    std::fill_n(room.bias, bias, 0.0f);
    if (first && !is_float()) {
      const auto* row = reinterpret_cast<const torch::headeronly::BFloat16*>(first->data);
      for (int64_t i = 0; i < out.columns; ++i) {
        room.bias[i] = static_cast<float>(row[i * first->column_stride]);
      }
    }
    return room;
  }

  // A strip's products with all that is packed. next: the lines that are needed next, or null.
  template <typename Loops>
  MOE_EXT_INLINE void multiply_strip(Loops& loops, const Sizes& n, const Strip& strip,
                                     const char* next, bool turned, const Block& block,
                                     const Room& room) const {
    const Indexed& all = strip.lines;
    const bool lie = n.lie && all.rows == kStrip;
    // Steps that are read without a copy: all, or all but the last one.
    const bool has_rest = all.columns % Loops::kReads != 0;
    const int64_t whole = lie ? parts(all.columns, kStep) - has_rest : 0;
    if (whole < block.steps && !n.copied) {
      layout::copy(all.column_range(whole * kStep, all.columns), block.steps - whole, room.copied);
    }
    // The last two bands may take one turn.
    const int64_t last = block.columns - (block.bands - 2) * kBand;
    const int64_t turns = block.bands - (block.bands > 1 && Loops::joins(last, turned));
    for (int64_t s = 0, end; s < block.steps; s = end) {
      end = std::min(s + n.part, s < whole ? whole : block.steps);
      const Lines lines =
          s < whole ? Lines{layout::numbers(all) + s * kStep, all.row_stride, kStep}
                    : Lines{room.copied + (s - whole) * kStrip * kStep, kStep, kStrip * kStep};
      const bool completes = block.ends && end == block.steps;
      const int64_t numbers = std::min(end * kStep, all.columns) - s * kStep;
      for (int64_t b = 0, joined; b < block.bands; b += 1 + joined) {
        // Each band prefetches its share of the next strip's lines; one that streams prefetches all
        // of the next part's.
        const int64_t stride = all.row_stride * 2, left_steps = whole - end;
        Asked asked{};
        if (n.streams && s < whole && (left_steps > 0 || next)) {
          const char* soon = left_steps > 0 ? all.data + end * kTileBytes : next;
          const int64_t of_part = left_steps > 0 ? left_steps : whole;
          asked = {soon, stride, kStrip, std::min(n.part, of_part)};
        } else if (next && b < kStrip) {
          asked = {next + s * kTileBytes + b * stride, turns * stride, parts(kStrip - b, turns), 0};
        }
        const auto packed = [&](int64_t band) {
          return room.packed + (band * block.steps + s) * block.packing.step;
        };
        float* sums = room.sums + b * kSums;
        const int64_t first_column = block.first_column + b * kBand;
        const int64_t left = block.columns - b * kBand;
        joined = Loops::joins(left, turned);
        const int64_t columns = joined ? left : std::min(kBand, left);
        Target target{};
        if (completes && turned) {
          layout::ask(place(first_column, strip.first), out.row_stride * 2, columns);
        } else if (completes && Loops::kWritesRows) {
          target = {place(strip.first, first_column), out.row_stride * out.width(),
                    room.bias + first_column, is_float(), first != nullptr};
        }
        const Part part{lines,         packed(b), joined ? packed(b + 1) : nullptr,
                        block.packing, numbers,   columns,
                        strip.skipped, all.rows,  block.starts && s == 0,
                        asked,         target};
        multiply_part(loops, part, all.rows > kTile, columns > kTile, sums);
        if (completes && turned) {
          write_turned(sums, strip, first_column, std::min(kBand, columns), room);
          if (joined) {
            write_turned(sums + kSums, strip, first_column + kBand, columns - kBand, room);
          }
        }
      }
    }
    if (!Loops::kWritesRows && !turned && block.ends) write(strip, block, room);
  }

  // tall, wide: whether a strip has lines for its second tile, a band columns
  template <typename Loops>
  static MOE_EXT_INLINE void multiply_part(Loops& loops, const Part& part, bool tall, bool wide,
                                           float* sums) {
    const auto multiply = [&](auto tall, auto wide) __attribute__((always_inline)) {
      loops.template multiply<tall.value, wide.value>(part, sums);
    };
    using Yes = std::true_type;
    using No = std::false_type;
    if (tall) return wide ? multiply(Yes{}, Yes{}) : multiply(Yes{}, No{});
    wide ? multiply(No{}, Yes{}) : multiply(No{}, No{});
  }

  bool is_float() const { return out.dtype == ScalarType::Float; }

  MOE_EXT_INLINE char* place(int64_t row, int64_t column) const {
    return out.data + (row * out.row_stride + column) * out.width();
  }

  // Rows of out: the sums of a strip.
  MOE_EXT_INLINE void write(const Strip& strip, const Block& block, const Room& room) const {
    for (int64_t i = strip.skipped; i < strip.lines.rows; ++i) {
      const float* line = room.sums + i / kTile * 2 * kTileSums + i % kTile * kTile;
      for (int64_t b = 0; b < block.bands; ++b, line += kSums) {
        const int64_t column = block.first_column + b * kBand;
        Floats halves[2], bias;
        for (int64_t c = 0; c < 2; ++c) {
          load(halves[c], line + c * kTileSums);
          if (is_float()) {
            layout::write_floats(halves[c], block.columns - b * kBand - c * kTile, first != nullptr,
                                 place(strip.first + i, column + c * kTile));
            continue;
          }
          load(bias, room.bias + column + c * kTile);
          halves[c] += bias;
        }
        if (is_float()) continue;
        layout::Numbers numbers;
        layout::narrow(halves[0], halves[1], numbers);
        layout::write(numbers, std::min(kBand, block.columns - b * kBand),
                      place(strip.first + i, column), around);
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
        layout::write(layout::Numbers(pairs[j]), strip.lines.rows, place(row + c + j, strip.first));
      }
    }
  }
};

}  // namespace moe_ext
#endif
