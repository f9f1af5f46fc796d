// Vectors of 16 bytes, the way to global memory, conversions, and what the lanes of a warp do
// together.

#pragma once

#include <type_traits>

#include "launch.cuh"
#include "launchers.h"

namespace moe_ext::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;

// Sums, weights and probabilities of a T are kept in this type.
template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The elements that a thread moves at a time: 16 bytes, or one element where rows do not keep
// 16-byte vectors aligned.
template <typename T, int kSize>
struct alignas(kSize * sizeof(T)) Pack {
  static constexpr int size = kSize;
  T at[kSize];
};

template <typename T>
constexpr int kFullPack = 16 / sizeof(T);

inline bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Every access to global memory goes through these two.
template <typename T>
__device__ T load(const T* address) {
  count_load(address, sizeof(T));
  if constexpr (sizeof(T) == sizeof(uint4)) {
    const uint4 bits = *reinterpret_cast<const uint4*>(address);
    return *reinterpret_cast<const T*>(&bits);
  } else {
    return *address;
  }
}

template <typename T>
__device__ void store(T* address, T value) {
  count_store(address, sizeof(T));
  if constexpr (sizeof(T) == sizeof(uint4)) {
    *reinterpret_cast<uint4*>(address) = *reinterpret_cast<const uint4*>(&value);
  } else {
    *address = value;
  }
}

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
// By its bits: __bfloat162float takes a third more registers where packs of them are widened.
__device__ inline float widen(__nv_bfloat16 x) {
  return __uint_as_float(static_cast<unsigned>(__bfloat16_as_ushort(x)) << 16);
}

template <typename T>
__device__ T narrow(accumulate_t<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

template <typename To, typename From>
__device__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

// Two 16-bit numbers come out of the word that holds them by an instruction each.
template <typename T>
__device__ float2 widen_pair(unsigned word) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(bits_as<__half2>(word));
  } else {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  }
}

template <typename T>
__device__ unsigned narrow_pair(float x, float y) {
  if constexpr (std::is_same_v<T, __half>) {
    return bits_as<unsigned>(__floats2half2_rn(x, y));
  } else {
    return bits_as<unsigned>(__floats2bfloat162_rn(x, y));
  }
}

template <typename T, int kSize>
constexpr bool kInPairs = sizeof(T) == 2 && kSize % 2 == 0;

// The numbers of a pack, as sums and products take them.
template <typename T, int kSize>
__device__ Pack<accumulate_t<T>, kSize> widened(const Pack<T, kSize>& pack) {
  Pack<accumulate_t<T>, kSize> out;
  if constexpr (kInPairs<T, kSize>) {
    const auto words = bits_as<Pack<unsigned, kSize / 2>>(pack);
#pragma unroll
    for (int j = 0; j < kSize; j += 2) {
      const float2 pair = widen_pair<T>(words.at[j / 2]);
      out.at[j] = pair.x, out.at[j + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kSize; ++j) out.at[j] = widen(pack.at[j]);
  }
  return out;
}

// And back, rounded.
template <typename T, int kSize>
__device__ Pack<T, kSize> narrowed(const Pack<accumulate_t<T>, kSize>& wide) {
  if constexpr (kInPairs<T, kSize>) {
    Pack<unsigned, kSize / 2> words;
#pragma unroll
    for (int j = 0; j < kSize; j += 2) {
      words.at[j / 2] = narrow_pair<T>(wide.at[j], wide.at[j + 1]);
    }
    return bits_as<Pack<T, kSize>>(words);
  } else {
    Pack<T, kSize> out;
#pragma unroll
    for (int j = 0; j < kSize; ++j) out.at[j] = narrow<T>(wide.at[j]);
    return out;
  }
}

template <typename T, int kSize>
__device__ Pack<T, kSize> scaled(const Pack<accumulate_t<T>, kSize>& wide, accumulate_t<T> weight) {
  Pack<accumulate_t<T>, kSize> out;
#pragma unroll
  for (int j = 0; j < kSize; ++j) out.at[j] = weight * wide.at[j];
  return narrowed<T>(out);
}

// Unsigned integers in the order of numbers, -0 as 0. That of a NaN means nothing; 0 is no
// number's.
__device__ inline unsigned ordered_bits(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);  // -0 + 0 = 0
  return bits ^ (static_cast<unsigned>(static_cast<int>(bits) >> 31) | 1u << 31);
}
__device__ inline unsigned long long ordered_bits(double x) {
  const auto bits = static_cast<unsigned long long>(__double_as_longlong(x + 0.0));
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}

// Over groups of kLanes neighbouring lanes, the same in each of them.
template <int kLanes, typename T, typename Op>
__device__ T lanes_reduce(T x, const Op& op) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    x = op(x, __shfl_xor_sync(kAllLanes, x, lanes));
  }
  return x;
}

template <int kLanes, typename T>
__device__ T lanes_sum(T x) {
  return lanes_reduce<kLanes>(x, [](T a, T b) { return a + b; });
}

// The sum over this lane and those below it in the warp.
__device__ inline int running_sum(int x) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int below = __shfl_up_sync(kAllLanes, x, distance);
    if (lane >= distance) x += below;
  }
  return x;
}

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls body with a value that is one of kValues, as a std::integral_constant.
template <auto... kValues, typename Value, typename Body>
void visit_constant(Value value, const Body& body) {
  ((value == kValues ? body(std::integral_constant<Value, kValues>{}) : void()), ...);
}

// Calls body(T{}) with the C++ type of a dtype.
template <typename Body>
void visit_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat32: return body(float{});
    case Dtype::kFloat64: return body(double{});
    case Dtype::kBFloat16: return body(__nv_bfloat16{});
    case Dtype::kFloat16: return body(__half{});
  }
}

}  // namespace moe_ext::cuda
