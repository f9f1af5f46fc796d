// out [n, N] = rows [n, M] @ weight [N, M]^T + bias [1, N] for few rows, where the columns of the
// weight are dense in memory. One thread of an x86 CPU.
//
// The weight is read once: four of its lines are added to the sums of all rows, for as many columns
// at a time as leave these in the first cache. The order is that of the lines for any number of
// rows.

#pragma once

#include "lanes.h"

namespace moe_ext {

struct FewRowsFlat {
  Matrix out, rows, weight;
  const Matrix* bias;

  template <int bytes>
  MOE_EXT_INLINE void run(Panel& memory) const {
    visit_format<bytes>(rows.dtype, [&](auto format) __attribute__((always_inline)) {
      multiply<decltype(format)>(memory);
    });
  }

 private:
  static constexpr int kAtOnce = 4;  // lines
  // Bytes of sums that are added to at a time: they stay in the first cache.
  static constexpr int64_t kCached = 1 << 14;

  template <typename Format>
  MOE_EXT_INLINE void multiply(Panel& memory) const {
    using Lanes = typename Format::Lanes;
    const Matrix lines = weight.transposed();  // [M, N], a line dense in memory
    const int64_t n = rows.rows, M = lines.rows;
    constexpr int64_t kBytes = Format::kRegisters * sizeof(Lanes);
    const int64_t vectors = (lines.columns + Format::kElements - 1) / Format::kElements;
    const int64_t chunk = std::max<int64_t>(1, kCached / (n * kBytes));
    const int64_t floats = n * (std::min(chunk, vectors) * kBytes / sizeof(float));
    const Matrix panel = memory.get(ScalarType::Float, 1, floats + n * M);
    auto* sums = reinterpret_cast<Lanes*>(panel.data);  // [vectors of a chunk, n, kRegisters]
    float* factors = reinterpret_cast<float*>(panel.data) + floats;  // [n, M]
    to_floats<Format>(rows, factors);
    for (int64_t begin = 0; begin < vectors; begin += chunk) {
      const int64_t end = std::min(begin + chunk, vectors);
      start<Format>(sums, begin, end);
      int64_t m = 0;
      for (; m + kAtOnce <= M; m += kAtOnce)
        add<Format, kAtOnce>(sums, begin, end, lines, factors, m);
      for (; m < M; ++m) add<Format, 1>(sums, begin, end, lines, factors, m);
      finish<Format>(sums, begin, end);
    }
  }

  template <typename Format>
  MOE_EXT_INLINE void start(typename Format::Lanes* sums, int64_t begin, int64_t end) const {
    for (int64_t v = begin; v < end; ++v) {
      typename Format::Lanes first[Format::kRegisters]{};
      if (bias) {
        typename Format::scalar_t copy[Format::kElements];
        Format::widen(vector_of<sizeof(typename Format::Lanes)>(*bias, 0, v, copy), first);
      }
      for (int64_t j = 0; j < rows.rows; ++j) {
        for (int p = 0; p < Format::kRegisters; ++p) *sums++ = first[p];
      }
    }
  }

  // Lines m, m + 1, ... times the rows' numbers m, m + 1, ...
  template <typename Format, int count>
  MOE_EXT_INLINE void add(typename Format::Lanes* sums, int64_t begin, int64_t end,
                          const Matrix& lines, const float* factors, int64_t m) const {
    using scalar_t = typename Format::scalar_t;
    const auto* next =
        reinterpret_cast<const scalar_t*>(lines.data) + (m + count) * lines.row_stride;
    for (int64_t v = begin; v < end; ++v) {
      typename Format::Lanes terms[count][Format::kRegisters];
      for (int i = 0; i < count; ++i) {
        scalar_t copy[Format::kElements];
        __builtin_prefetch(next + i * lines.row_stride + v * Format::kElements, 0, 2);
        Format::widen(vector_of<sizeof(typename Format::Lanes)>(lines, m + i, v, copy), terms[i]);
      }
      for (int64_t j = 0; j < rows.rows; ++j) {
        const float* factor = factors + j * lines.rows + m;
        for (int p = 0; p < Format::kRegisters; ++p, ++sums) {
          auto sum = *sums;
          for (int i = 0; i < count; ++i) sum += terms[i][p] * factor[i];
          *sums = sum;
        }
      }
    }
  }

  template <typename Format>
  MOE_EXT_INLINE void finish(const typename Format::Lanes* sums, int64_t begin, int64_t end) const {
    for (int64_t v = begin; v < end; ++v) {
      for (int64_t j = 0; j < rows.rows; ++j, sums += Format::kRegisters) {
        write_vector<Format>(sums, out, j, v);
      }
    }
  }
};

}  // namespace moe_ext
