// Lines of a weight: where few_rows.h finds them, and the sums of their products.

#pragma once

#include "../machine/lanes.h"

namespace moe_ext {

constexpr int kLines = 4;  // as many as sum_lanes adds up

// The sum over the lanes of each of four registers.
template <typename Lanes>
MOE_EXT_INLINE void sum_lanes(Vector<float, 16>& sums, const Lanes (&parts)[4]) {
  Lanes rows[4] = {parts[0], parts[1], parts[2], parts[3]};
  transpose(rows);
  rows[0] = (rows[0] + rows[1]) + (rows[2] + rows[3]);
  Vector<float, 16> fours[sizeof(Lanes) / 16];
  std::memcpy(fours, rows, sizeof(Lanes));
  for (int i = sizeof(Lanes) / 32; i > 0; i /= 2) {
    for (int j = 0; j < i; ++j) fours[j] += fours[j + i];
  }
  sums = fours[0];
}

// Row j of out, from its totals, to which the bias is added.
template <typename Format>
MOE_EXT_INLINE void write_row(float* totals, const Matrix* bias, const Matrix& out, int64_t j) {
  using scalar_t = typename Format::scalar_t;
  if (bias) {
    const auto* first = reinterpret_cast<const scalar_t*>(bias->data);
    for (int64_t r = 0; r < out.columns; ++r) totals[r] += static_cast<float>(first[r]);
  }
  auto* row = reinterpret_cast<scalar_t*>(out.data) + j * out.row_stride;
  convert<sizeof(typename Format::Lanes)>(totals, out.columns, row);
}

// Where lines are stored.
struct Stored {
  const char* first;
  int64_t apart, step;  // bytes from a line to the next, and of a vector
};

// How memory is asked for ahead of its use, by CPU.
//
//   Intel  Into the second cache, which waits for more memory than the first. (Experts of one to 64
//          tokens take up to 8 % less time on an Emerald Rapids.)
//   Zen 4  Into the second cache, and in the order of memory: its own prefetcher then asks for most
//          of it, and alone for one short row. (Lines of 1 to 8 KiB in huge pages: one row comes
//          to 77 to 119 % of the rate of reading, and to 56 to 91 % with asks into the first
//          cache. Five and six rows take 1.2 to 2.5 times as long the way of a Zen 5.)
//   Zen 5  Into the first cache, and from line to line. (Experts of one to 16 tokens come to 77 %
//          of the rate of reading and more. Nothing else was measured.)
struct Asks {
  bool in_order;
  bool second;  // into the second cache

  static Asks here() { return {is_zen_4(), is_intel() || is_zen_4()}; }
};

// Asks for 64 bytes.
MOE_EXT_INLINE void ask_ahead(const void* memory, bool second) {
  second ? __builtin_prefetch(memory, 0, 2) : __builtin_prefetch(memory, 0, 3);
}

// A source of lines: those of a weight as it lies.
struct AllLines {
  template <typename scalar_t>
  static constexpr bool kHas = true;
  static constexpr bool kInMemory = true;  // lines lie one after the other
  // A part of a line has up to so many bytes, which stay in the first cache while the blocks go by.
  static constexpr int64_t kDeep = 1 << 11;
  // All parts but the last have a multiple of so many numbers.
  static constexpr int64_t kWhole = 1;

  Matrix weight;

  int64_t count() const { return weight.rows; }

  // Columns from `begin` to `end` of some lines: kLines, or one. They are there until the next
  // call.
  template <int bytes>
  MOE_EXT_INLINE Matrix find(int64_t first, int64_t lines, int64_t begin, int64_t end) const {
    return weight.row_range(first, first + lines).column_range(begin, end);
  }

  // The lines from the first on. elements: of a vector
  MOE_EXT_INLINE Stored stored(int64_t first, int64_t elements) const {
    const int64_t apart = weight.row_stride * weight.width();
    return {weight.data + first * apart, apart, elements * weight.width()};
  }

  // Completes the products of a row with kLines from the first on.
  MOE_EXT_INLINE void complete(int64_t, Vector<float, 16>&) const {}
};

}  // namespace moe_ext
