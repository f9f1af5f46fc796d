// mask_weights: the weights of routes that have a row, and the gradient.
//
//   kept[t, k] = weights[t, k]                    where slots[t, k] >= 0, else 0
//   out[t, k]  = scale * kept[t, k] / max(sum over k of kept[t, k], eps)

#include "common.h"

namespace moe_ext {
namespace {

// The weights, or their gradient where a.grad is given.
template <typename T>
Tensor masked(const MaskWeightsArgs& a) {
  Tensor result = empty(a.weights, {a.num_tokens, a.top_k}, a.weights.scalar_type());
  const int64_t K = a.top_k;
  const T eps = static_cast<T>(a.eps), scale = static_cast<T>(a.scale);
  const T* weights = const_data<T>(a.weights);
  const T* grad = data_or_null<T>(a.grad);  // null: the result is the weights
  const int32_t* slots = const_data<int32_t>(a.slots);
  T* out = data<T>(result);
  parallel_for(0, a.num_tokens, grain(K * 4 * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * K; first < end * K; first += K) {
      const T* from = grad ? grad : weights;
      Normalized<T> kept;
      if (a.normalize) {
        for (int64_t i = first; i < first + K; ++i) {
          if (slots[i] >= 0) kept.add(weights[i], from[i]);
        }
        kept.divide(eps);
      }
      // Nothing is subtracted from a weight itself.
      if (!grad) kept.shift = kept.mean = 0;
      for (int64_t i = first; i < first + K; ++i) {
        out[i] = slots[i] < 0 ? T{0} : kept.centred(from[i]) / kept.divisor * scale;
      }
    }
  });
  return result;
}

Tensor mask_weights_cpu(const MaskWeightsArgs& a) {
  return visit_sums(a.weights.scalar_type(), [&](auto zero) { return masked<decltype(zero)>(a); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("mask_weights", boxed<mask_weights_args, mask_weights_cpu>);
  m.impl("mask_weights_backward", boxed<mask_weights_backward_args, mask_weights_cpu>);
}

}  // namespace moe_ext
