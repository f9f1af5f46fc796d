// The gradient of the gate, from its probs and its choice.
//
//   d weights[t, k] / d probs[t, expert_ids[t, k]]    as in Normalized, of scoring.h
//   d probs[t, i] / d logits[t, j]                    of the scoring, from probs alone
//
// gate_row.cuh says how a token's row lies in the lanes of a warp.

#include "gate_row.cuh"

namespace moe_ext::cuda {
namespace {

template <typename T, int kLanes, int kValues>
KERNEL(Layout<T, kLanes, kValues>::kThreads, Layout<T, kLanes, kValues>::kBlocks)
void gate_backward_kernel(const T* __restrict__ grad_weights,      // [T, K] or null
                          const T* __restrict__ grad_probs,        // [T, E] or null
                          const T* __restrict__ grad_importance,   // [E] or null
                          const T* __restrict__ probs,             // [T, E]
                          const int32_t* __restrict__ expert_ids,  // [T, K]
                          int64_t num_tokens, int num_experts, int top_k, Scoring scoring,
                          bool normalize, T scale, bool vectorised,
                          T* __restrict__ grad_logits) {  // [T, E]
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

void gate_backward(const GateBackward& call, CUstream_st* stream) {
  if (call.dtype == Dtype::kFloat64) {
    launch_gate_backward<double>(call, stream);
  } else {
    launch_gate_backward<float>(call, stream);
  }
}

}  // namespace moe_ext::cuda
