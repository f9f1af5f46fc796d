// Packed rows become columns of floats, so that a loop over k reads memory in order.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../machine/matrix.h"
#include "../machine/vector.h"

namespace moe_ext {

// Calls body with a zero of float, or of a dtype of 16 bits.
template <typename Body>
MOE_EXT_INLINE decltype(auto) visit_float_or_16bit(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::BFloat16: return body(torch::headeronly::BFloat16{});
    case ScalarType::Half: return body(torch::headeronly::Half{});
    default: return body(0.0f);
  }
}

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

// The same of numbers of any type.
template <int64_t count, typename scalar_t, typename V, typename At>
MOE_EXT_INLINE void load_fours_as(V& v, const At& at) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    return load_fours<count>(v, at);
  } else {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
    if constexpr (sizeof(V) >= 32) {
      const auto four = [&](int64_t i) __attribute__((always_inline)) {
        uint64_t numbers = 0;
        if (i < count) std::memcpy(&numbers, at(i), sizeof(numbers));
        return numbers;
      };
      using Fours = Vector<uint64_t, sizeof(V) / 2>;
      using Halves = Vector<uint16_t, sizeof(V) / 2>;
      if constexpr (sizeof(V) == 64) {
        widen<scalar_t>(v, Halves(Fours{four(0), four(1), four(2), four(3)}));
      } else {
        widen<scalar_t>(v, Halves(Fours{four(0), four(1)}));
      }
      return;
    }
#endif
    float fours[sizeof(V) / sizeof(float)] = {};
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < 4; ++j) fours[4 * i + j] = static_cast<float>(at(i)[j]);
    }
    load(v, fours);
  }
}

// `pack` of rows that are dense, four columns of all at a time.
template <typename scalar_t, typename Lanes, int64_t fours>
MOE_EXT_INLINE void pack_lines(const Indexed& matrix, float* to, int64_t apart) {
  // Rows that the last four lack repeat the last one. (Registers do not hold all addresses; to load
  // them costs nothing beside the rest.)
  const scalar_t* lines[4 * fours];
  for (int64_t i = 0; i < 4 * fours; ++i) {
    lines[i] = row_of<const scalar_t>(matrix, std::min(i, matrix.rows - 1));
  }
  int64_t k = 0;
  for (; k + 4 <= matrix.columns; k += 4) {
    Lanes four[4];
#pragma GCC unroll 4
    for (int64_t r = 0; r < 4; ++r) {
      load_fours_as<fours, scalar_t>(
          four[r], [&](int64_t i) __attribute__((always_inline)) { return lines[4 * i + r] + k; });
    }
    transpose(four);
#pragma GCC unroll 4
    for (int64_t r = 0; r < 4; ++r) store(four[r], to + (k + r) * apart);
  }
  for (; k < matrix.columns; ++k) {
    for (int64_t i = 0; i < matrix.rows; ++i) {
      to[k * apart + i] = static_cast<float>(lines[i][k]);
    }
  }
}

// Writes `count` numbers as floats. Those of 16 bits fill a register: its other lanes are written
// too.
template <int64_t count, typename Lanes, typename scalar_t>
MOE_EXT_INLINE void pack_column(const scalar_t* from, float* to) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    std::memcpy(to, from, count * sizeof(float));
  } else {
    Lanes lanes;
    if constexpr (count * sizeof(float) == sizeof(Lanes)) {
      load_as(lanes, from);
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
    } else if constexpr (sizeof(Lanes) == 32 && count > 4) {
      // A register cannot be loaded soon after its memory was written in pieces.
      uint64_t first = 0, last = 0;
      std::memcpy(&first, from, sizeof(first));
      std::memcpy(&last, from + 4, (count - 4) * sizeof(*from));
      widen<scalar_t>(lanes, Vector<uint16_t, 16>(Vector<uint64_t, 16>{first, last}));
#endif
    } else {
      load_first_as(lanes, from, count);
    }
    store(lanes, to);
  }
}

template <typename scalar_t, typename Lanes>
MOE_EXT_INLINE void pack_as(const Indexed& matrix, float* to, int64_t apart) {
  constexpr int64_t kLanes = sizeof(Lanes) / sizeof(float);
  if (matrix.has_dense_rows()) {
    return with_count<kLanes / 4>(parts(matrix.rows, 4),
                                  [&](auto fours) __attribute__((always_inline)) {
                                    pack_lines<scalar_t, Lanes, fours>(matrix, to, apart);
                                  });
  }
  with_count<kLanes>(matrix.rows, [&](auto n) __attribute__((always_inline)) {
    const Indexed columns = matrix.transposed();
    for (int64_t k = 0; k < matrix.columns; ++k) {
      pack_column<n, Lanes>(row_of<const scalar_t>(columns, k), to + k * apart);
    }
  });
}

// to[k * apart + i] = matrix[i, k] for all rows i, at least one and up to the number of lanes; rows
// or columns are dense. It writes whole registers: the other lanes of one are written over by the
// next k, or have sums that nobody reads.
template <typename Lanes>
MOE_EXT_INLINE void pack(const Indexed& matrix, float* to, int64_t apart) {
  visit_float_or_16bit(matrix.dtype, [&](auto zero) __attribute__((always_inline)) {
    pack_as<decltype(zero), Lanes>(matrix, to, apart);
  });
}

}  // namespace moe_ext
