// Gate: score every expert, choose K of them, weigh the choices.
//
//   probs[t, :]      = softmax, sigmoid or sqrt(softplus) of logits[t, :]
//   expert_ids[t, :] = the K largest of choice_scores[t, :], NaN first, equal ones by lower id
//   weights[t, k]    = scale * probs[t, expert_ids[t, k]] / d[t]
//   d[t]             = sum over k of probs[t, expert_ids[t, k]] with normalize, else 1
//   importance[e]    = sum over t of probs[t, e]
//
// gate_row.cuh says how a token's row lies in the lanes of a warp.
//
// Every group of lanes sums the probs of its rows, then the block those of its groups, and
// importance_kernel those of the blocks: always in this order, so importance is bitwise the same on
// every run.

#include "gate_row.cuh"

namespace moe_ext::cuda {
namespace {

constexpr int64_t kMostThreads = 1 << 17;  // of gate_kernel: about what the largest cards hold
constexpr int kSumColumns = 8, kSumParts = 128;  // a sector wide, and few sums after each other
constexpr int kSumThreads = kSumColumns * kSumParts;

// logits -> probs in place; those beyond num_experts are -inf before.
template <typename L, Scoring kScoring, typename T>
__device__ void score(T (&row)[L::kValues]) {
  if constexpr (kScoring != Scoring::kSoftmax) {
#pragma unroll
    for (T& x : row) x = elementwise_score(kScoring, x);
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

template <typename T, int kLanes, int kValues, Scoring kScoring>
KERNEL(Layout<T, kLanes, kValues>::kThreads, Layout<T, kLanes, kValues>::kBlocks)
void gate_kernel(const T* __restrict__ logits,         // [T, E]
                 const T* __restrict__ choice_scores,  // [T, E]
                 int64_t num_tokens, int num_experts, int top_k, bool normalize,
                 accumulate_t<T> scale, bool vectorised,
                 accumulate_t<T>* __restrict__ weights,       // [T, K]
                 int32_t* __restrict__ expert_ids,            // [T, K]
                 accumulate_t<T>* __restrict__ probs,         // [T, E]
                 accumulate_t<T>* __restrict__ block_sums) {  // [blocks, E]
  using L = Layout<T, kLanes, kValues>;
  using Sum = accumulate_t<T>;
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int E = num_experts, K = top_k;
  constexpr bool kFast = std::is_same_v<Sum, float>;
  // Sums of this thread's rows: in registers until the end, where these are not too many.
  constexpr bool kInRegisters = sizeof(Sum) * kValues <= 128;
  SharedMemory shared;
  Sum* all_sums = shared.take<Sum>(L::kSumStride * kValues);
  Sum* const own_sums = all_sums + threadIdx.x;  // kSumStride from one to the next
  Sum sums[kInRegisters ? kValues : 1] = {};
#pragma unroll
  for (int i = 0; i < kValues && !kInRegisters; ++i) own_sums[i * L::kSumStride] = 0;

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
    for (int i = 0; i < kValues; ++i) {
      keys[i] = kFast ? ordered_bits(row[i]) : nan_first(ordered_bits(row[i]));
    }
    if (choice_scores != logits) {
      L::read(logits + token * E, active ? E : 0, vectorised, lane, -INFINITY, row);
    }
    score<L, kScoring>(row);
    if (active) {
      L::write(probs + token * E, E, vectorised, lane, row);
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        (kInRegisters ? sums[i] : own_sums[i * L::kSumStride]) += row[i];
      }
    }

    int mine = 0;
    bool chosen = false;
    if constexpr (kFast) {
      if (K <= kLanes) {
        chosen = !__ballot_sync(kAllLanes, take_different<L>(keys, lane, K, mine) && active);
      }
#pragma unroll
      for (int i = 0; i < kValues && !chosen; ++i) keys[i] = nan_first(keys[i]);
    }
    Sum chosen_sum = 0, p = 0;
    for (int k = 0; k < K; k += kLanes) {
      // Lane i keeps choice k + i.
      const int count = min(K - k, kLanes);
#pragma unroll 1
      for (int i = 0; i < count && !chosen; ++i) {
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

#pragma unroll
  for (int i = 0; i < kValues && kInRegisters; ++i) own_sums[i * L::kSumStride] = sums[i];
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += L::kThreads) {
    const Sum* of_expert = all_sums + L::index_of(e) * L::kSumStride + L::lane_of(e);
    Sum sum = 0;
    for (int g = 0; g < L::kRows; ++g) sum += of_expert[g * kLanes];
    store(block_sums + blockIdx.x * int64_t{E} + e, sum);
  }
}

template <typename T>
KERNEL(kSumThreads)
void importance_kernel(const T* __restrict__ block_sums,  // [blocks, E]
                       int num_blocks, int num_experts,
                       T* __restrict__ importance) {  // [E]
  const int column = threadIdx.x % kSumColumns, part = threadIdx.x / kSumColumns;
  const int e = blockIdx.x * kSumColumns + column;
  SharedMemory shared;
  T* parts = shared.take<T>(kSumThreads);
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

template <typename T>
void launch_gate(const Gate& call, CUstream_st* stream) {
  using Sum = accumulate_t<T>;
  const int E = call.num_experts;
  const bool vectorised = E % kFullPack<T> == 0 && aligned(call.logits) &&
                          aligned(call.choice_scores) && aligned(call.probs);
  const int64_t blocks = gate_blocks(call.dtype, call.num_tokens, E);
  visit_layout<T>(E, [&](auto layout) {
    using L = decltype(layout);
    using S = Scoring;
    visit_constant<S::kSoftmax, S::kSigmoid, S::kSqrtSoftplus>(call.scoring, [&](auto scoring) {
      launch("gate", gate_kernel<T, L::kLanes, L::kValues, scoring>, blocks, L::kThreads,
             shared_bytes<Sum>(L::kSumStride * L::kValues), stream,
             static_cast<const T*>(call.logits), static_cast<const T*>(call.choice_scores),
             call.num_tokens, E, call.top_k, call.normalize, static_cast<Sum>(call.scale),
             vectorised, static_cast<Sum*>(call.weights), call.expert_ids,
             static_cast<Sum*>(call.probs),
             static_cast<Sum*>(blocks == 1 ? call.importance : call.block_sums));
    });
  });
  if (blocks == 1) return;
  launch("gate_importance", importance_kernel<Sum>, divide_up(E, kSumColumns), kSumThreads,
         shared_bytes<Sum>(kSumThreads), stream, static_cast<const Sum*>(call.block_sums),
         static_cast<int>(blocks), E, static_cast<Sum*>(call.importance));
}

}  // namespace

int64_t gate_blocks(Dtype dtype, int64_t num_tokens, int64_t num_experts) {
  int64_t blocks = 0;
  visit_dtype(dtype, [&](auto zero) {
    visit_layout<decltype(zero)>(num_experts, [&](auto layout) {
      using L = decltype(layout);
      blocks = divide_up(num_tokens, L::kRows);
      if (blocks > kMostThreads / L::kThreads) blocks = kMostThreads / L::kThreads;
    });
  });
  return blocks;
}

void gate(const Gate& call, CUstream_st* stream) {
  visit_dtype(call.dtype, [&](auto zero) { launch_gate<decltype(zero)>(call, stream); });
}

}  // namespace moe_ext::cuda
