// Keep: the weights of routes that have a row, and the gradient.
//
//   kept[t, k] = weights[t, k]                    where slots[t, k] >= 0, else 0
//   out[t, k]  = scale * kept[t, k] / max(sum over k of kept[t, k], least)

#include "common.h"

namespace moe_ext {
namespace {

// What weights are divided by: their sum, or the least where that is below it. NaN stays.
template <typename T>
T divisor_of(T sum, T least) {
  return sum < least ? least : sum;
}

template <typename T>
void keep_kernel(const KeepArgs& a, const Tensor& out) {
  const int64_t K = a.top_k;
  const T least = static_cast<T>(a.least), scale = static_cast<T>(a.scale);
  const T* weights = const_data<T>(a.weights);
  const int32_t* slots = const_data<int32_t>(a.slots);
  T* kept = data<T>(out);
  parallel_for(0, a.num_tokens, grain(K * 3 * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * K; first < end * K; first += K) {
      T divisor = 1;
      if (a.renormalise) {
        T sum = 0;
        for (int64_t i = first; i < first + K; ++i) sum += slots[i] < 0 ? T{0} : weights[i];
        divisor = divisor_of(sum, least);
      }
      for (int64_t i = first; i < first + K; ++i) {
        kept[i] = slots[i] < 0 ? T{0} : weights[i] / divisor * scale;
      }
    }
  });
}

template <typename T>
void keep_backward_kernel(const KeepArgs& a, const Tensor& grad, const Tensor& out) {
  const int64_t K = a.top_k;
  const T least = static_cast<T>(a.least), scale = static_cast<T>(a.scale);
  const T* g = const_data<T>(grad);
  const T* weights = const_data<T>(a.weights);
  const int32_t* slots = const_data<int32_t>(a.slots);
  T* grad_weights = data<T>(out);
  parallel_for(0, a.num_tokens, grain(K * 4 * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * K; first < end * K; first += K) {
      T divisor = 1, shared = 0;
      if (a.renormalise) {
        T sum = 0, dot = 0;
        for (int64_t i = first; i < first + K; ++i) {
          if (slots[i] < 0) continue;
          sum += weights[i];
          dot += g[i] * weights[i];
        }
        divisor = divisor_of(sum, least);
        // Below the least the divisor is a constant.
        shared = sum < least ? T{0} : dot / divisor;
      }
      for (int64_t i = first; i < first + K; ++i) {
        grad_weights[i] = slots[i] < 0 ? T{0} : (g[i] - shared) / divisor * scale;
      }
    }
  });
}

Tensor keep_cpu(const Tensor& weights, const Tensor& slots, bool renormalise, double least,
                double scale) {
  const KeepArgs a = keep_args(weights, slots, renormalise, least, scale);
  Tensor kept = empty(a.weights, {a.num_tokens, a.top_k}, a.weights.scalar_type());
  if (a.weights.scalar_type() == ScalarType::Double) {
    keep_kernel<double>(a, kept);
  } else {
    keep_kernel<float>(a, kept);
  }
  return kept;
}

Tensor keep_backward_cpu(const Tensor& grad, const Tensor& weights, const Tensor& slots,
                         bool renormalise, double least, double scale) {
  const KeepBackwardArgs a = keep_backward_args(grad, weights, slots, renormalise, least, scale);
  const KeepArgs& f = a.forward;
  Tensor grad_weights = empty(f.weights, {f.num_tokens, f.top_k}, f.weights.scalar_type());
  if (f.weights.scalar_type() == ScalarType::Double) {
    keep_backward_kernel<double>(f, a.grad, grad_weights);
  } else {
    keep_backward_kernel<float>(f, a.grad, grad_weights);
  }
  return grad_weights;
}

}  // namespace
}  // namespace moe_ext

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("keep", TORCH_BOX(&moe_ext::keep_cpu));
  m.impl("keep_backward", TORCH_BOX(&moe_ext::keep_backward_cpu));
}
