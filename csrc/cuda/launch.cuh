// The launch, shared memory, and a count of accesses: needs of the kernels beyond CUDA C++ itself.
// Here alone it matters whether nvcc compiles the kernels for a GPU, or a C++ compiler for
// tests/cusim, which runs them on the CPU.

#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#else

#include "cusim.h"
#include "tensor.h"

#endif

// A kernel for blocks of at most so many threads, at least so many of them on a multiprocessor:
// KERNEL(threads) or KERNEL(threads, blocks).
#define KERNEL(...) __global__ __launch_bounds__(__VA_ARGS__)

// A kernel's const parameter, which is read where it is: an index that is not constant would have
// it copied.
#ifdef __CUDACC__
#define GRID_CONSTANT __grid_constant__
#else
#define GRID_CONSTANT
#endif

namespace moe_ext::cuda {

// Arrays of shared memory start at multiples of 16 bytes.
template <typename T>
__host__ __device__ constexpr std::size_t shared_bytes(int64_t count) {
  return (static_cast<std::size_t>(count) * sizeof(T) + 15) / 16 * 16;
}

#ifdef __CUDACC__

using Stream = cudaStream_t;

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            std::size_t shared, Stream stream, Arguments... arguments) {
  if (blocks == 0) return;
  constexpr std::size_t kUnasked = 48 << 10;  // what every kernel may have
  cudaError_t error = blocks <= INT32_MAX ? cudaSuccess : cudaErrorInvalidConfiguration;
  if (error == cudaSuccess && shared > kUnasked) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared));
  }
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(arguments...);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) return;
  // CUDA may report here what went wrong in a kernel before this one.
  throw std::runtime_error(std::string(name) + ": the CUDA launch of " + std::to_string(blocks) +
                           " blocks, or work before it, failed: " + cudaGetErrorString(error));
}

// The current device has so many multiprocessors, and each so many bytes of shared memory.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  if (error == cudaSuccess) return value;
  throw std::runtime_error(std::string("moe_ext: ") + cudaGetErrorString(error));
}
inline int num_multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline std::size_t shared_per_multiprocessor() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
}

// Throws where the kernel is of PTX for a card before 8.0, which has no such instructions.
template <typename Kernel>
void require_tensor_cores(const char* name, Kernel* kernel) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess && attributes.ptxVersion >= 80) return;
  throw std::runtime_error(std::string(name) + ": " +
                           (error == cudaSuccess ? "moe_ext was built for compute capability below "
                                                   "8.0; name this card's in TORCH_CUDA_ARCH_LIST"
                                                 : cudaGetErrorString(error)));
}

// Hands out a block's shared memory. Every thread takes the same arrays in the same order; the
// launch gives the sum of their shared_bytes.
class SharedMemory {
 public:
  template <typename T>
  __device__ T* take(int64_t count) {
    extern __shared__ uint4 memory[];
    T* array = reinterpret_cast<T*>(reinterpret_cast<char*>(memory) + taken_);
    taken_ += shared_bytes<T>(count);
    return array;
  }

 private:
  std::size_t taken_ = 0;
};

// The special function unit's, with a relative error of 2^-22 at most. Numbers too small to be
// normal count as 0, as arguments and as results.
__device__ inline float approximate_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float approximate_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline void count_load(const void*, std::size_t) {}
__device__ inline void count_store(const void*, std::size_t) {}

#else

using Stream = CUstream_st*;

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            std::size_t shared, Stream, Arguments... arguments) {
  if (blocks == 0) return;
  const cusim::Shape shape{static_cast<std::size_t>(blocks), static_cast<std::size_t>(threads),
                           shared};
  cusim::launch(name, kernel, shape, arguments...);
}

class SharedMemory {
 public:
  template <typename T>
  T* take(int64_t count) {
    return static_cast<T*>(cusim::take_shared(static_cast<std::size_t>(count) * sizeof(T)));
  }
};

inline int num_multiprocessors() { return cusim::options().card.multiprocessors; }
inline std::size_t shared_per_multiprocessor() {
  return cusim::options().card.shared_per_multiprocessor;
}

template <typename Kernel>
void require_tensor_cores(const char*, Kernel*) {}

inline float approximate_exp2(float x) { return cusim::approximate(std::exp2(x)); }
inline float approximate_reciprocal(float x) { return cusim::approximate(1 / x); }

using cusim::count_load;
using cusim::count_store;

#endif

}  // namespace moe_ext::cuda
