// mask_weights: the weights of routes that have a row, and the gradient.
//
//   kept[t, k] = weights[t, k]                    where slots[t, k] >= 0, else 0
//   out[t, k]  = scale * kept[t, k] / max(sum over k of kept[t, k], eps)
//
// A thread takes a token: what it reads is small beside a launch.

#include "vec.cuh"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
KERNEL(kThreads)
void mask_weights_kernel(const T* __restrict__ grad,         // [T, K]; null: out is the weights
                         const T* __restrict__ weights,      // [T, K]
                         const int32_t* __restrict__ slots,  // [T, K]
                         int64_t num_tokens, int64_t top_k, bool normalize, T eps, T scale,
                         T* __restrict__ out) {  // [T, K]
  const int64_t token = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (token >= num_tokens) return;
  const int64_t first = token * top_k;
  weights += first, slots += first, out += first;
  if (grad) grad += first;
  const T* from = grad ? grad : weights;
  Normalized<T> kept;
  if (normalize) {
    for (int64_t k = 0; k < top_k; ++k) {
      if (load(slots + k) < 0) continue;
      const T weight = load(weights + k);
      kept.add(weight, grad ? load(grad + k) : weight);
    }
    kept.divide(eps);
  }
  // Nothing is subtracted from a weight itself.
  if (!grad) kept.shift = kept.mean = 0;
  for (int64_t k = 0; k < top_k; ++k) {
    const bool has_row = load(slots + k) >= 0;
    store(out + k, has_row ? kept.centred(load(from + k)) / kept.divisor * scale : T{0});
  }
}

template <typename T>
void launch_mask_weights(const char* name, const void* grad, const MaskWeights& call, void* out,
                         CUstream_st* stream) {
  launch(name, mask_weights_kernel<T>, divide_up(call.num_tokens, kThreads), kThreads, 0, stream,
         static_cast<const T*>(grad), static_cast<const T*>(call.weights), call.slots,
         call.num_tokens, call.top_k, call.normalize, static_cast<T>(call.eps),
         static_cast<T>(call.scale), static_cast<T*>(out));
}

void visit_mask_weights(const char* name, const void* grad, const MaskWeights& call, void* out,
                        CUstream_st* stream) {
  if (call.dtype == Dtype::kFloat64) {
    launch_mask_weights<double>(name, grad, call, out, stream);
  } else {
    launch_mask_weights<float>(name, grad, call, out, stream);
  }
}

}  // namespace

void mask_weights(const MaskWeights& call, void* kept, CUstream_st* stream) {
  visit_mask_weights("mask_weights", nullptr, call, kept, stream);
}

void mask_weights_backward(const MaskWeights& call, const void* grad, void* grad_weights,
                           CUstream_st* stream) {
  visit_mask_weights("mask_weights_backward", grad, call, grad_weights, stream);
}

}  // namespace moe_ext::cuda
