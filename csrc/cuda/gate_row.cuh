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
      const bool inside = first < num_experts;
      Pack<T, kPack> pack{};
      if (vectorised && inside) pack = load(reinterpret_cast<const Pack<T, kPack>*>(row + first));
      const Pack<accumulate_t<T>, kPack> wide = widened(pack);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        if (vectorised ? inside : first + j < num_experts) {
          values[i + j] = vectorised ? wide.at[j] : widen(load(row + first + j));
        } else {
          values[i + j] = fill;
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
      Pack<accumulate_t<T>, kOut> pack;
#pragma unroll
      for (int j = 0; j < kOut; ++j) pack.at[j] = values[i + j];
      if (vectorised) {
        if (first < num_experts) store(reinterpret_cast<decltype(pack)*>(row + first), pack);
      } else {
#pragma unroll
        for (int j = 0; j < kOut; ++j) {
          if (first + j < num_experts) store(row + first + j, pack.at[j]);
        }
      }
    }
  }
};

// The keys of NaN are outside these, on the side of its sign.
template <typename Key>
using ScoreOf = std::conditional_t<sizeof(Key) == sizeof(float), float, double>;
template <typename Key>
__device__ Key lowest_key() {
  return ordered_bits(-static_cast<ScoreOf<Key>>(INFINITY));
}
template <typename Key>
__device__ Key highest_key() {
  return ordered_bits(static_cast<ScoreOf<Key>>(INFINITY));
}

// In the order of the choice: NaN above every number.
template <typename Key>
__device__ Key nan_first(Key key) {
  return key < lowest_key<Key>() || key > highest_key<Key>() ? ~Key{0} : key;
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

constexpr int kKept = 8;  // of a lane's best keys

__device__ inline void order(unsigned& larger, unsigned& smaller) {
  const unsigned most = max(larger, smaller);
  smaller = min(larger, smaller);
  larger = most;
}

// Largest first, by Batcher's network: pairs, fours, all.
__device__ inline void sort(unsigned (&keys)[kKept]) {
  constexpr int kPairs[][2] = {{0, 1}, {2, 3}, {4, 5}, {6, 7},                  //
                               {0, 2}, {1, 3}, {4, 6}, {5, 7}, {1, 2}, {5, 6},  //
                               {0, 4}, {1, 5}, {2, 6}, {3, 7}, {2, 4}, {3, 5},
                               {1, 2}, {3, 4}, {5, 6}};
#pragma unroll
  for (const auto& pair : kPairs) order(keys[pair[0]], keys[pair[1]]);
}

// The best of two sorted lists, sorted: the larger of each pair from opposite ends form a list that
// falls and rises, which halves sort.
__device__ inline void merge(unsigned (&keys)[kKept], const unsigned (&others)[kKept]) {
#pragma unroll
  for (int i = 0; i < kKept; ++i) keys[i] = max(keys[i], others[kKept - 1 - i]);
#pragma unroll
  for (int step = kKept / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (!(i & step)) order(keys[i], keys[i + step]);
    }
  }
}

// Gives lane k of the row the id of its k-th best, for K up to kLanes: every lane sorts its best
// keys once, and the best of all lanes' first ones is taken off its list. The lists forget the ids:
// a row whose best K + 1 are not all different, or that has more of them in a lane than its list
// holds, or a NaN, is left to take_best. Returns whether it is.
template <typename L>
__device__ bool take_different(const unsigned (&keys)[L::kValues], int lane, int top_k, int& mine) {
  unsigned kept[kKept], least = ~0u;
#pragma unroll
  for (int first = 0; first < L::kValues; first += kKept) {
    unsigned others[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) others[i] = keys[first + i];
    sort(others);
    least = min(least, others[kKept - 1]);
    if (first > 0) {
      merge(kept, others);
      continue;
    }
#pragma unroll
    for (int i = 0; i < kKept; ++i) kept[i] = others[i];
  }
  bool difficult = kept[0] > highest_key<unsigned>() || least < lowest_key<unsigned>();

  unsigned key = 0, owners = 0;
  for (int k = 0; k < top_k; ++k) {
    const unsigned best = lanes_max<L::kLanes>(kept[0]);
    const bool owns = kept[0] == best;
    const unsigned lanes = __ballot_sync(kAllLanes, owns);
    if (lane == k) key = best, owners = lanes;
    if (!owns) continue;
#pragma unroll
    for (int i = 0; i + 1 < kKept; ++i) kept[i] = kept[i + 1];
    kept[kKept - 1] = 0;
  }
  // Only the row's own lanes count.
  owners = owners >> (threadIdx.x % kWarp - lane) & kAllLanes >> (kWarp - L::kLanes);
  const unsigned next = lanes_max<L::kLanes>(kept[0]);
  const unsigned before = __shfl_up_sync(kAllLanes, key, 1, L::kLanes);
  if (lane < top_k) {
    difficult |= (owners & (owners - 1)) != 0 || (lane > 0 && before == key) || next == key;
  }
  if (L::kValues > kKept) difficult |= kept[0] == 0;

  const int owner = __ffs(static_cast<int>(owners)) - 1;
  int index = 0;
#pragma unroll
  for (int i = 0; i < L::kValues; ++i) {
    if (__shfl_sync(kAllLanes, keys[i], owner, L::kLanes) == key) index = i;
  }
  mine = L::id(owner, index);
  return difficult;
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

// Calls body with the layout that holds a row of so many experts. Float64 is for checks: fewer
// layouts do, which are the slowest to compile.
template <typename T, typename Body>
void visit_layout(int64_t num_experts, const Body& body) {
  if (num_experts <= 16) return body(Layout<T, 2, 8>{});
  if (num_experts <= 64) return body(Layout<T, 8, 8>{});
  if constexpr (sizeof(T) < sizeof(double)) {
    if (num_experts <= 128) return body(Layout<T, 16, 8>{});
  }
  if (num_experts <= 256) return body(Layout<T, 32, 8>{});
  if constexpr (sizeof(T) < sizeof(double)) {
    if (num_experts <= 512) return body(Layout<T, 32, 16>{});
  }
  body(Layout<T, 32, 32>{});
}

}  // namespace moe_ext::cuda
