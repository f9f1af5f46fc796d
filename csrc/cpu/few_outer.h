// out [N, M] = left [n, N]^T @ right [n, M] for few rows. One thread of an x86 CPU.
//
// The limit is the memory of the result, which is written once: four lines at a time, as many of
// their columns as leave those of right in the first cache.

#pragma once

#include <algorithm>

#include "lanes.h"

namespace moe_ext {

struct FewOuter {
  Matrix out, left, right;

  template <int bytes>
  MOE_EXT_INLINE void run(Panel& memory) const {
    visit_lines_format<bytes>(left.dtype, [&](auto format) __attribute__((always_inline)) {
      multiply<decltype(format)>(memory);
    });
  }

 private:
  static constexpr int64_t kAtOnce = 4;  // lines of out
  // Bytes of right that are multiplied at a time: they stay in the first cache.
  static constexpr int64_t kCached = 1 << 14;
  // Sums that fit into the registers.
  template <typename Format>
  static constexpr int64_t kSums = sizeof(typename Format::Lanes) == 64 ? 16 : 8;

  template <typename Format>
  MOE_EXT_INLINE void multiply(Panel& memory) const {
    using Lanes = typename Format::Lanes;
    using Factor = typename Format::Factor;
    constexpr int64_t R = Format::kRegisters, kFloats = sizeof(Lanes) / sizeof(float);
    const int64_t steps = steps_of<Format>(), N = out.rows;
    const int64_t vectors = parts(out.columns, Format::kElements);
    const int64_t registers = vectors * steps * R, apart = factors_apart(N);
    const Matrix panel = memory.get(ScalarType::Float, 1, registers * kFloats + steps * apart);
    auto* packed = reinterpret_cast<Lanes*>(panel.data);            // [vectors, steps, R]
    auto* factors = reinterpret_cast<Factor*>(packed + registers);  // [steps, apart]
    for (int64_t v = 0; v < vectors; ++v) {
      for (int64_t s = 0; s < steps; ++s) {
        widen_lines<Format>(right, s * Format::kDepth, v, packed + (v * steps + s) * R);
      }
    }
    for (int64_t s = 0; s < steps; ++s) {
      factors_of_columns<Format>(left, s * Format::kDepth, factors + s * apart);
    }
    const int64_t part = std::max<int64_t>(1, kCached / (steps * R * sizeof(Lanes)));
    for (int64_t v = 0; v < vectors; v += part) {
      const int64_t end = std::min(v + part, vectors);
      int64_t r = 0;
      for (; r + kAtOnce <= N; r += kAtOnce) {
        write_lines<Format, kAtOnce>(packed, factors, r, v, end);
      }
      for (; r < N; ++r) write_lines<Format, 1>(packed, factors, r, v, end);
    }
  }

  // The steps of a sum.
  template <typename Format>
  int64_t steps_of() const {
    return parts(left.rows, Format::kDepth);
  }

  // Vectors v to end - 1 of lines r, r + 1, ... of out.
  template <typename Format, int64_t lines>
  MOE_EXT_INLINE void write_lines(const typename Format::Lanes* packed,
                                  const typename Format::Factor* factors, int64_t r, int64_t v,
                                  int64_t end) const {
    constexpr int64_t kVectors = kSums<Format> / kAtOnce / Format::kRegisters;
    const int64_t full = std::min(end, out.columns / Format::kElements);
    for (; v + kVectors <= full; v += kVectors) {
      write<Format, lines, kVectors>(packed, factors, r, v);
    }
    for (; v < end; ++v) write<Format, lines, 1>(packed, factors, r, v);
  }

  // Vectors v, v + 1, ... of these.
  template <typename Format, int64_t lines, int64_t count>
  MOE_EXT_INLINE void write(const typename Format::Lanes* packed,
                            const typename Format::Factor* factors, int64_t r, int64_t v) const {
    using scalar_t = typename Format::scalar_t;
    using Lanes = typename Format::Lanes;
    constexpr int64_t R = Format::kRegisters, kWidth = count * R;
    const int64_t steps = steps_of<Format>(), apart = factors_apart(out.rows);
    packed += v * steps * R;
    factors += r;
    // GCC finds out too late that it could unroll these loops: the sums would be in memory.
    Lanes sums[lines][kWidth];
#pragma GCC unroll 4
    for (int64_t i = 0; i < lines; ++i) {
#pragma GCC unroll 4
      for (int64_t p = 0; p < kWidth; ++p) sums[i][p] = Lanes{};
    }
    for (int64_t s = 0; s < steps; ++s, packed += R, factors += apart) {
      Lanes row[kWidth];
#pragma GCC unroll 4
      for (int64_t p = 0; p < kWidth; ++p) row[p] = packed[p / R * steps * R + p % R];
#pragma GCC unroll 4
      for (int64_t i = 0; i < lines; ++i) {
#pragma GCC unroll 4
        for (int64_t p = 0; p < kWidth; ++p) Format::add_lines(sums[i][p], row[p], factors[i]);
      }
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < lines; ++i) {
#pragma GCC unroll 4
      for (int64_t c = 0; c < count; ++c) {
        Lanes whole[R];
        for (int64_t p = 0; p < R; ++p) whole[p] = sums[i][c * R + p];
        if constexpr (count > 1) {
          Format::narrow(whole, row_of<scalar_t>(out, r + i) + (v + c) * Format::kElements);
        } else {
          write_vector<Format>(whole, out, r + i, v);
        }
      }
    }
  }
};

}  // namespace moe_ext
