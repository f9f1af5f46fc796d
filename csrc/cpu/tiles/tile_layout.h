// Numbers of bfloat16 as tiles want them (tiles.h), and registers too (pair_loops.h).
//
// A line of a tile holds 32 numbers of a line, which are a step of a sum; or a pair of numbers of
// each of 16 columns. Columns that are dense in memory are read as lines of pairs, and turned:
//
//     column 0   a0 a1 a2 a3 ..            line 0   a0 a1  b0 b1  c0 c1 ..
//     column 1   b0 b1 b2 b3 ..     ->     line 1   a2 a3  b2 b3  c2 c3 ..
//     column 2   c0 c1 c2 c3 ..            ..

#pragma once

#include <algorithm>

#include "../machine/around_caches.h"
#include "../machine/matrix.h"
#include "tiles.h"

#if defined(MOE_EXT_TILES)
namespace moe_ext::layout {

using Floats = Vector<float, 64>;
using Pairs = Vector<uint32_t, 64>;  // of numbers
using Numbers = Vector<uint16_t, 64>;
// Bytes of a register, for load_first and store_first: emulated tiles need not have masks.
constexpr int kRegisterBytes = kEmulatesTiles ? 16 : 64;
constexpr int64_t kTile = kTileLines, kStep = 2 * kTile, kTileNumbers = kTile * kStep;
// A strip and a band are so many lines and columns, two tiles.
constexpr int64_t kStrip = 2 * kTile, kBand = 2 * kTile, kBandNumbers = kBand * kStep;

// The distances between lines of a packed tile and between steps, in numbers.
struct Packing {
  int64_t line, step;
};

// A line of a packed tile holds the pairs of 16 columns. If `narrow` and there are at most 16
// columns, lines are only as long as these and overlap: a tile of 16 reads the next line's pairs
// too, and their products are never read.
inline Packing packing_of(int64_t columns, bool narrow) {
  if (narrow && columns <= kTile) return {2 * columns, 2 * columns * kTile};
  return {kStep, kBandNumbers};
}

// Some numbers of some lines.
struct Lines {
  const uint16_t* numbers;
  int64_t stride, step;  // to the next line, to the next step
};

// Calls a function of its own: in one with all others GCC keeps in memory what loops need most.
template <typename Kernel>
MOE_EXT_INLINE void apart(const Kernel& kernel) {
#if defined(MOE_EXT_EMULATES_TILES)
  kernel(0);
#else
  on_64_bytes(kernel);
#endif
}

inline const uint16_t* numbers(const Indexed& matrix, int64_t row = 0) {
  return reinterpret_cast<const uint16_t*>(matrix.row(row));
}

// 16 numbers of memory, each in the lower half of a pair.
MOE_EXT_INLINE void widen(const uint16_t* from, Pairs& to) {
  Vector<uint16_t, 32> numbers;
  load(numbers, from);
#if defined(MOE_EXT_EMULATES_TILES)
  to = __builtin_convertvector(numbers, Pairs);
#else
  Pairs wide;  // one that has no address stays in its register
  asm("vpmovzxwd %1, %0" : "=v"(wide) : "v"(numbers));
  to = wide;
#endif
}

// Rounds low's floats, then high's.
MOE_EXT_INLINE void narrow(const Floats& low, const Floats& high, Numbers& to) {
#if defined(MOE_EXT_EMULATES_TILES)
  Pairs bits[2];
  round_to_upper_half(low, bits[0]);
  round_to_upper_half(high, bits[1]);
  for (int64_t i = 0; i < kStep; ++i) to[i] = bits[i / kTile][i % kTile] >> 16;
#else
  narrow_to_pairs(low, high, to);
#endif
}

// Writes the first `columns` numbers. around: 32 numbers bypass the caches; `to` must be aligned to
// a cache line.
MOE_EXT_INLINE void write(const Numbers& numbers, int64_t columns, char* to,
                          [[maybe_unused]] bool around = false) {
  if (columns < kStep) return store_first<kRegisterBytes>(numbers, to, columns * 2);
#if !defined(MOE_EXT_EMULATES_TILES)
  if (around) return store_around(numbers, to);
#endif
  store(numbers, to);
}

// Writes up to 16 floats, or adds them to those in memory.
MOE_EXT_INLINE void write_floats(const Floats& floats, int64_t columns, bool adds, char* to) {
  if (columns <= 0) return;
  const bool is_whole = columns >= kTile;
  Floats sums = floats;
  if (adds) {
    Floats before;
    is_whole ? load(before, to) : load_first<kRegisterBytes>(before, to, columns * 4);
    sums += before;
  }
  is_whole ? store(sums, to) : store_first<kRegisterBytes>(sums, to, columns * 4);
}

// Prefetches lines of memory that will be written.
MOE_EXT_INLINE void ask(const char* first, int64_t apart, int64_t count) {
  for (int64_t i = 0; i < count; ++i, first += apart) {
#if defined(MOE_EXT_EMULATES_TILES)
    __builtin_prefetch(first, 1);
#else
    asm volatile("prefetchw %0" : : "m"(*first));
#endif
  }
}

// Pairs of a number of the first half and one of the second.
template <int... i>
MOE_EXT_INLINE void zip(Numbers& numbers, std::integer_sequence<int, i...>) {
  pick<i / 2 + i % 2 * kTile...>(numbers, numbers, numbers);
}

// Four of the eight 16 bytes of a and b.
template <int w, int x, int y, int z, typename V>
MOE_EXT_INLINE void shuffle_lanes(V& to, const V& a, const V& b) {
  using Long = Vector<int64_t, 64>;
  Long out;
  pick<2 * w, 2 * w + 1, 2 * x, 2 * x + 1, 2 * y, 2 * y + 1, 2 * z, 2 * z + 1>(out, Long(a),
                                                                               Long(b));
  to = V(out);
}

// Turns the 16 bytes of four registers.
template <typename V>
MOE_EXT_INLINE void turn_lanes(V (&lines)[4]) {
  V low[2], high[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    shuffle_lanes<0, 1, 4, 5>(low[i], lines[2 * i], lines[2 * i + 1]);
    shuffle_lanes<2, 3, 6, 7>(high[i], lines[2 * i], lines[2 * i + 1]);
  }
  shuffle_lanes<0, 2, 4, 6>(lines[0], low[0], low[1]);
  shuffle_lanes<1, 3, 5, 7>(lines[1], low[0], low[1]);
  shuffle_lanes<0, 2, 4, 6>(lines[2], high[0], high[1]);
  shuffle_lanes<1, 3, 5, 7>(lines[3], high[0], high[1]);
}

// Turns 16 lines of 16 pairs.
MOE_EXT_INLINE void turn(Pairs (&lines)[kTile]) {
  Pairs fours[4][4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) fours[i][j] = lines[4 * i + j];
    transpose(fours[i]);  // fours[i][j] has column 4 l + j in its l-th 16 bytes
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    Pairs column[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) column[i] = fours[i][j];
    turn_lanes(column);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) lines[4 * i + j] = column[i];
  }
}

// The same from memory to a tile with so many numbers in a line.
MOE_EXT_INLINE void turn(const uint16_t* from, int64_t stride, int64_t line, uint16_t* to) {
  Pairs lines[kTile];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTile; ++i) load(lines[i], from + i * stride);
  turn(lines);
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTile; ++i) store(lines[i], to + i * line);
}

// `count` lines of `size` numbers of a matrix; a copy, filled up with zeros, where there are fewer
// or they have an index.
template <int64_t count, int64_t size>
MOE_EXT_INLINE Lines lines_of(const Indexed& matrix, uint16_t (&copy)[count][size]) {
  if (!matrix.row_index && matrix.rows >= count && matrix.columns >= size) {
    return {numbers(matrix), matrix.row_stride, size};
  }
  for (int64_t i = 0; i < count; ++i) {
    Vector<uint16_t, size * 2> line{};
    if (i < matrix.rows) {
      const uint16_t* from = numbers(matrix, i);
      matrix.columns < size ? load_first<kRegisterBytes>(line, from, matrix.columns * 2)
                            : load(line, from);
    }
    store(line, copy[i]);
  }
  return {copy[0], size, size};
}

// A tile with so many numbers in a line: pairs of numbers of up to 16 columns, from the first 32
// rows of a matrix. Each line stores a whole register, so a narrow one is followed by zeros until
// the next line is stored over them.
MOE_EXT_INLINE void pair(const Indexed& matrix, int64_t line, uint16_t* to) {
  if (!matrix.has_dense_rows()) {
    alignas(64) uint16_t copy[kTile][kStep];
    const Lines lines = lines_of(matrix.transposed(), copy);
    return turn(lines.numbers, lines.stride, line, to);
  }
  alignas(64) uint16_t copy[kStep][kTile];
  const Lines lines = lines_of(matrix, copy);
  const uint16_t* from = lines.numbers;
  for (int64_t p = 0; p < kTile; ++p, from += 2 * lines.stride) {
    Pairs even, odd;
    widen(from, even);
    widen(from + lines.stride, odd);
    store(even | odd << 16, to + p * line);
  }
}

// A step of a band, [2, 16, 16, 2], whose tiles are filled up with zeros if lines are not narrow.
// Asks for the numbers so many steps after it.
MOE_EXT_INLINE void pack_step(const Indexed& columns, int64_t band, int64_t step, int64_t ahead,
                              int64_t line, uint16_t* to) {
  const Indexed rows = columns.row_range(step * kStep, std::min((step + 1) * kStep, columns.rows));
  const int64_t next_row = (step + ahead) * kStep, first = band * kBand;
  const Indexed next =
      columns.row_range(next_row, columns.rows).column_range(first, columns.columns);
  const Indexed lines = columns.has_dense_rows() ? next : next.transposed();
  const int64_t count = lines.row_index ? std::min(kStep, lines.rows) : kStep;
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(lines.row(i), 0, 2);
  for (int64_t c = first; c < first + kBand; c += kTile, to += kTileNumbers) {
    if (c < columns.columns) pair(rows.column_range(c, columns.columns), line, to);
  }
}

// Columns as bands, [bands, steps, 2, 16, 16, 2], in the order of memory.
inline void pack(const Indexed& columns, int64_t bands, int64_t steps, Packing packing,
                 uint16_t* packed) {
  apart([&](auto) __attribute__((always_inline)) {
    const auto place = [&](int64_t b, int64_t s) __attribute__((always_inline)) {
      return packed + (b * steps + s) * packing.step;
    };
    if (columns.has_dense_rows()) {
      for (int64_t s = 0; s < steps; ++s) {
        for (int64_t b = 0; b < bands; ++b) pack_step(columns, b, s, 1, packing.line, place(b, s));
      }
    } else {
      for (int64_t b = 0; b < bands; ++b) {
        for (int64_t s = 0; s < steps; ++s) pack_step(columns, b, s, 2, packing.line, place(b, s));
      }
    }
  });
}

// Lines of a strip as tiles, [steps, 2, 16, 32], which are filled up with zeros.
MOE_EXT_INLINE void copy(const Indexed& lines, int64_t steps, uint16_t* to) {
  for (int64_t k = 0; k < steps * kStep; k += kStep) {
    for (int64_t i = 0; i < kStrip; i += kTile, to += kTileNumbers) {
      if (i >= lines.rows) continue;
      const Indexed some = lines.row_range(i, lines.rows).column_range(k, lines.columns);
      alignas(64) uint16_t room[kTile][kStep];
      if (lines.has_dense_rows()) {
        const Lines from = lines_of(some, room);
        for (int64_t j = 0; j < kTile; ++j) {
          std::memcpy(to + j * kStep, from.numbers + j * from.stride, sizeof(room[j]));
        }
      } else {
        pair(some.transposed(), kStep, room[0]);
        turn(room[0], kStep, kStep, to);
      }
    }
  }
}

}  // namespace moe_ext::layout
#endif
