// exp for loops that the compiler turns into vector code.
//
// The libraries are built for every CPU of an architecture. A loop under MOE_EXT_VECTOR is compiled
// for the wider registers of newer ones too, and the loader picks: it must be a plain function.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && \
    (!defined(__clang__) || __clang_major__ >= 14)
#define MOE_EXT_VECTOR __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define MOE_EXT_VECTOR
#endif

namespace moe_ext {

// e^x to two roundings. Below e^-87.3 it stays there, above e^88.37 it is infinite; NaN for NaN.
inline float vector_exp(float x) {
  constexpr float kLowest = -87.3f, kHighest = 89.0f;
  x = x < kLowest ? kLowest : x;
  x = x > kHighest ? kHighest : x;
  // x = n * ln 2 + r with |r| <= ln(2) / 2. Adding 3 * 2^22 rounds to an integer; the second part
  // of ln 2 is what the first one lacks.
  constexpr float kRound = 12582912.0f;
  constexpr float kLog2E = 1.44269504f, kLn2 = 0.693359375f, kLn2Rest = -2.12194440e-4f;
  const float shifted = x * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2) - n * kLn2Rest;
  float sum = 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 1.0f / 2;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const int32_t exponent = static_cast<int32_t>((static_cast<uint32_t>(bits) + 127u) << 23);
  float power;
  std::memcpy(&power, &exponent, sizeof(power));
  return sum * power;
}

}  // namespace moe_ext
