// Packed rows of floats become columns, so that a loop over k reads memory in order.

#pragma once

#include <algorithm>
#include <cstring>

#include "../vector.h"
#include "matrix.h"

namespace moe_ext {

// Four numbers from each of at(0), at(1), ..., and zeros.
template <int64_t count, typename V, typename At>
MOE_EXT_INLINE void load_fours(V& v, const At& at) {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
  // GCC would build the register in memory, and its load would wait for the stores.
  struct Four {
    float numbers[4];
  };
  const auto four = [&](int64_t i) __attribute__((always_inline)) {
    return reinterpret_cast<const Four*>(at(i));
  };
  V whole;
  if constexpr (sizeof(V) == 64) {
    asm("vmovups %1, %x0" : "=v"(whole) : "m"(*four(0)));
    if constexpr (count > 1) asm("vinsertf32x4 $1, %1, %0, %0" : "+v"(whole) : "m"(*four(1)));
    if constexpr (count > 2) asm("vinsertf32x4 $2, %1, %0, %0" : "+v"(whole) : "m"(*four(2)));
    if constexpr (count > 3) asm("vinsertf32x4 $3, %1, %0, %0" : "+v"(whole) : "m"(*four(3)));
  } else if constexpr (sizeof(V) == 32) {
    asm("vmovups %1, %x0" : "=x"(whole) : "m"(*four(0)));
    if constexpr (count > 1) asm("vinsertf128 $1, %1, %0, %0" : "+x"(whole) : "m"(*four(1)));
  } else {
    load(whole, at(0));
  }
  v = whole;
#else
  float fours[sizeof(V) / sizeof(float)] = {};
  for (int64_t i = 0; i < count; ++i) std::memcpy(fours + 4 * i, at(i), 16);
  load(v, fours);
#endif
}

// `pack` of rows that are dense, four columns of all at a time.
template <typename Lanes, int64_t fours>
MOE_EXT_INLINE void pack_lines(const Indexed& matrix, float* to, int64_t apart) {
  // Rows that the last four lack repeat the last one. (Registers do not hold all addresses; to load
  // them costs nothing beside the rest.)
  const float* lines[4 * fours];
  for (int64_t i = 0; i < 4 * fours; ++i) {
    lines[i] = row_of<const float>(matrix, std::min(i, matrix.rows - 1));
  }
  int64_t k = 0;
  for (; k + 4 <= matrix.columns; k += 4) {
    Lanes four[4];
#pragma GCC unroll 4
    for (int64_t r = 0; r < 4; ++r) {
      load_fours<fours>(
          four[r], [&](int64_t i) __attribute__((always_inline)) { return lines[4 * i + r] + k; });
    }
    transpose(four);
#pragma GCC unroll 4
    for (int64_t r = 0; r < 4; ++r) store(four[r], to + (k + r) * apart);
  }
  for (; k < matrix.columns; ++k) {
    for (int64_t i = 0; i < matrix.rows; ++i) to[k * apart + i] = lines[i][k];
  }
}

// to[k * apart + i] = matrix[i, k] for all rows i, at least one and up to the number of lanes; rows
// or columns are dense. It writes whole registers: the other lanes of one are written over by the
// next k, or have sums that nobody reads.
template <typename Lanes>
MOE_EXT_INLINE void pack(const Indexed& matrix, float* to, int64_t apart) {
  constexpr int64_t kLanes = sizeof(Lanes) / sizeof(float);
  if (matrix.has_dense_rows()) {
    return with_count<kLanes / 4>(parts(matrix.rows, 4),
                                  [&](auto fours) __attribute__((always_inline)) {
                                    pack_lines<Lanes, fours>(matrix, to, apart);
                                  });
  }
  with_count<kLanes>(matrix.rows, [&](auto n) __attribute__((always_inline)) {
    const Indexed columns = matrix.transposed();
    for (int64_t k = 0; k < matrix.columns; ++k) {
      std::memcpy(to + k * apart, columns.row(k), n * sizeof(float));
    }
  });
}

}  // namespace moe_ext
