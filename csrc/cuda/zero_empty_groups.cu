// zero_empty_groups: zeroes the sums of groups without rows, which a product may leave as they are.
//
//   sums[e, :] = 0    where offsets[e + 1] = offsets[e]
//
// A group's blocks return at once if it has rows.

#include "vec.cuh"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBytesOfBlock = 1 << 16;

template <typename T>
KERNEL(kThreads)
void zero_empty_groups_kernel(T* __restrict__ sums,                 // [E, size]
                              const int32_t* __restrict__ offsets,  // [E+1]
                              int64_t size, int64_t blocks_of_group) {
  const int64_t group = blockIdx.x / blocks_of_group, block = blockIdx.x % blocks_of_group;
  if (load(offsets + group + 1) > load(offsets + group)) return;
  sums += group * size;
  for (int64_t i = block * kThreads + threadIdx.x; i < size; i += blocks_of_group * kThreads) {
    store(sums + i, T{});
  }
}

template <typename T>
void launch_zero_empty_groups(void* sums, int64_t bytes, const int32_t* offsets, int64_t num_groups,
                              CUstream_st* stream) {
  const int64_t blocks = divide_up(bytes, kBytesOfBlock);
  launch("zero_empty_groups", zero_empty_groups_kernel<T>, num_groups * blocks, kThreads, 0, stream,
         static_cast<T*>(sums), offsets, bytes / static_cast<int64_t>(sizeof(T)), blocks);
}

}  // namespace

void zero_empty_groups(void* sums, int64_t bytes, const int32_t* offsets, int64_t num_groups,
                       CUstream_st* stream) {
  if (bytes % sizeof(uint4) == 0 && aligned(sums)) {
    launch_zero_empty_groups<uint4>(sums, bytes, offsets, num_groups, stream);
  } else {
    launch_zero_empty_groups<unsigned short>(sums, bytes, offsets, num_groups, stream);
  }
}

}  // namespace moe_ext::cuda
