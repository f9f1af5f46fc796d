// Numbers of memory as registers of floats, for products of few rows.
//
// Format::kElements numbers fill Format::kRegisters registers; Format::add(sums, a, b) adds the
// products of two of these to a sum per lane; Format::round(from, n, to) rounds a row of floats.
// bfloat16 is the upper half of a float: its even and
// its odd elements are two registers, or the CPU adds up their products itself.

#pragma once

#include "matrix.h"
#include "vector.h"

namespace moe_ext {

// GCC alone takes vectors of any width as operands of assembly; the intrinsics need functions whose
// callers are all for such CPUs.
#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 10
#define MOE_EXT_ASSEMBLES_VECTORS
#endif

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

template <int bytes>
struct FloatFormat : Widened<Vector<float, bytes>, 1> {
  using scalar_t = float;
  using Lanes = Vector<float, bytes>;
  static constexpr int kElements = bytes / 4;

  static MOE_EXT_INLINE void widen(const scalar_t* from, Lanes* to) { load(to[0], from); }
  static MOE_EXT_INLINE void narrow(const Lanes* from, scalar_t* to) { store(from[0], to); }
  static MOE_EXT_INLINE void round(const float* from, int64_t n, scalar_t* to) {
    std::memcpy(to, from, n * sizeof(float));
  }
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
    std::memcpy(&even, &from[0], bytes);
    std::memcpy(&odd, &from[1], bytes);
    round_bits(even);
    round_bits(odd);
    const Bits pairs = (even >> 16) | (odd & 0xffff0000u);
    std::memcpy(static_cast<void*>(to), &pairs, bytes);
  }

  static MOE_EXT_INLINE void round(const float* from, int64_t n, scalar_t* to) {
    for (int64_t i = 0; i < n; ++i) {
      uint32_t bits;
      std::memcpy(&bits, from + i, sizeof(bits));
      round_bits(bits);
      to[i].x = static_cast<uint16_t>(bits >> 16);
    }
  }

 private:
  // To nearest, ties to even; the lower half is to be cut off. A NaN stays one.
  template <typename B>
  static MOE_EXT_INLINE void round_bits(B& bits) {
    const B rounded = bits + (0x7fffu + ((bits >> 16) & 1u));
    const B quiet = bits | 0x00400000u;
    bits = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
  }
};

#if defined(MOE_EXT_ASSEMBLES_VECTORS)
// Every CPU with AVX2 has these instructions, F16C.
template <int bytes>
struct HalfFormat : Widened<Vector<float, bytes>, 1> {
  using scalar_t = torch::headeronly::Half;
  using Lanes = Vector<float, bytes>;
  static constexpr int kElements = bytes / 4;

  static MOE_EXT_INLINE void widen(const scalar_t* from, Lanes* to) {
    Vector<uint16_t, bytes / 2> halves;
    std::memcpy(&halves, from, bytes / 2);
    asm("vcvtph2ps %1, %0" : "=v"(to[0]) : "v"(halves));
  }
  static MOE_EXT_INLINE void narrow(const Lanes* from, scalar_t* to) {
    Vector<uint16_t, bytes / 2> halves;
    asm("vcvtps2ph $0, %1, %0" : "=v"(halves) : "v"(from[0]));
    std::memcpy(static_cast<void*>(to), &halves, bytes / 2);
  }
  static MOE_EXT_INLINE void round(const float* from, int64_t n, scalar_t* to) {
    int64_t i = 0;
    for (; i + kElements <= n; i += kElements) {
      Lanes lanes;
      load(lanes, from + i);
      narrow(&lanes, to + i);
    }
    for (; i < n; ++i) to[i] = static_cast<scalar_t>(from[i]);
  }
};

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
  static MOE_EXT_INLINE void round(const float* from, int64_t n, scalar_t* to) {
    BFloat16Format<64>::round(from, n, to);
  }
};
#endif

#if defined(__x86_64__)
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
      case ScalarType::Float: return body(FloatFormat<bytes>{});
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
      case ScalarType::Half: return body(HalfFormat<bytes>{});
#endif
      default: return body(BFloat16Format<bytes>{});
    }
  }
}

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
#endif

}  // namespace moe_ext
