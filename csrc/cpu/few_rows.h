// Products of few rows on one thread of an x86 CPU:
//
//   FewRows      out [n, N] = rows [n, M] @ weight [N, M]^T + bias [1, N], rows of the weight dense
//   FewRowsFlat  the same, columns of the weight dense
//   FewOuter     out [N, M] = left [n, N]^T @ right [n, M]
//
// The limit is the memory of the weight, or of FewOuter's result. So it is read or written once,
// four lines at a time. The sums of FewRows are in registers; FewRowsFlat adds four lines to the
// sums of all rows, for as many columns at a time as leave these in the first cache.
//
// The terms of a sum are added in one order, that of the lanes included: the result of a row
// depends neither on the number of other rows, nor on threads and tiles.

#pragma once

#include "lanes.h"
#include "matrix.h"

#if defined(__x86_64__)
namespace moe_ext {

constexpr int kLines = 4;  // as many as sum_lanes adds up

// Vector v of row `row`; a copy, filled up with zeros, where the row ends within it.
template <int size, typename scalar_t>
MOE_EXT_INLINE const scalar_t* vector_of(const Matrix& matrix, int64_t row, int64_t v,
                                         scalar_t (&copy)[size]) {
  const auto* from = reinterpret_cast<const scalar_t*>(matrix.data) + row * matrix.row_stride;
  const int64_t begin = v * size, rest = matrix.columns - begin;
  if (rest >= size) return from + begin;
  std::memset(static_cast<void*>(copy), 0, sizeof(copy));
  std::memcpy(static_cast<void*>(copy), from + begin, rest * sizeof(scalar_t));
  return copy;
}

// Whether there are loops for a dtype on this CPU.
inline bool has_lanes(ScalarType dtype) {
#if defined(MOE_EXT_HALF_LANES)
  if (dtype == ScalarType::Half) return register_bytes() >= 32;
#endif
  return (dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && register_bytes() >= 32;
}

// Calls body(Format{}) with the format of a dtype that has_lanes.
template <int bytes, typename Body>
MOE_EXT_INLINE void visit_format(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float: return body(FloatFormat<bytes>{});
#if defined(MOE_EXT_HALF_LANES)
    case ScalarType::Half:
      if constexpr (bytes > 16) body(HalfFormat<bytes>{});
      return;
#endif
    default: return body(BFloat16Format<bytes>{});
  }
}

// Writes vector v of row `row`, as far as the row goes.
template <typename Format>
MOE_EXT_INLINE void write_vector(const typename Format::Lanes* from, const Matrix& matrix,
                                 int64_t row, int64_t v) {
  using scalar_t = typename Format::scalar_t;
  const int64_t begin = v * Format::kElements, rest = matrix.columns - begin;
  scalar_t* to = reinterpret_cast<scalar_t*>(matrix.data) + row * matrix.row_stride + begin;
  if (rest >= Format::kElements) return Format::narrow(from, to);
  scalar_t copy[Format::kElements];
  Format::narrow(from, copy);
  std::memcpy(static_cast<void*>(to), copy, rest * sizeof(scalar_t));
}

// A matrix as floats.
template <typename Format>
MOE_EXT_INLINE void to_floats(const Matrix& matrix, float* to) {
  for (int64_t row = 0; row < matrix.rows; ++row) {
    const auto* from =
        reinterpret_cast<const typename Format::scalar_t*>(matrix.data) + row * matrix.row_stride;
    for (int64_t i = 0; i < matrix.columns; ++i) *to++ = static_cast<float>(from[i]);
  }
}

// The sum over the lanes of each of four registers.
template <int bytes>
MOE_EXT_INLINE void sum_lanes(Vector<float, 16>& sums, const Vector<float, bytes> (&parts)[4]) {
  if constexpr (bytes > 16) {
    Vector<float, bytes / 2> halves[4];
    for (int i = 0; i < 4; ++i) {
      Vector<float, bytes / 2> pair[2];
      std::memcpy(pair, &parts[i], bytes);
      halves[i] = pair[0] + pair[1];
    }
    sum_lanes<bytes / 2>(sums, halves);
  } else {
    Vector<float, 16> rows[4] = {parts[0], parts[1], parts[2], parts[3]};
    transpose(rows);
    sums = (rows[0] + rows[1]) + (rows[2] + rows[3]);
  }
}

struct FewRows {
  Matrix out, rows, weight;
  const Matrix* bias;  // null without

  // memory: of the thread
  template <int bytes>
  MOE_EXT_INLINE void run(Panel& memory) const {
    visit_format<bytes>(rows.dtype, [&](auto format) __attribute__((always_inline)) {
      multiply<decltype(format)>(memory);
    });
  }

 private:
  // The rows of a block: their sums with kLines rows of the weight fit into the registers.
  template <typename Format>
  static constexpr int64_t kBlock = sizeof(typename Format::Lanes) == 64 ? 6 : 3;

  // Rows are packed a block after the other: for each vector of a weight's row, theirs that meet
  // it.
  template <typename Format>
  MOE_EXT_INLINE void multiply(Panel& memory) const {
    using Lanes = typename Format::Lanes;
    const int64_t vectors = (rows.columns + Format::kElements - 1) / Format::kElements;
    const int64_t line = vectors * Format::kRegisters;  // registers of a row
    const int64_t floats = line * static_cast<int64_t>(sizeof(Lanes) / sizeof(float));
    const int64_t width = (weight.rows + kLines - 1) / kLines * kLines;
    const Matrix panel = memory.get(ScalarType::Float, rows.rows, floats + width);
    auto* packed = reinterpret_cast<Lanes*>(panel.data);
    float* totals = reinterpret_cast<float*>(panel.data) + rows.rows * floats;  // [n, width]
    const int64_t blocks = (rows.rows + kBlock<Format> - 1) / kBlock<Format>;
    const int64_t block = (rows.rows + blocks - 1) / blocks;
    for (int64_t begin = 0; begin < rows.rows; begin += block) {
      const int64_t count = std::min(block, rows.rows - begin);
      Lanes* to = packed + begin * line;
      for (int64_t v = 0; v < vectors; ++v) {
        for (int64_t j = begin; j < begin + count; ++j, to += Format::kRegisters) {
          typename Format::scalar_t copy[Format::kElements];
          Format::widen(vector_of(rows, j, v, copy), to);
        }
      }
    }
    for (int64_t r = 0; r < weight.rows; r += kLines) {
      for (int64_t begin = 0; begin < rows.rows; begin += block) {
        const Lanes* from = packed + begin * line;
        float* to = totals + begin * width + r;
        switch (std::min(block, rows.rows - begin)) {
          case 1: multiply_block<Format, 1>(r, from, to, width); break;
          case 2: multiply_block<Format, 2>(r, from, to, width); break;
          case 3: multiply_block<Format, 3>(r, from, to, width); break;
          case 4: multiply_block<Format, 4>(r, from, to, width); break;
          case 5: multiply_block<Format, 5>(r, from, to, width); break;
          default: multiply_block<Format, 6>(r, from, to, width);
        }
      }
    }
    for (int64_t j = 0; j < rows.rows; ++j) finish<Format>(j, totals + j * width);
  }

  // A vector of the weight times one of a row, added to a sum per lane.
  template <typename Format>
  static MOE_EXT_INLINE void add(typename Format::Lanes& sums,
                                 const typename Format::scalar_t* weight,
                                 const typename Format::Lanes* row) {
    typename Format::Lanes w[Format::kRegisters];
    Format::widen(weight, w);
    for (int p = 0; p < Format::kRegisters; ++p) sums += w[p] * row[p];
  }

  // Row j of out, from its totals.
  template <typename Format>
  MOE_EXT_INLINE void finish(int64_t j, const float* totals) const {
    using scalar_t = typename Format::scalar_t;
    auto* to = reinterpret_cast<scalar_t*>(out.data) + j * out.row_stride;
    if (bias) {
      const auto* first = reinterpret_cast<const scalar_t*>(bias->data);
      for (int64_t r = 0; r < out.columns; ++r) {
        to[r] = static_cast<scalar_t>(totals[r] + static_cast<float>(first[r]));
      }
    } else {
      for (int64_t r = 0; r < out.columns; ++r) to[r] = static_cast<scalar_t>(totals[r]);
    }
  }

  // Columns r, r + 1, ... of the totals [count, width] of a block's rows.
  template <typename Format, int count>
  MOE_EXT_INLINE void multiply_block(int64_t r, const typename Format::Lanes* packed, float* totals,
                                     int64_t width) const {
    using Lanes = typename Format::Lanes;
    using scalar_t = typename Format::scalar_t;
    Lanes sums[count][kLines]{};
    int64_t row[kLines];
    const scalar_t* lines[kLines];
    for (int i = 0; i < kLines; ++i) {
      // Beyond the last row it is multiplied again, and left out below.
      row[i] = std::min(r + i, weight.rows - 1);
      lines[i] = reinterpret_cast<const scalar_t*>(weight.data) + row[i] * weight.row_stride;
    }
    const int64_t full = rows.columns / Format::kElements;
    const int64_t ahead = kLines * weight.row_stride;
    for (int64_t v = 0; v < full; ++v, packed += count * Format::kRegisters) {
      // The next lines, in the order of memory where it is the limit.
      for (int i = 0; i < kLines; ++i) {
        if constexpr (count <= 3) {
          __builtin_prefetch(lines[0] + (v * kLines + i) * Format::kElements + ahead, 0, 3);
        } else {
          __builtin_prefetch(lines[i] + v * Format::kElements + ahead, 0, 2);
        }
      }
      for (int j = 0; j < count; ++j) {
        for (int i = 0; i < kLines; ++i) {
          add<Format>(sums[j][i], lines[i] + v * Format::kElements,
                      packed + j * Format::kRegisters);
        }
      }
    }
    if (full * Format::kElements < rows.columns) {
      for (int i = 0; i < kLines; ++i) {
        scalar_t copy[Format::kElements];
        const scalar_t* last = vector_of(weight, row[i], full, copy);
        for (int j = 0; j < count; ++j)
          add<Format>(sums[j][i], last, packed + j * Format::kRegisters);
      }
    }
    for (int j = 0; j < count; ++j) {
      Vector<float, 16> four;
      sum_lanes<sizeof(Lanes)>(four, sums[j]);
      store(four, totals + j * width);
    }
  }
};

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
      for (; m + kLines <= M; m += kLines) add<Format, kLines>(sums, begin, end, lines, factors, m);
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
        Format::widen(vector_of(*bias, 0, v, copy), first);
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
        Format::widen(vector_of(lines, m + i, v, copy), terms[i]);
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

struct FewOuter {
  Matrix out, left, right;

  template <int bytes>
  MOE_EXT_INLINE void run(Panel& memory) const {
    visit_format<bytes>(left.dtype, [&](auto format) __attribute__((always_inline)) {
      multiply<decltype(format)>(memory);
    });
  }

 private:
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
    for (; r + kLines <= N; r += kLines) write<Format, kLines>(packed, factors, r, vectors);
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
#endif
