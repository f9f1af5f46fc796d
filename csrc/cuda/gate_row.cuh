// A token's row of scores in the registers of a warp, and the choice of its best.
//
// The row lies in kLanes neighbouring lanes, kValues in each; a warp holds kWarp / kLanes rows.
// Packs of 16 bytes go round the lanes, so that a warp reads whole lines:
//
//   kLanes = 2, kValues = 8, float32:   lane 0: experts 0-3 and 8-11, lane 1: 4-7 and 12-15

#pragma once

#include "vec.cuh"

namespace moe_ext::cuda {

template <typename T, int kLanes_, int kValues_>
struct Layout {
  static constexpr int kLanes = kLanes_, kValues = kValues_;
  static constexpr int kPack = kFullPack<T>;
  // Few rows for a block, so that a few thousand tokens occupy a card; and the sums of its threads
  // fill little more than 32 KiB of shared memory.
  static constexpr int kThreads = kLanes < 8                                ? 64
                                  : sizeof(accumulate_t<T>) * kValues > 128 ? 128
                                                                            : 256;
  static constexpr int kRows = kThreads / kLanes;  // of a block
  // From one of a thread's sums to the next: the experts of a warp's width lie in as many banks.
  static constexpr int kSumStride = kThreads + kWarp / kPack;
  // Blocks that a multiprocessor is to hold: with so few, no registers spill.
  static constexpr int kBlocks = sizeof(accumulate_t<T>) * kValues > 64 ? 1 : 512 / kThreads;

  // The expert of a lane's i-th value. It grows with i.
  __device__ static int id(int lane, int i) {
    return (i / kPack * kLanes + lane) * kPack + i % kPack;
  }
  // And where an expert is.
  __device__ static int lane_of(int id) { return id / kPack % kLanes; }
  __device__ static int index_of(int id) { return id / (kPack * kLanes) * kPack + id % kPack; }

  // vectorised: rows keep 16-byte packs aligned. Beyond num_experts: fill.
  __device__ static void read(const T* row, int num_experts, bool vectorised, int lane,
                              accumulate_t<T> fill, accumulate_t<T> (&values)[kValues]) {
#pragma unroll
    for (int i = 0; i < kValues; i += kPack) {
      const int first = id(lane, i);
      Pack<T, kPack> pack{};
      if (vectorised && first < num_experts) {
        pack = load(reinterpret_cast<const Pack<T, kPack>*>(row + first));
      }
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        if (first + j >= num_experts) {
          values[i + j] = fill;
        } else {
          values[i + j] = widen(vectorised ? pack.at[j] : load(row + first + j));
        }
      }
    }
  }

  __device__ static void write(accumulate_t<T>* row, int num_experts, bool vectorised, int lane,
                               const accumulate_t<T> (&values)[kValues]) {
    constexpr int kOut = kFullPack<accumulate_t<T>>;
    static_assert(kPack % kOut == 0);
#pragma unroll
    for (int i = 0; i < kValues; i += kOut) {
      const int first = id(lane, i);
      if (vectorised && first < num_experts) {
        Pack<accumulate_t<T>, kOut> pack;
#pragma unroll
        for (int j = 0; j < kOut; ++j) pack.at[j] = values[i + j];
        store(reinterpret_cast<Pack<accumulate_t<T>, kOut>*>(row + first), pack);
      } else {
#pragma unroll
        for (int j = 0; j < kOut; ++j) {
          if (first + j < num_experts) store(row + first + j, values[i + j]);
        }
      }
    }
  }
};

// In the order of the choice: NaN above every number.
template <typename T>
__device__ auto choice_key(T score) {
  const auto key = ordered_bits(score);
  return std::isnan(score) ? ~decltype(key){0} : key;
}

// Whether the hardware reduces an integer over a warp.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kReduces = false;
#else
constexpr bool kReduces = true;
#endif

template <int kLanes, typename Key>
__device__ Key lanes_max(Key x) {
  if constexpr (kReduces && kLanes == kWarp && std::is_same_v<Key, unsigned>) {
    return __reduce_max_sync(kAllLanes, x);
  } else {
    return lanes_reduce<kLanes>(x, [](Key a, Key b) { return max(a, b); });
  }
}

template <int kLanes, typename Id>
__device__ Id lanes_min(Id x) {
  if constexpr (kReduces && kLanes == kWarp) {
    return __reduce_min_sync(kAllLanes, x);
  } else {
    return lanes_reduce<kLanes>(x, [](Id a, Id b) { return min(a, b); });
  }
}

// Takes the best that is left: clears its key and returns its id, the same in all of the row's
// lanes.
template <typename L, typename Key>
__device__ int take_best(Key (&keys)[L::kValues], int lane) {
  Key best = 0;
#pragma unroll
  for (int i = 0; i < L::kValues; ++i) best = max(best, keys[i]);
  best = lanes_max<L::kLanes>(best);
  unsigned id = ~0u;
#pragma unroll
  for (int i = L::kValues - 1; i >= 0; --i) {
    if (keys[i] == best) id = L::id(lane, i);
  }
  id = lanes_min<L::kLanes>(id);
#pragma unroll
  for (int i = 0; i < L::kValues; ++i) {
    if (L::id(lane, i) == static_cast<int>(id)) keys[i] = 0;
  }
  return static_cast<int>(id);
}

// The value in the row of the id that each lane names.
template <typename L, typename T>
__device__ T value_of(const T (&row)[L::kValues], int id) {
  T value = 0;
#pragma unroll
  for (int i = 0; i < L::kValues; ++i) {
    const T theirs = __shfl_sync(kAllLanes, row[i], L::lane_of(id), L::kLanes);
    if (L::index_of(id) == i) value = theirs;
  }
  return value;
}

}  // namespace moe_ext::cuda
