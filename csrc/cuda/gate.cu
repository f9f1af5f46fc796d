// Gate: score every expert, choose K of them, weigh the choices.
//
//   probs[t, :]   = softmax, sigmoid or sqrt(softplus) of logits[t, :]
//   expert_ids[t, :] = the K largest of choice_scores[t, :], NaN first, equal ones by lower id
//   weights[t, k] = scale * probs[t, expert_ids[t, k]], with normalize over their sum
//   importance[e] = sum over t of probs[t, e]
//
// A token's row lies in the registers of kLanes neighbouring lanes, kValues in each; a warp holds
// kWarp / kLanes rows. Packs of 16 bytes go round the lanes, so that a warp reads whole lines:
//
//   kLanes = 2, kValues = 8, float32:   lane 0: experts 0-3 and 8-11, lane 1: 4-7 and 12-15
//
// Every group of lanes sums the probs of its rows, then the block those of its groups, and
// importance_kernel those of the blocks: always in this order, so importance is bitwise the same on
// every run.

#include "vec.cuh"

namespace moe_ext::cuda {
namespace {

constexpr int64_t kMaxThreads = 1 << 17;  // of gate_kernel: about what the largest cards hold
constexpr int kSumColumns = 8, kSumParts = 128;  // a sector wide, and few sums after each other

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

// Of the id that each lane names, the value in the row.
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

// logits -> probs in place; those beyond num_experts are -inf before.
template <typename L, typename T>
__device__ void score(Scoring scoring, T (&row)[L::kValues]) {
  if (scoring != Scoring::kSoftmax) {
#pragma unroll
    for (T& x : row) x = elementwise_score(scoring, x);
    return;
  }
  T largest = row[0], sum = 0;
#pragma unroll
  for (int i = 1; i < L::kValues; ++i) largest = std::fmax(largest, row[i]);
  largest = lanes_reduce<L::kLanes>(largest, [](T a, T b) { return std::fmax(a, b); });
#pragma unroll
  for (T& x : row) sum += x = std::exp(x - largest);
  const T inverse = 1 / lanes_sum<L::kLanes>(sum);
#pragma unroll
  for (T& x : row) x *= inverse;
}

template <typename T, int kLanes, int kValues>
__global__ __launch_bounds__(
    Layout<T, kLanes, kValues>::kThreads,
    Layout<T, kLanes,
           kValues>::kBlocks) void gate_kernel(const T* __restrict__ logits,
                                               const T* __restrict__ choice_scores,
                                               int64_t num_tokens, int num_experts, int top_k,
                                               Scoring scoring, bool normalize,
                                               accumulate_t<T> scale, bool vectorised,
                                               accumulate_t<T>* __restrict__ weights,
                                               int32_t* __restrict__ expert_ids,
                                               accumulate_t<T>* __restrict__ probs,
                                               accumulate_t<T>* __restrict__ block_sums) {
  using L = Layout<T, kLanes, kValues>;
  using Sum = accumulate_t<T>;
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int E = num_experts, K = top_k;
  SharedMemory shared;
  Sum* sums = shared.take<Sum>(L::kSumStride * kValues);  // of every thread's rows
#pragma unroll
  for (int i = 0; i < kValues; ++i) sums[i * L::kSumStride + threadIdx.x] = 0;

  // All lanes of a warp stay together: past the last token they go through the motions.
  for (int64_t first = blockIdx.x * int64_t{L::kRows}; first < num_tokens;
       first += int64_t{gridDim.x} * L::kRows) {
    const int64_t token = first + group;
    const bool active = token < num_tokens;
    Sum row[kValues];
    decltype(ordered_bits(Sum{})) keys[kValues];
    L::read(choice_scores + token * E, active ? E : 0, vectorised, lane, -INFINITY, row);
    // Beyond the last expert too: -inf with a higher id is behind every expert.
#pragma unroll
    for (int i = 0; i < kValues; ++i) keys[i] = choice_key(row[i]);
    if (choice_scores != logits) {
      L::read(logits + token * E, active ? E : 0, vectorised, lane, -INFINITY, row);
    }
    score<L>(scoring, row);
    if (active) {
      L::write(probs + token * E, E, vectorised, lane, row);
#pragma unroll
      for (int i = 0; i < kValues; ++i) sums[i * L::kSumStride + threadIdx.x] += row[i];
    }

    Sum chosen_sum = 0, p = 0;
    for (int k = 0; k < K; k += kLanes) {
      // Lane i keeps choice k + i.
      const int count = min(K - k, kLanes);
      int mine = 0;
      for (int i = 0; i < count; ++i) {
        const int id = take_best<L>(keys, lane);
        if (i == lane) mine = id;
      }
      p = value_of<L>(row, mine);
      chosen_sum += lanes_sum<kLanes>(lane < count ? p : 0);
      if (lane >= count || !active) continue;
      store(expert_ids + token * K + k + lane, mine);
      // More than one of a lane's await their sum in memory.
      if (K > kLanes) store(weights + token * K + k + lane, p);
    }
    if (!active) continue;
    const Sum divisor = normalize ? clamped(chosen_sum) : 1;
    for (int k = lane; k < K; k += kLanes) {
      Sum* weight = weights + token * K + k;
      store(weight, (K > kLanes ? load(weight) : p) / divisor * scale);
    }
  }

  __syncthreads();
  for (int e = threadIdx.x; e < E; e += L::kThreads) {
    const Sum* of_expert = sums + L::index_of(e) * L::kSumStride + L::lane_of(e);
    Sum sum = 0;
    for (int g = 0; g < L::kRows; ++g) sum += of_expert[g * kLanes];
    store(block_sums + blockIdx.x * int64_t{E} + e, sum);
  }
}

template <typename T>
__global__ __launch_bounds__(kSumColumns* kSumParts) void importance_kernel(
    const T* __restrict__ block_sums, int num_blocks, int num_experts, T* __restrict__ importance) {
  const int column = threadIdx.x % kSumColumns, part = threadIdx.x / kSumColumns;
  const int e = blockIdx.x * kSumColumns + column;
  SharedMemory shared;
  T* parts = shared.take<T>(kSumColumns * kSumParts);
  T sum = 0;
  if (e < num_experts) {
    for (int b = part; b < num_blocks; b += kSumParts) {
      sum += load(block_sums + b * int64_t{num_experts} + e);
    }
  }
  parts[threadIdx.x] = sum;
  for (int half = kSumParts / 2; half > 0; half /= 2) {
    __syncthreads();
    if (part < half) parts[threadIdx.x] += parts[threadIdx.x + half * kSumColumns];
  }
  if (part == 0 && e < num_experts) store(importance + e, parts[column]);
}

template <typename T, int kLanes, int kValues>
__global__ __launch_bounds__(
    Layout<T, kLanes, kValues>::kThreads,
    Layout<T, kLanes,
           kValues>::kBlocks) void gate_backward_kernel(const T* __restrict__ grad_weights,
                                                        const T* __restrict__ grad_probs,
                                                        const T* __restrict__ grad_importance,
                                                        const T* __restrict__ probs,
                                                        const int32_t* __restrict__ expert_ids,
                                                        int64_t num_tokens, int num_experts,
                                                        int top_k, Scoring scoring, bool normalize,
                                                        T scale, bool vectorised,
                                                        T* __restrict__ grad_logits) {
  using L = Layout<T, kLanes, kValues>;
  const int lane = threadIdx.x % kLanes;
  const int64_t token = blockIdx.x * int64_t{L::kRows} + threadIdx.x / kLanes;
  const bool active = token < num_tokens;
  const int E = active ? num_experts : 0, K = active ? top_k : 0;
  const int64_t row = token * num_experts;

  T p[kValues], grad[kValues] = {}, more[kValues];
  L::read(probs + row, E, vectorised, lane, 0, p);
  if (grad_probs) L::read(grad_probs + row, E, vectorised, lane, 0, grad);
  if (grad_importance) {
    L::read(grad_importance, E, vectorised, lane, 0, more);
#pragma unroll
    for (int i = 0; i < kValues; ++i) grad[i] += more[i];
  }
  if (grad_weights) {
    const int32_t* chosen = expert_ids + token * top_k;
    const T* grad_chosen = grad_weights + token * top_k;
    const auto is_expert = [&](int id) { return id >= 0 && id < num_experts; };
    Normalized<T> chosen_sum;
    if (normalize) {
      for (int k = 0; k < K; ++k) {
        const int id = load(chosen + k);
        if (is_expert(id)) chosen_sum.add(load(probs + row + id), load(grad_chosen + k));
      }
      chosen_sum.divide();
    }
    const T factor = scale / chosen_sum.divisor;
    for (int k = 0; k < K; ++k) {
      const int id = load(chosen + k);
      if (!is_expert(id)) continue;
      const T share = factor * chosen_sum.centred(load(grad_chosen + k));
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        if (L::id(lane, i) == id) grad[i] += share;
      }
    }
  }
  if (scoring == Scoring::kSoftmax) {
    // The sum over the lanes has one term that is not zero, at most.
    T shift = 0, mean = 0;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (is_most(p[i])) shift = grad[i];
    }
    shift = lanes_sum<kLanes>(shift);
#pragma unroll
    for (int i = 0; i < kValues; ++i) mean += p[i] * (grad[i] -= shift);
    mean = lanes_sum<kLanes>(mean);
#pragma unroll
    for (int i = 0; i < kValues; ++i) grad[i] = p[i] * (grad[i] - mean);
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) grad[i] *= slope(scoring, p[i]);
  }
  L::write(grad_logits + row, E, vectorised, lane, grad);
}

// Calls body with the layout that holds a row of so many experts.
template <typename T, typename Body>
void visit_layout(int64_t num_experts, const Body& body) {
  if (num_experts <= 16) return body(Layout<T, 2, 8>{});
  if (num_experts <= 64) return body(Layout<T, 8, 8>{});
  if (num_experts <= 128) return body(Layout<T, 16, 8>{});
  if (num_experts <= 256) return body(Layout<T, 32, 8>{});
  if (num_experts <= 512) return body(Layout<T, 32, 16>{});
  body(Layout<T, 32, 32>{});
}

template <typename T>
void launch_gate(const Gate& call, CUstream_st* stream) {
  using Sum = accumulate_t<T>;
  const int E = call.num_experts;
  const bool vectorised = E % kFullPack<T> == 0 && aligned(call.logits) &&
                          aligned(call.choice_scores) && aligned(call.probs);
  const int64_t blocks = gate_blocks(call.dtype, call.num_tokens, E);
  visit_layout<T>(E, [&](auto layout) {
    using L = decltype(layout);
    launch("gate", gate_kernel<T, L::kLanes, L::kValues>, blocks, L::kThreads,
           shared_bytes<Sum>(L::kSumStride * L::kValues), stream,
           static_cast<const T*>(call.logits), static_cast<const T*>(call.choice_scores),
           call.num_tokens, E, call.top_k, call.scoring, call.normalize,
           static_cast<Sum>(call.scale), vectorised, static_cast<Sum*>(call.weights),
           call.expert_ids, static_cast<Sum*>(call.probs),
           static_cast<Sum*>(blocks == 1 ? call.importance : call.block_sums));
  });
  if (blocks == 1) return;
  launch("gate_importance", importance_kernel<Sum>, divide_up(E, kSumColumns),
         kSumColumns * kSumParts, shared_bytes<Sum>(kSumColumns * kSumParts), stream,
         static_cast<const Sum*>(call.block_sums), static_cast<int>(blocks), E,
         static_cast<Sum*>(call.importance));
}

template <typename T>
void launch_gate_backward(const GateBackward& call, CUstream_st* stream) {
  const auto pointer = [](const void* p) { return static_cast<const T*>(p); };
  const bool vectorised = call.num_experts % kFullPack<T> == 0 && aligned(call.probs) &&
                          aligned(call.grad_probs) && aligned(call.grad_importance) &&
                          aligned(call.grad_logits);
  visit_layout<T>(call.num_experts, [&](auto layout) {
    using L = decltype(layout);
    launch("gate_backward", gate_backward_kernel<T, L::kLanes, L::kValues>,
           divide_up(call.num_tokens, L::kRows), L::kThreads, 0, stream, pointer(call.grad_weights),
           pointer(call.grad_probs), pointer(call.grad_importance), pointer(call.probs),
           call.expert_ids, call.num_tokens, call.num_experts, call.top_k, call.scoring,
           call.normalize, static_cast<T>(call.scale), vectorised,
           static_cast<T*>(call.grad_logits));
  });
}

}  // namespace

int64_t gate_blocks(Dtype dtype, int64_t num_tokens, int64_t num_experts) {
  int64_t blocks = 0;
  visit_dtype(dtype, [&](auto zero) {
    visit_layout<decltype(zero)>(num_experts, [&](auto layout) {
      using L = decltype(layout);
      blocks = divide_up(num_tokens, L::kRows);
      if (blocks > kMaxThreads / L::kThreads) blocks = kMaxThreads / L::kThreads;
    });
  });
  return blocks;
}

void gate(const Gate& call, CUstream_st* stream) {
  visit_dtype(call.dtype, [&](auto zero) { launch_gate<decltype(zero)>(call, stream); });
}

void gate_backward(const GateBackward& call, CUstream_st* stream) {
  if (call.dtype == Dtype::kFloat64) {
    launch_gate_backward<double>(call, stream);
  } else {
    launch_gate_backward<float>(call, stream);
  }
}

}  // namespace moe_ext::cuda
