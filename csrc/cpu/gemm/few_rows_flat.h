// out [n, N] = rows [n, M] @ weight [N, M]^T + bias [1, N] for few rows, where the columns of the
// weight are dense in memory. One thread of an x86 CPU.
//
// The weight is read once: some of its lines, or of pairs of them, are added to the sums of all
// rows, for as many columns at a time as leave these in the first cache. The order is that of the
// lines for any number of rows.

#pragma once

#include <algorithm>

#include "../machine/lanes.h"

namespace moe_ext {

struct FewRowsFlat {
  Matrix out, rows, weight;
  const Matrix* bias;

  template <int bytes>
  MOE_EXT_INLINE void run(Panel& memory) const {
    visit_lines_format<bytes>(rows.dtype, [&](auto format) __attribute__((always_inline)) {
      multiply<decltype(format)>(memory);
    });
  }

 private:
  // So many steps, of Format::kDepth lines each, share the load and the store of a sum: kMore with
  // kMany rows or more. (With fewer they take longer on an Emerald Rapids.)
  static constexpr int64_t kAtOnce = 4, kMany = 6;
  template <typename Format>
  static constexpr int64_t kMore =
      sizeof(typename Format::Lanes) == 64 && Format::kRegisters == 1 ? 8 : kAtOnce;
  // Bytes of sums that are added to at a time: they stay in the first cache.
  static constexpr int64_t kCached = 3 << 13;

  template <typename Format>
  MOE_EXT_INLINE void multiply(Panel& memory) const {
    using Lanes = typename Format::Lanes;
    using Factor = typename Format::Factor;
    const Matrix lines = weight.transposed();  // [M, N], a line dense in memory
    constexpr int64_t kDepth = Format::kDepth, R = Format::kRegisters;
    constexpr int64_t kFloats = sizeof(Lanes) / sizeof(float);
    const int64_t n = rows.rows, whole = lines.rows / kDepth, steps = parts(lines.rows, kDepth);
    const int64_t vectors = parts(lines.columns, Format::kElements);
    const int64_t chunk = std::max<int64_t>(1, kCached / (n * R * sizeof(Lanes)));
    const int64_t registers = std::min(chunk, vectors) * n * R, apart = factors_apart(steps);
    const Matrix panel = memory.get(ScalarType::Float, 1, registers * kFloats + n * apart);
    auto* sums = reinterpret_cast<Lanes*>(panel.data);            // [vectors of a chunk, n, R]
    auto* factors = reinterpret_cast<Factor*>(sums + registers);  // [n, apart]
    for (int64_t j = 0; j < n; ++j) factors_of_row<Format>(rows, j, factors + j * apart);
    for (int64_t begin = 0; begin < vectors; begin += chunk) {
      const int64_t end = std::min(begin + chunk, vectors);
      start<Format>(sums, begin, end);
      int64_t s = 0;
      if constexpr (kMore<Format> > kAtOnce) {
        for (; n >= kMany && s + kMore<Format> <= whole; s += kMore<Format>) {
          add<Format, kMore<Format>>(sums, begin, end, lines, factors + s, apart, s * kDepth);
        }
      }
      for (; s + kAtOnce <= whole; s += kAtOnce) {
        add<Format, kAtOnce>(sums, begin, end, lines, factors + s, apart, s * kDepth);
      }
      for (; s < steps; ++s) {
        add<Format, 1>(sums, begin, end, lines, factors + s, apart, s * kDepth);
      }
      finish<Format>(sums, begin, end);
    }
  }

  // For more rows pair_loops.h adds the bias last, or zeros without one, and block_product.h adds
  // it first. A row must get the same result here.
  template <typename Format>
  static constexpr bool kBiasLast = Format::kDepth > 1;

  // A vector of the bias; zeros without one.
  template <typename Format>
  MOE_EXT_INLINE void bias_vector(int64_t v,
                                  typename Format::Lanes (&to)[Format::kRegisters]) const {
    for (auto& lanes : to) lanes = typename Format::Lanes{};
    if (!bias) return;
    typename Format::scalar_t copy[Format::kElements];
    Format::floats(vector_of<sizeof(typename Format::Lanes)>(*bias, 0, v, copy), to);
  }

  template <typename Format>
  MOE_EXT_INLINE void start(typename Format::Lanes* sums, int64_t begin, int64_t end) const {
    for (int64_t v = begin; v < end; ++v) {
      typename Format::Lanes first[Format::kRegisters]{};
      if constexpr (!kBiasLast<Format>) bias_vector<Format>(v, first);
      for (int64_t j = 0; j < rows.rows; ++j) {
        for (int p = 0; p < Format::kRegisters; ++p) *sums++ = first[p];
      }
    }
  }

  // The lines of `count` steps times the rows' factors.
  template <typename Format, int count>
  MOE_EXT_INLINE void add(typename Format::Lanes* sums, int64_t begin, int64_t end,
                          const Matrix& lines, const typename Format::Factor* factors,
                          int64_t apart, int64_t first) const {
    using scalar_t = typename Format::scalar_t;
    constexpr int64_t kDepth = Format::kDepth;
    const auto* next =
        reinterpret_cast<const scalar_t*>(lines.data) + (first + count * kDepth) * lines.row_stride;
    for (int64_t v = begin; v < end; ++v) {
      typename Format::Lanes terms[count][Format::kRegisters];
      for (int i = 0; i < count * kDepth; ++i) {
        __builtin_prefetch(next + i * lines.row_stride + v * Format::kElements, 0, 2);
      }
      for (int i = 0; i < count; ++i) widen_lines<Format>(lines, first + i * kDepth, v, terms[i]);
      for (int64_t j = 0; j < rows.rows; ++j) {
        const auto* factor = factors + j * apart;
        for (int p = 0; p < Format::kRegisters; ++p, ++sums) {
          auto sum = *sums;
          for (int i = 0; i < count; ++i) {
            if constexpr (Format::kRegisters == 1) {
              Format::add_lines_from(sum, terms[i][p], factor[i]);
            } else {
              Format::add_lines(sum, terms[i][p], factor[i]);
            }
          }
          *sums = sum;
        }
      }
    }
  }

  template <typename Format>
  MOE_EXT_INLINE void finish(typename Format::Lanes* sums, int64_t begin, int64_t end) const {
    for (int64_t v = begin; v < end; ++v) {
      typename Format::Lanes last[Format::kRegisters];
      if constexpr (kBiasLast<Format>) bias_vector<Format>(v, last);
      for (int64_t j = 0; j < rows.rows; ++j, sums += Format::kRegisters) {
        if constexpr (kBiasLast<Format>) {
          for (int p = 0; p < Format::kRegisters; ++p) sums[p] += last[p];
        }
        write_vector<Format>(sums, out, j, v);
      }
    }
  }
};

}  // namespace moe_ext
