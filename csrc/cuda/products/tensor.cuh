// The instructions of tensor cores: asynchronous copies to shared memory, matrices of 8 x 8 words
// to the registers of a warp, and products of those. Compute capability 8.0 and up.
//
// A fragment is 16 rows of an operand, 32 bytes deep, over a warp. Word i of lane l holds the
// numbers at depth 4 * (l % 4) bytes of row l / 4, by quarters:
//
//                bytes 0-15   bytes 16-31
//   rows 0-7      word 0        word 2
//   rows 8-15     word 1        word 3
//
// On the right side of a product words 1 and 2 change places.
//
// A sum is 16 x 8 floats over a warp: lane l has those of row l / 4 and, as its third and fourth,
// of row l / 4 + 8, at columns 2 * (l % 4) and the next.

#pragma once

#include "../vec.cuh"

namespace moe_ext::cuda {

using Fragment = unsigned[4];
using Sum16x8 = float[4];

#ifdef __CUDACC__

// Below 8.0 nobody launches the kernels that use them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define MOE_EXT_TENSOR(...) __trap()
#else
#define MOE_EXT_TENSOR(...) asm volatile(__VA_ARGS__)
#endif

__device__ inline unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}

// Copies 16 bytes, or writes as many zeros and does not read. It is done when the group that it is
// committed to has been waited for, for this thread; for others behind a barrier.
__device__ inline void copy_async(uint4* to, const void* from, bool reads) {
  MOE_EXT_TENSOR("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(reads ? 16 : 0) : "memory");
}
__device__ inline void commit_copies() { MOE_EXT_TENSOR("cp.async.commit_group;" :: : "memory"); }
// For all groups of this thread but the last kLeft.
template <int kLeft>
__device__ void wait_for_copies() {
  MOE_EXT_TENSOR("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four matrices of 8 lines of 16 bytes: lane l gives the address of line l % 8 of matrix l / 8.
__device__ inline void load_matrices(Fragment& out, const uint4* line) {
  MOE_EXT_TENSOR("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(out[0]),
                 "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(line)) : "memory");
}
// Each of them transposed, as a matrix of 16-bit numbers.
__device__ inline void load_matrices_transposed(Fragment& out, const uint4* line) {
  MOE_EXT_TENSOR(
      "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(out[0]),
      "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(shared_address(line)) : "memory");
}

#define MOE_EXT_MMA(shape_and_types)                                                       \
  MOE_EXT_TENSOR(                                                                          \
      "mma.sync.aligned." shape_and_types                                                  \
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(sum[0]),   \
      "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(left[0]), "r"(left[1]), "r"(left[2]), \
      "r"(left[3]), "r"(right0), "r"(right1))

// Products of fragments. Sums are up to date after finish(), which all lanes of a warp call
// together.
template <typename T>
class Multiplications {
 public:
  // sum += left * right: right0 and right1 are the words of eight rows of the right operand. A
  // float counts with its upper 19 bits.
  __device__ void add(Sum16x8& sum, const Fragment& left, unsigned right0, unsigned right1) {
    if constexpr (std::is_same_v<T, __half>) {
      MOE_EXT_MMA("m16n8k16.row.col.f32.f16.f16.f32");
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      MOE_EXT_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
    } else {
      MOE_EXT_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
    }
  }
  __device__ void finish() {}  // the hardware waits where a sum is used
};

// A float to the nearest that has 19 bits, halves away from zero.
__device__ inline unsigned round_to_tf32(float x) {
  unsigned bits = 0;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#endif
  return bits;
}

#undef MOE_EXT_MMA
#undef MOE_EXT_TENSOR

#else

using cusim::commit_copies;
using cusim::copy_async;
using cusim::load_matrices;
using cusim::load_matrices_transposed;
using cusim::Multiplications;
using cusim::round_to_tf32;
using cusim::wait_for_copies;

#endif

}  // namespace moe_ext::cuda
