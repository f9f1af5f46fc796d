// Numbers of memory as registers of floats, for products of few rows.
//
// Format::kElements numbers fill Format::kRegisters registers. bfloat16 is the upper half of a
// float: its even and its odd elements are two registers.

#pragma once

#include "common.h"
#include "vector.h"

namespace moe_ext {

template <int bytes>
struct FloatFormat {
  using scalar_t = float;
  using Lanes = Vector<float, bytes>;
  static constexpr int kElements = bytes / 4, kRegisters = 1;

  static MOE_EXT_INLINE void widen(const scalar_t* from, Lanes* to) { load(to[0], from); }
  static MOE_EXT_INLINE void narrow(const Lanes* from, scalar_t* to) { store(from[0], to); }
};

template <int bytes>
struct BFloat16Format {
  using scalar_t = torch::headeronly::BFloat16;
  using Lanes = Vector<float, bytes>;
  using Bits = Vector<uint32_t, bytes>;
  static constexpr int kElements = bytes / 2, kRegisters = 2;

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
    round(from[0], even);
    round(from[1], odd);
    const Bits pairs = (even >> 16) | (odd & 0xffff0000u);
    std::memcpy(static_cast<void*>(to), &pairs, bytes);
  }

 private:
  // To nearest, ties to even; the lower half is to be cut off. A NaN stays one.
  static MOE_EXT_INLINE void round(const Lanes& lanes, Bits& bits) {
    std::memcpy(&bits, &lanes, bytes);
    const Bits rounded = bits + (0x7fffu + ((bits >> 16) & 1u));
    const Bits quiet = bits | 0x00400000u;
    bits = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
  }
};

// GCC alone takes vectors of any width as operands of assembly; the intrinsics need functions whose
// callers are all for such CPUs. Every CPU with AVX2 has these instructions, F16C.
#if defined(__x86_64__) && !defined(__clang__)
#define MOE_EXT_HALF_LANES
template <int bytes>
struct HalfFormat {
  using scalar_t = torch::headeronly::Half;
  using Lanes = Vector<float, bytes>;
  static constexpr int kElements = bytes / 4, kRegisters = 1;

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
};
#endif

}  // namespace moe_ext
