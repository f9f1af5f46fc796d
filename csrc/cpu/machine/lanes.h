// Numbers of memory as registers of floats, for products of few rows.
//
// Format::kElements numbers fill Format::kRegisters registers; Format::add(sums, a, b) adds the
// products of two of these to a sum per lane. bfloat16 is the upper half of a float: its even and
// its odd elements are two registers, or the CPU adds up the products of pairs itself.
//
// Where lines are added up, a lane belongs to a column: Format::add_lines(sum, lines, factor) adds
// the column's numbers of Format::kDepth lines, each times its part of the factor.
// Format::floats(from, to) gives numbers the places of these sums. If registers are floats,
// add_lines_from is add_lines for a factor in memory: with AVX-512 one instruction broadcasts it
// and multiplies, and loads it again for every product.

#pragma once

#include "matrix.h"
#include "vector.h"

namespace moe_ext {

// The formats whose registers are floats.
template <typename Lanes, int registers>
struct Widened {
  static constexpr int kRegisters = registers, kDepth = 1;
  using Factor = float;

  static MOE_EXT_INLINE void add(Lanes& sums, const Lanes* a, const Lanes* b) {
    Lanes sum = sums;  // one that has no address stays in its register
    for (int p = 0; p < registers; ++p) {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
      // GCC rounds twice where a loop has one sum only: rows would depend on how many there are.
      asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a[p]), "vm"(b[p]));
#else
      sum += a[p] * b[p];
#endif
    }
    sums = sum;
  }
  static MOE_EXT_INLINE void add_lines(Lanes& sum, const Lanes& lines, Factor factor) {
    const Lanes all = factor - Lanes{};  // 0 + it would be computed, for -0
    Widened<Lanes, 1>::add(sum, &lines, &all);
  }
  static MOE_EXT_INLINE void add_lines_from(Lanes& sum, const Lanes& lines, const Factor& factor) {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
    if constexpr (sizeof(Lanes) == 64) {
      Lanes changed = sum;
      asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(changed) : "v"(lines), "m"(factor));
      sum = changed;
      return;
    }
#endif
    add_lines(sum, lines, factor);
  }
};

template <typename Lanes>
MOE_EXT_INLINE void add_product(Lanes& sums, const Lanes& a, const Lanes& b) {
  Widened<Lanes, 1>::add(sums, &a, &b);
}

// A register holds as many numbers as floats.
template <typename number_t, int bytes>
struct DirectFormat : Widened<Vector<float, bytes>, 1> {
  using scalar_t = number_t;
  using Lanes = Vector<float, bytes>;
  static constexpr int kElements = bytes / 4;

  static MOE_EXT_INLINE void widen(const scalar_t* from, Lanes* to) { load_as(to[0], from); }
  static MOE_EXT_INLINE void floats(const scalar_t* from, Lanes* to) { widen(from, to); }
  static MOE_EXT_INLINE void narrow(const Lanes* from, scalar_t* to) { store_as(from[0], to); }
};

template <int bytes>
struct BFloat16Format : Widened<Vector<float, bytes>, 2> {
  using scalar_t = torch::headeronly::BFloat16;
  using Lanes = Vector<float, bytes>;
  using Bits = Vector<uint32_t, bytes>;
  static constexpr int kElements = bytes / 2;

  static MOE_EXT_INLINE void widen(const scalar_t* from, Lanes* to) {
    Bits pairs, even, odd;
    std::memcpy(&pairs, from, bytes);
    even = pairs << 16;
    odd = pairs & 0xffff0000u;
    std::memcpy(&to[0], &even, bytes);
    std::memcpy(&to[1], &odd, bytes);
  }
  static MOE_EXT_INLINE void floats(const scalar_t* from, Lanes* to) { widen(from, to); }
  static MOE_EXT_INLINE void narrow(const Lanes* from, scalar_t* to) {
    Bits even, odd;
    round_to_upper_half(from[0], even);
    round_to_upper_half(from[1], odd);
    const Bits pairs = (even >> 16) | (odd & 0xffff0000u);
    std::memcpy(static_cast<void*>(to), &pairs, bytes);
  }
};

#if defined(MOE_EXT_ASSEMBLES_VECTORS)
// bfloat16 as it lies: a lane of a register holds a pair of them (AVX512-BF16). Subnormal numbers
// count as zero.
struct BFloat16Pairs {
  using scalar_t = torch::headeronly::BFloat16;
  using Lanes = Vector<float, 64>;
  static constexpr int kElements = 32, kRegisters = 1;

  static MOE_EXT_INLINE void widen(const scalar_t* from, Lanes* to) { load(to[0], from); }
  static MOE_EXT_INLINE void add(Lanes& sums, const Lanes* a, const Lanes* b) {
    add_pairs(sums, a[0], b[0]);
  }
};

// Two lines of bfloat16, for add_lines alone: a lane holds a column's pair of numbers. One register
// has the first 16 columns, the other the rest.
struct BFloat16LinePairs {
  using scalar_t = torch::headeronly::BFloat16;
  using Lanes = Vector<float, 64>;
  using Numbers = Vector<uint16_t, 64>;
  using Pairs = Vector<uint32_t, 64>;
  using Factor = uint32_t;  // a pair
  static constexpr int kElements = 32, kRegisters = 2, kDepth = 2;

  static MOE_EXT_INLINE void widen(const scalar_t* first, const scalar_t* second, Lanes* to) {
    Numbers a, b;
    load(a, first);
    load(b, second);
    zip<0>(to[0], a, b, places<Numbers>{});
    zip<kElements / 2>(to[1], a, b, places<Numbers>{});
  }
  static MOE_EXT_INLINE void add_lines(Lanes& sum, const Lanes& lines, Factor factor) {
    add_pairs(sum, lines, Lanes(factor - Pairs{}));
  }
  static MOE_EXT_INLINE void floats(const scalar_t* from, Lanes* to) {
    load_as(to[0], from);
    load_as(to[1], from + kElements / 2);
  }
  static MOE_EXT_INLINE void narrow(const Lanes* from, scalar_t* to) {
    Numbers numbers;
    narrow_to_pairs(from[0], from[1], numbers);
    store(numbers, static_cast<void*>(to));
  }

 private:
  template <int first, int... i>
  static MOE_EXT_INLINE void zip(Lanes& to, const Numbers& a, const Numbers& b,
                                 std::integer_sequence<int, i...>) {
    Numbers pairs;
    pick<(first + i / 2 + i % 2 * kElements)...>(pairs, a, b);
    to = Lanes(pairs);
  }
};
#endif

// Whether products of bfloat16 are made in pairs, by AVX512-BF16.
inline bool multiplies_pairs() {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
  __builtin_cpu_init();
  return register_bytes() == 64 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Whether there are loops for a dtype on this CPU.
inline bool has_lanes(ScalarType dtype) {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
  if (dtype == ScalarType::Half) return register_bytes() >= 32;
#endif
  return (dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && register_bytes() >= 32;
}

// Calls body(Format{}) with the format of a dtype that has_lanes.
template <int bytes, typename Body>
MOE_EXT_INLINE void visit_format(ScalarType dtype, const Body& body) {
  if constexpr (bytes > 16) {
    switch (dtype) {
      case ScalarType::Float: return body(DirectFormat<float, bytes>{});
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
      case ScalarType::Half: return body(DirectFormat<torch::headeronly::Half, bytes>{});
#endif
      default: return body(BFloat16Format<bytes>{});
    }
  }
}

// Calls body(BFloat16LinePairs{}) where the CPU multiplies pairs of bfloat16, else body as
// visit_format does.
template <int bytes, typename Body>
MOE_EXT_INLINE void visit_lines_format(ScalarType dtype, const Body& body) {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
  if constexpr (bytes == 64) {
    if (dtype == ScalarType::BFloat16 && multiplies_pairs()) return body(BFloat16LinePairs{});
  }
#endif
  visit_format<bytes>(dtype, body);
}

// Vector v of row `row`; a copy, filled up with zeros, where the row ends within it.
template <int bytes, int size, typename scalar_t>
MOE_EXT_INLINE const scalar_t* vector_of(const Matrix& matrix, int64_t row, int64_t v,
                                         scalar_t (&copy)[size]) {
  const auto* from = reinterpret_cast<const scalar_t*>(matrix.data) + row * matrix.row_stride;
  const int64_t begin = v * size, rest = matrix.columns - begin;
  if (rest >= size) return from + begin;
  copy_first<bytes>(from + begin, rest, copy);
  return copy;
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
  Vector<char, sizeof(copy)> numbers;
  load(numbers, static_cast<const void*>(copy));
  store_first<sizeof(typename Format::Lanes)>(numbers, to, rest * sizeof(scalar_t));
}

// Vector v of Format::kDepth lines from `line` on; one that the matrix lacks is zero.
template <typename Format>
MOE_EXT_INLINE void widen_lines(const Matrix& matrix, int64_t line, int64_t v,
                                typename Format::Lanes* to) {
  using scalar_t = typename Format::scalar_t;
  constexpr int bytes = sizeof(typename Format::Lanes);
  scalar_t copy[Format::kElements];
  const scalar_t* first = vector_of<bytes>(matrix, line, v, copy);
  if constexpr (Format::kDepth == 1) {
    Format::widen(first, to);
  } else {
    static const scalar_t zeros[Format::kElements]{};
    scalar_t other[Format::kElements];
    const bool has_second = line + 1 < matrix.rows;
    Format::widen(first, has_second ? vector_of<bytes>(matrix, line + 1, v, other) : zeros, to);
  }
}

// From the first of so many factors to the first of the next ones: an odd number of 64 bytes, lest
// they push each other out of the first cache.
inline int64_t factors_apart(int64_t count) { return parts(count, 32) * 32 + 16; }

// A row's numbers as factors, for Format::kDepth lines each.
template <typename Format>
MOE_EXT_INLINE void factors_of_row(const Matrix& matrix, int64_t row,
                                   typename Format::Factor* factors) {
  const auto* from = row_of<const typename Format::scalar_t>(matrix, row);
  if constexpr (Format::kDepth == 1) {
    convert<sizeof(typename Format::Lanes)>(from, matrix.columns, factors);
  } else if (matrix.columns > 0) {
    factors[(matrix.columns - 1) / Format::kDepth] = 0;
    std::memcpy(factors, from, matrix.columns * sizeof(*from));
  }
}

// The numbers of Format::kDepth rows from `row` on as factors, one for each column.
template <typename Format>
MOE_EXT_INLINE void factors_of_columns(const Matrix& matrix, int64_t row,
                                       typename Format::Factor* factors) {
  if constexpr (Format::kDepth == 1) {
    factors_of_row<Format>(matrix, row, factors);
  } else {
    for (int64_t v = 0; v * Format::kElements < matrix.columns; ++v) {
      typename Format::Lanes pairs[Format::kRegisters];
      widen_lines<Format>(matrix, row, v, pairs);
      std::memcpy(factors + v * Format::kElements, pairs, sizeof(pairs));
    }
  }
}

}  // namespace moe_ext
