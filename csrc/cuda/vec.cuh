// Vectors of 16 bytes, the way to global memory, conversions, and sums over a warp.

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

// What a thread moves at a time: 16 bytes, or one element where rows do not keep 16-byte vectors
// aligned.
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
  count_load(sizeof(T));
  if constexpr (sizeof(T) == sizeof(uint4)) {
    const uint4 bits = *reinterpret_cast<const uint4*>(address);
    return *reinterpret_cast<const T*>(&bits);
  } else {
    return *address;
  }
}

template <typename T>
__device__ void store(T* address, T value) {
  count_store(sizeof(T));
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

// The sum over groups of kLanes neighbouring lanes, the same in each of them.
template <int kLanes, typename T>
__device__ T lanes_sum(T x) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
