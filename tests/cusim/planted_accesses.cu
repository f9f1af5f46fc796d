// Kernels whose accesses can be counted by hand, for the counter: see count_accesses.cpp.

#include "vec.cuh"

using namespace moe_ext::cuda;

namespace {

// A warp reads numbers that are so far apart.
__global__ void read_kernel(const float* from, int stride, float* to) {
  store(to + threadIdx.x, load(from + threadIdx.x * stride));
}

// A warp writes numbers to shared memory that are so far apart, and reads them one beside another.
__global__ void share_kernel(int stride, float* to) {
  SharedMemory shared;
  float* numbers = shared.take<float>(kWarp * stride);
  for (int i = 0; i < stride; ++i) numbers[i * kWarp + threadIdx.x] = 0;
  __syncthreads();
  numbers[threadIdx.x * stride] = 1;
  __syncthreads();
  store(to + threadIdx.x, numbers[threadIdx.x]);
}

// Past load().
__global__ void past_kernel(const float* from, float* to) {
  store(to + threadIdx.x, from[threadIdx.x]);
}

}  // namespace

void launch_planted(const float* from, int stride, float* to) {
  launch("read", read_kernel, 1, kWarp, 0, nullptr, from, stride, to);
  launch("share", share_kernel, 1, kWarp, shared_bytes<float>(kWarp * stride), nullptr, stride, to);
  launch("past", past_kernel, 1, kWarp, 0, nullptr, from, to);
}
