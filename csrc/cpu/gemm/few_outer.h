// out [N, M] = left [n, N]^T @ right [n, M] for few rows. One thread of an x86 CPU.
//
// Memory bandwidth is the limit, so the result is written once: four lines at a time, or eight
// where few columns are left. A result that is too large for the caches goes around them.

#pragma once

#include <algorithm>

#include "../machine/around_caches.h"
#include "../machine/lanes.h"

namespace moe_ext {

struct FewOuter {
  Matrix out, left, right;
  bool around;  // only where goes_around(out)

  // Whether a result can be written around the caches: its rows are aligned to cache lines.
  static bool goes_around(const Matrix& out) {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
    constexpr uintptr_t kLine = 64;
    const uintptr_t apart = out.row_stride * out.width();
    return (reinterpret_cast<uintptr_t>(out.data) | apart) % kLine == 0;
#else
    return false;
#endif
  }

  template <int bytes>
  MOE_EXT_INLINE void run(Panel& memory) const {
    visit_lines_format<bytes>(left.dtype, [&](auto format) __attribute__((always_inline)) {
      multiply<decltype(format)>(memory);
    });
    if (around) finish_around();
  }

 private:
  // Bytes of right that stay in the first cache while all lines of out go by. Many rows have more:
  // at least kVectors vectors of each are multiplied.
  static constexpr int64_t kCached = 1 << 14;
  // Sums that fit into the registers.
  template <typename Format>
  static constexpr int64_t kSums = sizeof(typename Format::Lanes) == 64 ? 16 : 8;
  // The block of out that is written at once: kLines lines of kVectors vectors. kLinesOf is for
  // the last columns, which have fewer vectors.
  static constexpr int64_t kLines = 4;
  template <typename Format>
  static constexpr int64_t kVectors = kSums<Format> / kLines / Format::kRegisters;
  template <typename Format, int64_t count>
  static constexpr int64_t kLinesOf =
      2 * kLines * count * Format::kRegisters <= kSums<Format> ? 2 * kLines : kLines;

  // The factors of out's lines, and the vectors of right's columns.
  template <typename Format>
  struct Packed {
    const typename Format::Lanes* vectors;   // [vectors, steps, kRegisters]
    const typename Format::Factor* factors;  // [steps, apart]
    int64_t steps, apart;
  };

  template <typename Format>
  MOE_EXT_INLINE void multiply(Panel& memory) const {
    using Lanes = typename Format::Lanes;
    constexpr int64_t kAtOnce = kVectors<Format>;
    const Packed<Format> packed = pack<Format>(memory);
    const int64_t vectors = parts(out.columns, Format::kElements), rest = vectors % kAtOnce;
    const int64_t vector_bytes = packed.steps * Format::kRegisters * sizeof(Lanes);
    const int64_t part = std::max<int64_t>(1, kCached / vector_bytes / kAtOnce) * kAtOnce;
    for (int64_t v = 0; v < vectors - rest; v += part) {
      const int64_t end = std::min(v + part, vectors - rest);
      write_lines<Format, kAtOnce, kLines>(packed, v, end);
    }
    if (rest == 0) return;
    if constexpr (kAtOnce > 1) {
      with_count<kAtOnce - 1>(rest, [&](auto count) __attribute__((always_inline)) {
        write_lines<Format, count, kLinesOf<Format, count>>(packed, vectors - rest, vectors);
      });
    }
  }

  template <typename Format>
  MOE_EXT_INLINE Packed<Format> pack(Panel& memory) const {
    using Lanes = typename Format::Lanes;
    using Factor = typename Format::Factor;
    constexpr int64_t R = Format::kRegisters, kFloats = sizeof(Lanes) / sizeof(float);
    const int64_t steps = parts(left.rows, Format::kDepth), apart = factors_apart(out.rows);
    const int64_t vectors = parts(out.columns, Format::kElements);
    const int64_t registers = vectors * steps * R;
    const Matrix panel = memory.get(ScalarType::Float, 1, registers * kFloats + steps * apart);
    auto* packed = reinterpret_cast<Lanes*>(panel.data);
    auto* factors = reinterpret_cast<Factor*>(packed + registers);
    for (int64_t v = 0; v < vectors; ++v) {
      for (int64_t s = 0; s < steps; ++s) {
        widen_lines<Format>(right, s * Format::kDepth, v, packed + (v * steps + s) * R);
      }
    }
    for (int64_t s = 0; s < steps; ++s) {
      factors_of_columns<Format>(left, s * Format::kDepth, factors + s * apart);
    }
    return {packed, factors, steps, apart};
  }

  // Vectors v to end - 1 of all lines of out: so many vectors of so many lines at once.
  template <typename Format, int64_t count, int64_t lines>
  MOE_EXT_INLINE void write_lines(const Packed<Format> packed, int64_t begin, int64_t end) const {
    int64_t r = 0;
    for (; r + lines <= out.rows; r += lines) {
      for (int64_t v = begin; v < end; v += count) write<Format, count, lines>(packed, r, v);
    }
    for (; r < out.rows; ++r) {
      for (int64_t v = begin; v < end; v += count) write<Format, count, 1>(packed, r, v);
    }
  }

  // Vectors v, v + 1, ... of lines r, r + 1, ...
  template <typename Format, int64_t count, int64_t lines>
  MOE_EXT_INLINE void write(const Packed<Format> packed, int64_t r, int64_t v) const {
    using scalar_t = typename Format::scalar_t;
    using Lanes = typename Format::Lanes;
    constexpr int64_t R = Format::kRegisters, kWidth = count * R;
    const int64_t steps = packed.steps, apart = packed.apart;
    const auto* vectors = packed.vectors + v * steps * R;
    const auto* factors = packed.factors + r;
    const bool writes_around = around && (v + count) * Format::kElements <= out.columns;
    // GCC finds out too late that it could unroll these loops: the sums would be in memory.
    Lanes sums[lines][kWidth];
#pragma GCC unroll 8
    for (int64_t i = 0; i < lines; ++i) {
#pragma GCC unroll 4
      for (int64_t p = 0; p < kWidth; ++p) sums[i][p] = Lanes{};
    }
    // Two steps share the instructions of the loop.
#pragma GCC unroll 2
    for (int64_t s = 0; s < steps; ++s, vectors += R, factors += apart) {
      Lanes row[kWidth];
#pragma GCC unroll 4
      for (int64_t p = 0; p < kWidth; ++p) row[p] = vectors[p / R * steps * R + p % R];
#pragma GCC unroll 8
      for (int64_t i = 0; i < lines; ++i) {
#pragma GCC unroll 4
        for (int64_t p = 0; p < kWidth; ++p) Format::add_lines(sums[i][p], row[p], factors[i]);
      }
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < lines; ++i) {
#pragma GCC unroll 4
      for (int64_t c = 0; c < count; ++c) {
        Lanes whole[R];
        for (int64_t p = 0; p < R; ++p) whole[p] = sums[i][c * R + p];
        if (!writes_around) {
          write_vector<Format>(whole, out, r + i, v + c);
          continue;
        }
        scalar_t copy[Format::kElements];
        Format::narrow(whole, copy);
        Vector<char, sizeof(copy)> numbers;
        load(numbers, static_cast<const void*>(copy));
        store_around(numbers, row_of<scalar_t>(out, r + i) + (v + c) * Format::kElements);
      }
    }
  }
};

}  // namespace moe_ext
