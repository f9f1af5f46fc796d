// out [N, M] = left [n, N]^T @ right [n, M] for few rows. One thread of an x86 CPU.
//
// The limit is the memory of the result, which is written once, four lines at a time.

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
  static constexpr int kAtOnce = 4;  // lines of out

  template <typename Format>
  MOE_EXT_INLINE void multiply(Panel& memory) const {
    using Lanes = typename Format::Lanes;
    using scalar_t = typename Format::scalar_t;
    constexpr int R = Format::kRegisters;
    const int64_t n = left.rows, N = out.rows;
    const int64_t vectors = (out.columns + Format::kElements - 1) / Format::kElements;
    const int64_t floats = vectors * n * R * static_cast<int64_t>(sizeof(Lanes) / sizeof(float));
    const Matrix panel = memory.get(ScalarType::Float, 1, floats + n * N);
    auto* packed = reinterpret_cast<Lanes*>(panel.data);             // [vectors, n, R]
    float* factors = reinterpret_cast<float*>(panel.data) + floats;  // [n, N]
    for (int64_t v = 0; v < vectors; ++v) {
      for (int64_t j = 0; j < n; ++j) {
        scalar_t copy[Format::kElements];
        Format::widen(vector_of(right, j, v, copy), packed + (v * n + j) * R);
      }
    }
    to_floats<Format>(left, factors);
    int64_t r = 0;
    for (; r + kAtOnce <= N; r += kAtOnce) write<Format, kAtOnce>(packed, factors, r, vectors);
    for (; r < N; ++r) write<Format, 1>(packed, factors, r, vectors);
  }

  // Lines r, r + 1, ... of out.
  template <typename Format, int count>
  MOE_EXT_INLINE void write(const typename Format::Lanes* packed, const float* factors, int64_t r,
                            int64_t vectors) const {
    constexpr int R = Format::kRegisters;
    for (int64_t v = 0; v < vectors; ++v) {
      typename Format::Lanes sums[count][R]{};
      for (int64_t j = 0; j < left.rows; ++j, packed += R) {
        const float* factor = factors + j * out.rows + r;
        for (int i = 0; i < count; ++i) {
          for (int p = 0; p < R; ++p) sums[i][p] += packed[p] * factor[i];
        }
      }
      for (int i = 0; i < count; ++i) write_vector<Format>(sums[i], out, r + i, v);
    }
  }
};

}  // namespace moe_ext
