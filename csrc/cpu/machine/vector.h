// Vector code on CPUs that are not all alike.
//
// The libraries are built for every CPU of an architecture. on_widest(kernel, args...) calls
// kernel.run<bytes>(args...), or the lambda kernel(bytes), compiled for the widest registers this
// CPU has, of so many bytes. Both, and what is hot in them, are always inlined: only then are they
// compiled for each. Most are plain loops, which the compiler turns into vector code; Vector is for
// those it does not.

#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu_features.h"

#if !defined(__GNUC__)
#error "moe_ext's CPU operators need GCC or clang"
#endif
#define MOE_EXT_INLINE inline __attribute__((always_inline))

// GCC alone takes vectors of any width as operands of assembly; the intrinsics need functions whose
// callers are all for such CPUs.
#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 10
#define MOE_EXT_ASSEMBLES_VECTORS
#endif

namespace moe_ext {

template <int bytes, typename Kernel, typename... Args>
MOE_EXT_INLINE void call_kernel(const Kernel& kernel, Args&... args) {
  if constexpr (std::is_invocable_v<const Kernel&, std::integral_constant<int, bytes>>) {
    kernel(std::integral_constant<int, bytes>{});
  } else {
    kernel.template run<bytes>(args...);
  }
}

#if defined(__x86_64__)
template <typename Kernel, typename... Args>
__attribute__((noinline, target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void on_64_bytes(
    const Kernel& kernel, Args&... args) {
  call_kernel<64>(kernel, args...);
}

template <typename Kernel, typename... Args>
__attribute__((noinline, target("avx2,fma"))) void on_32_bytes(const Kernel& kernel,
                                                               Args&... args) {
  call_kernel<32>(kernel, args...);
}
#endif

// The kernel as a function of its own: GCC allocates registers badly in very large ones.
template <int bytes, typename Kernel, typename... Args>
void on_registers(const Kernel& kernel, Args&... args) {
#if defined(__x86_64__)
  if constexpr (bytes == 64) return on_64_bytes(kernel, args...);
  if constexpr (bytes == 32) return on_32_bytes(kernel, args...);
#endif
  if constexpr (bytes == 16) call_kernel<16>(kernel, args...);
}

template <typename Kernel, typename... Args>
void on_widest(const Kernel& kernel, Args&&... args) {
  const int bytes = register_bytes();
  if (bytes == 64) return on_registers<64>(kernel, args...);
  if (bytes == 32) return on_registers<32>(kernel, args...);
  on_registers<16>(kernel, args...);
}

// Calls body(count as a constant), for 1 <= count <= most.
template <int64_t most, typename Body>
MOE_EXT_INLINE void with_count(int64_t count, const Body& body) {
  if constexpr (most > 1) {
    if (count < most) return with_count<most - 1>(count, body);
  }
  body(std::integral_constant<int64_t, most>{});
}

// Asks for `size` numbers ahead of their use; where they lie need not be memory of ours.
template <typename T>
MOE_EXT_INLINE void prefetch(const T* numbers, int64_t size) {
  constexpr uintptr_t kLine = 64;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(numbers), end = begin + size * sizeof(T);
  for (uintptr_t line = begin & -kLine; line < end; line += kLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(line));
  }
}

// One register of T. Passed by reference: by value it would need the CPU's own calling convention.
template <typename T, int bytes>
using Vector __attribute__((vector_size(bytes))) = T;

template <typename V, typename T>
MOE_EXT_INLINE void load(V& v, const T* from) {
  std::memcpy(&v, from, sizeof(V));
}

template <typename V, typename T>
MOE_EXT_INLINE void store(const V& v, T* to) {
  std::memcpy(to, &v, sizeof(V));
}

// Loads the first `size` bytes of a register, fewer than it has, and fills it up with zeros.
// bytes: of the CPU's registers. With 64 a mask does it: a register cannot be loaded soon after its
// memory was written in pieces.
template <int bytes, typename V>
MOE_EXT_INLINE void load_first(V& v, const void* from, int64_t size) {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
  if constexpr (bytes == 64) {
    const uint64_t mask = (uint64_t{1} << size) - 1;
    V first;
    asm("vmovdqu8 %1, %0%{%2%}%{z%}"
        : "=v"(first)
        : "m"(*static_cast<const char (*)[sizeof(V)]>(from)), "Yk"(mask));
    v = first;
    return;
  }
#endif
  v = V{};
  std::memcpy(&v, from, size);
}

// Stores the first `size` bytes.
template <int bytes, typename V>
MOE_EXT_INLINE void store_first(const V& v, void* to, int64_t size) {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
  if constexpr (bytes == 64) {
    const uint64_t mask = (uint64_t{1} << size) - 1;
    asm("vmovdqu8 %1, %0%{%2%}" : "+m"(*static_cast<char (*)[sizeof(V)]>(to)) : "v"(v), "Yk"(mask));
    return;
  }
#endif
  std::memcpy(to, &v, size);
}

// What V holds, a vector or one number.
template <typename V, bool = std::is_arithmetic_v<V>>
struct Element {
  using type = V;
};
template <typename V>
struct Element<V, false> {
  using type = std::decay_t<decltype(std::declval<V&>()[0])>;
};
template <typename V>
using element_t = typename Element<V>::type;

// Rounds floats to their upper halves, which are bfloat16: to nearest, ties to even; NaN to NaN.
template <typename Bits, typename V>
MOE_EXT_INLINE void round_to_upper_half(const V& v, Bits& bits) {
  std::memcpy(&bits, &v, sizeof(v));
  bits += 0x7fffu + ((bits >> 16) & 1u);
  bits = v == v ? bits : Bits{} + 0x7fc00000u;
}

#if defined(MOE_EXT_ASSEMBLES_VECTORS)
// Instructions of AVX512-BF16 (Pairs: pairs of bfloat16). Operands without an address stay in
// registers.

// Adds the products of both numbers of each pair to a sum.
template <typename Pairs>
MOE_EXT_INLINE void add_pairs(Vector<float, 64>& sums, const Pairs& a, const Pairs& b) {
  Vector<float, 64> sum = sums;
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  sums = sum;
}

// Rounds low's floats, then high's.
template <typename Pairs>
MOE_EXT_INLINE void narrow_to_pairs(const Vector<float, 64>& low, const Vector<float, 64>& high,
                                    Pairs& to) {
  Pairs rounded;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(rounded) : "v"(low), "v"(high));
  to = rounded;
}
#endif

template <typename Float>
constexpr bool is_bfloat16 = std::is_same_v<Float, torch::headeronly::BFloat16>;

#if defined(MOE_EXT_ASSEMBLES_VECTORS)
// Floats of 16-bit numbers.
template <typename scalar_t, typename V>
MOE_EXT_INLINE void widen(V& v, const Vector<uint16_t, sizeof(V) / 2>& halves) {
  V values;  // v has an address, and would be written to memory
  if constexpr (is_bfloat16<scalar_t>) {
    asm("vpmovzxwd %1, %0\n\tvpslld $16, %0, %0" : "=v"(values) : "v"(halves));
  } else {
    asm("vcvtph2ps %1, %0" : "=v"(values) : "v"(halves));
  }
  v = values;
}
#endif

// As many numbers as V holds, or one, from and to memory of their own type.
template <typename V, typename scalar_t>
MOE_EXT_INLINE void load_as(V& v, const scalar_t* from) {
  if constexpr (std::is_arithmetic_v<V>) {
    v = static_cast<V>(*from);
  } else if constexpr (std::is_same_v<scalar_t, element_t<V>>) {
    load(v, from);
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
  } else if constexpr (sizeof(V) >= 32) {
    Vector<uint16_t, sizeof(V) / 2> halves;
    load(halves, from);
    widen<scalar_t>(v, halves);
#endif
  } else {
    constexpr int kWidth = sizeof(V) / sizeof(element_t<V>);
    element_t<V> values[kWidth];
    for (int i = 0; i < kWidth; ++i) values[i] = static_cast<element_t<V>>(from[i]);
    load(v, values);
  }
}

template <typename V, typename scalar_t>
MOE_EXT_INLINE void store_as(const V& v, scalar_t* to) {
  if constexpr (std::is_arithmetic_v<V>) {
    *to = static_cast<scalar_t>(v);
  } else if constexpr (std::is_same_v<scalar_t, element_t<V>>) {
    store(v, to);
  } else if constexpr (is_bfloat16<scalar_t>) {
    Vector<uint32_t, sizeof(V)> bits;
    round_to_upper_half(v, bits);
    bits >>= 16;
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
    if constexpr (sizeof(V) == 64) {
      Vector<uint16_t, 32> halves;
      asm("vpmovdw %1, %0" : "=v"(halves) : "v"(bits));
      store(halves, static_cast<void*>(to));
      return;
    }
#endif
    const auto halves = __builtin_convertvector(bits, Vector<uint16_t, sizeof(V) / 2>);
    store(halves, static_cast<void*>(to));
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
  } else if constexpr (sizeof(V) >= 32) {
    Vector<uint16_t, sizeof(V) / 2> halves;
    asm("vcvtps2ph $0, %1, %0" : "=v"(halves) : "v"(v));
    store(halves, static_cast<void*>(to));
#endif
  } else {
    constexpr int kWidth = sizeof(V) / sizeof(element_t<V>);
    element_t<V> values[kWidth];
    store(v, values);
    for (int i = 0; i < kWidth; ++i) to[i] = static_cast<scalar_t>(values[i]);
  }
}

// Copies the first `count` numbers, fewer than `size`, and fills up with zeros.
template <int bytes, int size, typename scalar_t>
MOE_EXT_INLINE void copy_first(const scalar_t* from, int64_t count, scalar_t (&copy)[size]) {
  Vector<char, sizeof(copy)> numbers;
  load_first<bytes>(numbers, from, count * sizeof(scalar_t));
  store(numbers, static_cast<void*>(copy));
}

// Loads the first `count` numbers, fewer than V holds, as load_as does; the rest is zero.
template <typename V, typename scalar_t>
MOE_EXT_INLINE void load_first_as(V& v, const scalar_t* from, int64_t count) {
  scalar_t copy[sizeof(V) / sizeof(element_t<V>)];
  copy_first<sizeof(V)>(from, count, copy);
  load_as(v, copy);
}

// Calls body(v, i) for the numbers of a row of `size` from `begin` on. v has the type of a register
// that holds the numbers from i on, or of one number if the row is shorter. The last register ends
// with the row and repeats some numbers, so body must not write what it reads.
template <int bytes, typename T, typename Body>
MOE_EXT_INLINE void for_registers(int64_t begin, int64_t size, const Body& body) {
  constexpr int64_t kWidth = bytes / sizeof(T);
  int64_t i = begin;
  if (size < kWidth) {
    for (T v{}; i < size; ++i) body(v, i);
    return;
  }
  Vector<T, bytes> v{};
  for (; i + kWidth <= size; i += kWidth) body(v, i);
  if (i < size) body(v, size - kWidth);
}

// Converts numbers to another type; one of both is the type of the arithmetic. They do not overlap.
template <int bytes, typename From, typename To>
MOE_EXT_INLINE void convert(const From* from, int64_t size, To* to) {
  using T = std::conditional_t<std::is_arithmetic_v<From>, From, To>;
  for_registers<bytes, T>(0, size, [&](auto& values, int64_t i) __attribute__((always_inline)) {
    load_as(values, from + i);
    store_as(values, to + i);
  });
}

// The numbers of a and b, one after the other, at `i`.
template <int... i, typename V>
MOE_EXT_INLINE void pick(V& out, const V& a, const V& b) {
#if defined(__clang__)
  out = __builtin_shufflevector(a, b, i...);
#else
  constexpr int kSize = sizeof(a[0]);
  using Narrow = std::conditional_t<kSize == 2, int16_t, int32_t>;
  using Index = std::conditional_t<kSize == 8, int64_t, Narrow>;
  out = __builtin_shuffle(a, b, Vector<Index, sizeof(V)>{i...});
#endif
}

template <typename V>
using places = std::make_integer_sequence<int, sizeof(V) / sizeof(element_t<V>)>;

// In every four numbers: those at w, x, y, z of the four of a, from 0, and of b, from 4.
template <int w, int x, int y, int z, typename V, int... i>
MOE_EXT_INLINE void shuffle(V& out, const V& a, const V& b, std::integer_sequence<int, i...>) {
  constexpr int kFour[] = {w, x, y, z}, kSize = sizeof...(i);
  pick<(i / 4 * 4 + kFour[i % 4] % 4 + kFour[i % 4] / 4 * kSize)...>(out, a, b);
}
template <int w, int x, int y, int z, typename V>
MOE_EXT_INLINE void shuffle(V& out, const V& a, const V& b) {
  shuffle<w, x, y, z>(out, a, b, places<V>{});
}

// Turns every square of four numbers of four rows.
template <typename V>
MOE_EXT_INLINE void transpose(V (&rows)[4]) {
  V a, b, c, d;
  shuffle<0, 4, 1, 5>(a, rows[0], rows[1]);
  shuffle<2, 6, 3, 7>(b, rows[0], rows[1]);
  shuffle<0, 4, 1, 5>(c, rows[2], rows[3]);
  shuffle<2, 6, 3, 7>(d, rows[2], rows[3]);
  shuffle<0, 1, 4, 5>(rows[0], a, c);
  shuffle<2, 3, 6, 7>(rows[1], a, c);
  shuffle<0, 1, 4, 5>(rows[2], b, d);
  shuffle<2, 3, 6, 7>(rows[3], b, d);
}

// x -> e^x for a float or a vector of them, to two roundings; 0 below e^-87.7, infinite above
// e^88.37, NaN for NaN.
template <typename F, std::enable_if_t<std::is_same_v<element_t<F>, float>, bool> = true>
MOE_EXT_INLINE void exponential(F& x) {
  // The power below is zero at the lowest, infinite at the highest.
  const F lowest = F{} - 88.1f, highest = F{} + 89.0f;
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  // x = n * ln 2 + r with |r| <= ln(2) / 2. Adding 3 * 2^22 rounds to an integer; the second part
  // of ln 2 is what the first one lacks.
  constexpr float kRound = 12582912.0f;
  constexpr float kLog2E = 1.44269504f, kLn2 = 0.693359375f, kLn2Rest = -2.12194440e-4f;
  const F shifted = x * kLog2E + kRound;
  const F n = shifted - kRound;
  const F r = (x - n * kLn2) - n * kLn2Rest;
  F sum = F{} + 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 1.0f / 2;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  std::conditional_t<sizeof(F) == sizeof(float), uint32_t, Vector<uint32_t, sizeof(F)>> bits;
  std::memcpy(&bits, &shifted, sizeof(F));
  bits = (bits + 127u) << 23;
  F power;
  std::memcpy(&power, &bits, sizeof(F));
  x = sum * power;
}

template <typename F, std::enable_if_t<std::is_same_v<element_t<F>, double>, bool> = true>
MOE_EXT_INLINE void exponential(F& x) {
  if constexpr (std::is_arithmetic_v<F>) {
    x = std::exp(x);
  } else {
    double values[sizeof(F) / sizeof(double)];
    store(x, values);
    for (double& value : values) value = std::exp(value);
    load(x, values);
  }
}

}  // namespace moe_ext
