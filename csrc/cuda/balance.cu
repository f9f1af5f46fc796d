// balance: the load-balance loss of a routing, and its slope for each expert's importance.
//
//   l_aux    = sum over e of importance[e] / T * share[e]      slope[e] = share[e] / T
//   share[e] = E / choices / T * load[e]            load: of the first `choices` choices of tokens
//
// Where these are not all choices, blocks count those of some tokens each. One block adds up,
// always in the same order. Slopes are those of the CPU to the bit.

#include "vec.cuh"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kLeastTokens = 2048, kMostBlocks = 128;

KERNEL(kThreads)
void balance_count_kernel(const int32_t* __restrict__ expert_ids,  // [T, K]
                          int64_t num_tokens, int64_t top_k, int64_t choices, int num_experts,
                          int32_t* __restrict__ counts) {  // [blocks, E]
  SharedMemory shared;
  int* const mine = shared.take<int>(num_experts);
  for (int e = threadIdx.x; e < num_experts; e += kThreads) mine[e] = 0;
  __syncthreads();
  for (int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x; t < num_tokens;
       t += int64_t{gridDim.x} * kThreads) {
    for (int64_t k = 0; k < choices; ++k) {
      const int e = load(expert_ids + t * top_k + k);
      if (e >= 0 && e < num_experts) atomicAdd(&mine[e], 1);
    }
  }
  __syncthreads();
  counts += int64_t{blockIdx.x} * num_experts;
  for (int e = threadIdx.x; e < num_experts; e += kThreads) store(counts + e, mine[e]);
}

template <typename T>
KERNEL(kThreads)
void balance_kernel(const T* __restrict__ importance,    // [E]
                    const int32_t* __restrict__ counts,  // [blocks, E]
                    int64_t blocks, int num_experts, T num_tokens, T inverse_tokens, T even_load,
                    T* __restrict__ l_aux,    // []
                    T* __restrict__ slope) {  // [E]
  SharedMemory shared;
  double* const sums = shared.take<double>(kThreads);
  double sum = 0;
  for (int e = threadIdx.x; e < num_experts; e += kThreads) {
    int count = 0;
    for (int64_t block = 0; block < blocks; ++block)
      count += load(counts + block * num_experts + e);
    const T share = static_cast<T>(count) / even_load;
    store(slope + e, share * inverse_tokens);
    sum += static_cast<double>(load(importance + e) / num_tokens * share);
  }
  sums[threadIdx.x] = sum;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) store(l_aux, static_cast<T>(sums[0]));
}

template <typename T>
void launch_balance(const Balance& call, const int32_t* counts, int64_t blocks,
                    CUstream_st* stream) {
  const double tokens = call.num_tokens > 0 ? static_cast<double>(call.num_tokens) : 1;
  const double even = tokens * (call.choices / static_cast<double>(call.num_experts));
  launch("balance", balance_kernel<T>, 1, kThreads, shared_bytes<double>(kThreads), stream,
         static_cast<const T*>(call.importance), counts, blocks, call.num_experts,
         static_cast<T>(tokens), static_cast<T>(1 / tokens), static_cast<T>(even),
         static_cast<T*>(call.l_aux), static_cast<T*>(call.slope));
}

}  // namespace

int64_t balance_blocks(int64_t num_tokens) {
  const int64_t blocks = divide_up(num_tokens, kLeastTokens);
  return blocks < kMostBlocks ? blocks : kMostBlocks;
}

void balance(const Balance& call, CUstream_st* stream) {
  const int32_t* counts = call.load;
  int64_t blocks = 1;
  if (call.choices < call.top_k) {
    counts = call.scratch;
    blocks = balance_blocks(call.num_tokens);
    launch("balance_count", balance_count_kernel, blocks, kThreads,
           shared_bytes<int>(call.num_experts), stream, call.expert_ids, call.num_tokens,
           call.top_k, call.choices, call.num_experts, call.scratch);
  }
  if (call.dtype == Dtype::kFloat64) {
    launch_balance<double>(call, counts, blocks, stream);
  } else {
    launch_balance<float>(call, counts, blocks, stream);
  }
}

}  // namespace moe_ext::cuda
