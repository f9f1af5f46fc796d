// A product of two slices on tensor cores, with one planted fault each, for planted.cu.

#pragma once

#include "products/tensor.cuh"

namespace planted {

using namespace moe_ext::cuda;

enum class Fault {
  kNone,
  kShortWait,
  kNoBarrier,
  kSwappedWords,
  kWrongPlace,
  kNotTransposed,
  kNoWait
};

// Lines of two vectors, which change places by turns of four lines.
__device__ inline int place(int line, int vector, int turn) {
  return line * 2 + (vector ^ (line / turn % 2));
}

// out [16, 16] = the sum over both slices of left [16 rows, 16] and right [16 deep, 16], bfloat16:
// one warp copies the left operand and one the right, and each multiplies by eight columns.
template <Fault kFault>
__global__ void multiply_slices(const uint4* left, const uint4* right, int* out) {
  SharedMemory shared;
  uint4* lefts = shared.take<uint4>(2 * 32);
  uint4* rights = shared.take<uint4>(2 * 32);
  const int lane = threadIdx.x % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int slice = 0; slice < 2; ++slice) {
    copy_async((warp ? rights : lefts) + slice * 32 + place(lane / 2, lane % 2, 4),
               (warp ? right : left) + slice * 32 + lane, true);
    commit_copies();
  }
  if (kFault == Fault::kNoWait) return;  // FAULT
  Sum16x8 sum = {};
  for (int slice = 0; slice < 2; ++slice) {
    // FAULT: one group short
    slice == 0 || kFault == Fault::kShortWait ? wait_for_copies<1>() : wait_for_copies<0>();
    if (kFault != Fault::kNoBarrier) __syncthreads();       // FAULT without it
    const int turn = kFault == Fault::kWrongPlace ? 2 : 4;  // FAULT
    Fragment of_left, of_right;
    load_matrices(of_left, lefts + slice * 32 + place(lane % 16, lane / 16, turn));
    const uint4* line = rights + slice * 32 + place(lane % 16, lane / 16, 4);
    if (kFault == Fault::kNotTransposed) {
      load_matrices(of_right, line);  // FAULT
    } else {
      load_matrices_transposed(of_right, line);
    }
    Multiplications<__nv_bfloat16> all;
    const bool swaps = kFault == Fault::kSwappedWords;  // FAULT
    all.add(sum, of_left, of_right[2 * warp + swaps], of_right[2 * warp + !swaps]);
    all.finish();
  }
  wait_for_copies<0>();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = 8 * warp + lane % 4 * 2 + i % 2;
    store(out + row * 16 + column, sum[i] == sum[i] ? static_cast<int>(sum[i]) : -1);
  }
}

__global__ inline void misaligned_copy(const float* in) {
  SharedMemory shared;
  copy_async(shared.take<uint4>(1), in + 1, true);  // FAULT: + 1
  commit_copies();
  wait_for_copies<0>();
}

// Small enough to be exact.
inline int left_number(int slice, int row, int depth) { return (slice + 3 * row + 5 * depth) % 7; }
inline int right_number(int slice, int depth, int column) {
  return (2 * slice + 2 * depth + 3 * column) % 5;
}

inline int sum_of_products(int row, int column) {
  int sum = 0;
  for (int i = 0; i < 32; ++i) {
    sum += left_number(i / 16, row, i % 16) * right_number(i / 16, i % 16, column);
  }
  return sum;
}

}  // namespace planted
