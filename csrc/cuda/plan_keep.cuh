// The routes that a full expert keeps: those of largest priority, by a radix selection.

#pragma once

#include "vec.cuh"

namespace moe_ext::cuda {

constexpr int kKeepThreads = 512;
constexpr int kKeysAhead = 4;  // that a thread reads at once

// In the order of the priorities: NaN below every number.
__device__ inline unsigned priority_key(float priority) {
  const unsigned bits = ordered_bits(priority);
  return std::isnan(priority) ? 0 : bits;
}

// The `kept`-th largest key of an expert's group, and how many keys equal to it are kept.
struct Threshold {
  unsigned key;
  int num_equal;
};

constexpr int kDigits = 256;

// The last step of a radix pass: the same of digits alone. counts [kDigits]; called by one warp, 8
// digits a lane, largest digits first.
__device__ Threshold find_digit(const int* counts, int wanted) {
  constexpr int kPerLane = kDigits / kWarp;
  const int lane = threadIdx.x % kWarp, top = kDigits - 1 - lane * kPerLane;
  int sum = 0;
  for (int i = 0; i < kPerLane; ++i) sum += counts[top - i];
  int before = running_sum(sum) - sum;
  const bool mine = before < wanted && before + sum >= wanted;
  int digit = top;
  if (mine) {
    for (; before + counts[digit] < wanted; --digit) before += counts[digit];
  }
  const int owner = __ffs(__ballot_sync(kAllLanes, mine)) - 1;
  return {static_cast<unsigned>(__shfl_sync(kAllLanes, digit, owner)),
          wanted - __shfl_sync(kAllLanes, before, owner)};
}

// body(i, value of i) for every i below size, kKeepThreads of them at a time and in order; the
// whole block is in it together, where i may be size or above.
template <typename Read, typename Body>
__device__ void for_each_key(int64_t size, const Read& read, const Body& body) {
  for (int64_t first = 0; first < size; first += kKeysAhead * kKeepThreads) {
    decltype(read(first)) values[kKeysAhead];
    // Without a branch, beyond the end the last once more: all are on their way at once.
#pragma unroll
    for (int j = 0; j < kKeysAhead; ++j) {
      values[j] = read(min(first + j * kKeepThreads + threadIdx.x, size - 1));
    }
#pragma unroll
    for (int j = 0; j < kKeysAhead; ++j) {
      const int64_t begin = first + j * kKeepThreads;
      if (begin < size) body(begin + threadIdx.x, values[j]);
    }
  }
}

// Block e lets expert e keep the `capacity` routes of largest priority; equal ones go by the queue.
KERNEL(kKeepThreads)
void keep_kernel(const float* __restrict__ priority,      // [T, K]
                 const int32_t* __restrict__ all_groups,  // [T * K], sources of a dropless plan
                 const int32_t* __restrict__ starts,      // [E+1], its offsets
                 const int32_t* __restrict__ all_load,    // [E]
                 int64_t capacity,
                 unsigned* all_keys,               // [T * K], scratch
                 int32_t* __restrict__ slots,      // [T, K]
                 int32_t* __restrict__ sources,    // [R]
                 int32_t* __restrict__ offsets) {  // [E+1]
  constexpr int kKeepWarps = kKeepThreads / kWarp;
  const int e = blockIdx.x, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int32_t* group = all_groups + load(starts + e);
  unsigned* keys = all_keys + load(starts + e);
  const int size = load(all_load + e);
  const int kept = static_cast<int>(min(int64_t{size}, capacity));
  const int64_t offset = e * capacity;
  if (threadIdx.x == 0) store(offsets + e, static_cast<int32_t>(offset));
  if (threadIdx.x == 0 && blockIdx.x == gridDim.x - 1) {
    store(offsets + e + 1, static_cast<int32_t>(offset + capacity));
  }
  for (int64_t i = kept + threadIdx.x; i < capacity; i += kKeepThreads) {
    store(sources + offset + i, -1);
  }

  SharedMemory shared;
  int* counts = shared.take<int>(kDigits);
  Threshold* found = shared.take<Threshold>(1);
  int2* of_warps = shared.take<int2>(kKeepWarps);

  // Each is looked at up to five times: side by side, not where its route is.
  for_each_key(
      size, [&](int64_t i) { return load(priority + load(group + i)); },
      [&](int64_t i, float value) {
        if (i < size) store(keys + i, priority_key(value));
      });
  __syncthreads();
  const auto key_at = [&](int64_t i) { return load(keys + i); };

  // Digit by digit from the top, among the keys that share the digits found so far.
  Threshold threshold{0, kept};
  if (kept > 0 && kept < size) {
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (int d = threadIdx.x; d < kDigits; d += kKeepThreads) counts[d] = 0;
      __syncthreads();
      for_each_key(size, key_at, [&](int64_t i, unsigned key) {
        const bool counted = i < size && (key ^ threshold.key) >> shift < kDigits;
        const int digit = counted ? static_cast<int>(key >> shift & (kDigits - 1)) : -1;
        // Keys share their top digit more often than not: one atomic for all lanes that do.
        const unsigned same = __match_any_sync(kAllLanes, digit);
        if (counted && __ffs(same) - 1 == lane) atomicAdd(&counts[digit], __popc(same));
      });
      __syncthreads();
      if (warp == 0) {
        const Threshold digit = find_digit(counts, threshold.num_equal);
        if (lane == 0) *found = {threshold.key | digit.key << shift, digit.num_equal};
      }
      __syncthreads();
      threshold = *found;
    }
  }
  const bool keep_all = kept == size;

  // In the order of the queue: how many above the threshold, and how many equal to it, came before.
  int2 before{0, 0};
  for_each_key(size, key_at, [&](int64_t i, unsigned key) {
    const int32_t route = i < size ? load(group + i) : 0;
    const bool above = i < size && kept > 0 && (keep_all || key > threshold.key);
    const bool equal = i < size && kept > 0 && !keep_all && key == threshold.key;
    const unsigned above_lanes = __ballot_sync(kAllLanes, above);
    const unsigned equal_lanes = __ballot_sync(kAllLanes, equal);
    if (lane == 0) of_warps[warp] = {__popc(above_lanes), __popc(equal_lanes)};
    __syncthreads();
    const unsigned lower = (1u << lane) - 1;
    int2 mine{before.x + __popc(above_lanes & lower), before.y + __popc(equal_lanes & lower)};
    for (int w = 0; w < kKeepWarps; ++w) {
      if (w < warp) mine.x += of_warps[w].x, mine.y += of_warps[w].y;
      before.x += of_warps[w].x, before.y += of_warps[w].y;
    }
    __syncthreads();
    if (i >= size) return;
    const bool keeps = above || (equal && mine.y < threshold.num_equal);
    const int64_t slot = offset + mine.x + min(mine.y, threshold.num_equal);
    store(slots + route, keeps ? static_cast<int32_t>(slot) : -1);
    if (keeps) store(sources + slot, route);
  });
}

inline std::size_t keep_shared_bytes() {
  return shared_bytes<int>(kDigits) + shared_bytes<Threshold>(1) +
         shared_bytes<int2>(kKeepThreads / kWarp);
}

}  // namespace moe_ext::cuda
