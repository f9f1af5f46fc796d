// out [N, M] = left [n, N]^T @ right [n, M] for few rows. One thread of an x86 CPU.
//
// The limit is the memory of the result, which is written once: four lines at a time, as many of
// their columns as leave those of right in the first cache.

#pragma once

#include "lanes.h"

namespace moe_ext {

struct FewOuter {
  Matrix out, left, right;

  template <int bytes>
  MOE_EXT_INLINE void run(Panel& memory) const {
    visit_format<bytes>(left.dtype, [&](auto format) __attribute__((always_inline)) {
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
    using scalar_t = typename Format::scalar_t;
    constexpr int R = Format::kRegisters;
    const int64_t n = left.rows, N = out.rows;
    const int64_t vectors = (out.columns + Format::kElements - 1) / Format::kElements;
    const int64_t floats = vectors * n * R * static_cast<int64_t>(sizeof(Lanes) / sizeof(float));
    const Matrix panel = memory.get(ScalarType::Float, 1, floats + n * factors_apart());
    auto* packed = reinterpret_cast<Lanes*>(panel.data);             // [vectors, n, R]
    float* factors = reinterpret_cast<float*>(panel.data) + floats;  // [n, N]
    for (int64_t v = 0; v < vectors; ++v) {
      for (int64_t j = 0; j < n; ++j) {
        scalar_t copy[Format::kElements];
        Format::widen(vector_of<sizeof(typename Format::Lanes)>(right, j, v, copy),
                      packed + (v * n + j) * R);
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      convert<sizeof(Lanes)>(row_of<const scalar_t>(left, j), N, factors + j * factors_apart());
    }
    const int64_t part = std::max<int64_t>(1, kCached / (n * R * sizeof(Lanes)));
    for (int64_t v = 0; v < vectors; v += part) {
      const int64_t end = std::min(v + part, vectors);
      int64_t r = 0;
      for (; r + kAtOnce <= N; r += kAtOnce) {
        write_lines<Format, kAtOnce>(packed, factors, r, v, end);
      }
      for (; r < N; ++r) write_lines<Format, 1>(packed, factors, r, v, end);
    }
  }

  // From a row of factors to the next. Rows a power of two apart would push each other out of the
  // first cache.
  int64_t factors_apart() const { return out.rows + 16; }

  // Vectors v to end - 1 of lines r, r + 1, ... of out.
  template <typename Format, int64_t lines>
  MOE_EXT_INLINE void write_lines(const typename Format::Lanes* packed, const float* factors,
                                  int64_t r, int64_t v, int64_t end) const {
    constexpr int64_t kVectors = kSums<Format> / kAtOnce / Format::kRegisters;
    const int64_t full = std::min(end, out.columns / Format::kElements);
    for (; v + kVectors <= full; v += kVectors) {
      write<Format, lines, kVectors>(packed, factors, r, v);
    }
    for (; v < end; ++v) write<Format, lines, 1>(packed, factors, r, v);
  }

  // Vectors v, v + 1, ... of these.
  template <typename Format, int64_t lines, int64_t count>
  MOE_EXT_INLINE void write(const typename Format::Lanes* packed, const float* factors, int64_t r,
                            int64_t v) const {
    using scalar_t = typename Format::scalar_t;
    using Lanes = typename Format::Lanes;
    constexpr int64_t R = Format::kRegisters, kWidth = count * R;
    const int64_t n = left.rows;
    packed += v * n * R;
    factors += r;
    // GCC finds out too late that it could unroll these loops: the sums would be in memory.
    Lanes sums[lines][kWidth];
#pragma GCC unroll 4
    for (int64_t i = 0; i < lines; ++i) {
#pragma GCC unroll 4
      for (int64_t p = 0; p < kWidth; ++p) sums[i][p] = Lanes{};
    }
    for (int64_t j = 0; j < n; ++j, packed += R, factors += factors_apart()) {
      Lanes row[kWidth];
#pragma GCC unroll 4
      for (int64_t p = 0; p < kWidth; ++p) row[p] = packed[p / R * n * R + p % R];
#pragma GCC unroll 4
      for (int64_t i = 0; i < lines; ++i) {
        const Lanes factor = factors[i] - Lanes{};  // 0 + it would be computed, for -0
#pragma GCC unroll 4
        for (int64_t p = 0; p < kWidth; ++p) add_product(sums[i][p], row[p], factor);
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
