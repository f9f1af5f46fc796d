// Numbers of memory as registers of floats, for products of few rows.
//
// Format::kElements numbers fill Format::kRegisters registers; Format::add(sums, a, b) adds the
// products of two of these to a sum per lane. bfloat16 is the upper half of a float: its even and
// its odd elements are two registers, or the CPU adds up their products itself.

#pragma once

#include "matrix.h"
#include "vector.h"

namespace moe_ext {

// The formats whose registers are floats.
template <typename Lanes, int registers>
struct Widened {
  static constexpr int kRegisters = registers;

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
    Lanes sum = sums;  // one that has no address stays in its register
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a[0]), "v"(b[0]));
    sums = sum;
  }
};
#endif

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

// Copies the first `count` numbers, fewer than `size`, and fills up with zeros.
template <int bytes, int size, typename scalar_t>
MOE_EXT_INLINE void copy_first(const scalar_t* from, int64_t count, scalar_t (&copy)[size]) {
  Vector<char, sizeof(copy)> numbers;
  load_first<bytes>(numbers, from, count * sizeof(scalar_t));
  store(numbers, static_cast<void*>(copy));
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

// A matrix as floats.
template <typename Format>
MOE_EXT_INLINE void to_floats(const Matrix& matrix, float* to) {
  for (int64_t row = 0; row < matrix.rows; ++row) {
    const auto* from =
        reinterpret_cast<const typename Format::scalar_t*>(matrix.data) + row * matrix.row_stride;
    convert<sizeof(typename Format::Lanes)>(from, matrix.columns, to + row * matrix.columns);
  }
}

}  // namespace moe_ext
