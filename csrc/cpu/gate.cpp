// Gate: score every expert, choose K of them, weigh the choices.
//
//   probs[t, :]   = softmax, sigmoid or sqrt(softplus) of logits[t, :]
//   experts[t, :] = the K largest of choice_scores[t, :], NaN first, equal ones by lower id
//   weights[t, k] = scale * probs[t, experts[t, k]], with renormalise over their sum
//   importance[e] = sum over t of probs[t, e]
//
// A task is a block of kBlock tokens, whatever the number of threads, and the blocks' sums are
// added in the order of the blocks: importance is bitwise the same on every run.

#include <cmath>
#include <vector>

#include "common.h"

namespace moe_ext {
namespace {

constexpr int64_t kBlock = 128;
constexpr int64_t kInsertionLimit = 32;

template <typename T>
bool ranks_above(T a, T b) {
  return a > b || (std::isnan(a) && !std::isnan(b));
}

template <typename T>
void choose_by_insertion(const T* scores, int64_t num_experts, int64_t top_k, int32_t* chosen) {
  T best[kInsertionLimit];
  int64_t filled = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const T score = scores[e];
    if (filled == top_k && !ranks_above(score, best[top_k - 1])) continue;
    int64_t i = filled < top_k ? filled++ : top_k - 1;
    for (; i > 0 && ranks_above(score, best[i - 1]); --i) {
      best[i] = best[i - 1];
      chosen[i] = chosen[i - 1];
    }
    best[i] = score;
    chosen[i] = static_cast<int32_t>(e);
  }
}

template <typename T>
void choose_by_sort(const T* scores, int64_t num_experts, int64_t top_k, int32_t* chosen) {
  std::vector<int32_t> ids(num_experts);
  for (int64_t e = 0; e < num_experts; ++e) ids[e] = static_cast<int32_t>(e);
  std::partial_sort(ids.begin(), ids.begin() + top_k, ids.end(), [&](int32_t a, int32_t b) {
    if (ranks_above(scores[a], scores[b])) return true;
    return !ranks_above(scores[b], scores[a]) && a < b;
  });
  std::copy_n(ids.begin(), top_k, chosen);
}

template <typename T>
void choose(const T* scores, int64_t num_experts, int64_t top_k, int32_t* chosen) {
  if (top_k <= kInsertionLimit) {
    choose_by_insertion(scores, num_experts, top_k, chosen);
  } else {
    choose_by_sort(scores, num_experts, top_k, chosen);
  }
}

// logits -> probs in place.
template <typename T>
void score(Scoring scoring, T* row, int64_t num_experts) {
  if (scoring != Scoring::kSoftmax) {
    for (int64_t e = 0; e < num_experts; ++e) row[e] = elementwise_score(scoring, row[e]);
  } else {
    T largest = row[0];
    for (int64_t e = 1; e < num_experts; ++e) largest = std::max(largest, row[e]);
    T sum = 0;
    for (int64_t e = 0; e < num_experts; ++e) sum += row[e] = std::exp(row[e] - largest);
    const T inverse = 1 / sum;
    for (int64_t e = 0; e < num_experts; ++e) row[e] *= inverse;
  }
}

template <typename scalar_t>
void gate_kernel(const GateArgs& a, const Tensor& weights, const Tensor& experts,
                 const Tensor& probs, const Tensor& importance) {
  using T = accumulate_t<scalar_t>;
  const int64_t E = a.num_experts, K = a.top_k;
  const int64_t num_blocks = (a.num_tokens + kBlock - 1) / kBlock;
  const auto* logits = const_data<scalar_t>(a.logits);
  const auto* choice_scores = const_data<scalar_t>(a.choice_scores);
  T* all_probs = data<T>(probs);
  T* all_weights = data<T>(weights);
  int32_t* all_experts = data<int32_t>(experts);
  std::vector<T> block_sums(num_blocks * E);

  parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> scores(E);
    for (int64_t block = begin; block < end; ++block) {
      T* sums = block_sums.data() + block * E;
      const int64_t last = std::min(a.num_tokens, (block + 1) * kBlock);
      for (int64_t t = block * kBlock; t < last; ++t) {
        T* p = all_probs + t * E;
        T* w = all_weights + t * K;
        int32_t* chosen = all_experts + t * K;
        for (int64_t e = 0; e < E; ++e) scores[e] = static_cast<T>(choice_scores[t * E + e]);
        choose(scores.data(), E, K, chosen);
        for (int64_t e = 0; e < E; ++e) p[e] = static_cast<T>(logits[t * E + e]);
        score(a.scoring, p, E);
        for (int64_t e = 0; e < E; ++e) sums[e] += p[e];
        T sum = 0;
        for (int64_t k = 0; k < K; ++k) sum += w[k] = p[chosen[k]];
        const T scale = static_cast<T>(a.scale);
        const T divisor = a.renormalise ? clamped(sum) : T{1};
        for (int64_t k = 0; k < K; ++k) w[k] = w[k] / divisor * scale;
      }
    }
  });

  T* total = data<T>(importance);
  for (int64_t e = 0; e < E; ++e) {
    double sum = 0;
    for (int64_t block = 0; block < num_blocks; ++block) sum += block_sums[block * E + e];
    total[e] = static_cast<T>(sum);
  }
}

template <typename T>
void gate_backward_kernel(const GateBackwardArgs& a, const Tensor& grad) {
  const int64_t E = a.num_experts, K = a.top_k;
  const T* grad_weights = data_or_null<T>(a.grad_weights);
  const T* grad_probs = data_or_null<T>(a.grad_probs);
  const T* grad_importance = data_or_null<T>(a.grad_importance);
  const T* probs = const_data<T>(a.probs);
  const int32_t* experts = const_data<int32_t>(a.experts);
  T* grad_logits = data<T>(grad);
  const T scale = static_cast<T>(a.scale);

  parallel_for(0, a.num_tokens, grain(E * 3 * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T* p = probs + t * E;
      T* g = grad_logits + t * E;
      for (int64_t e = 0; e < E; ++e) {
        g[e] = (grad_probs ? grad_probs[t * E + e] : T{0}) +
               (grad_importance ? grad_importance[e] : T{0});
      }
      if (grad_weights) {
        const T* gw = grad_weights + t * K;
        const int32_t* chosen = experts + t * K;
        T divisor = 1, shared = 0;
        if (a.renormalise) {
          T sum = 0, dot = 0;
          for (int64_t k = 0; k < K; ++k) sum += p[chosen[k]];
          for (int64_t k = 0; k < K; ++k) dot += gw[k] * p[chosen[k]];
          divisor = clamped(sum);
          // Below the clamp the divisor is a constant.
          shared = sum < divisor ? T{0} : dot / divisor;
        }
        for (int64_t k = 0; k < K; ++k) g[chosen[k]] += scale / divisor * (gw[k] - shared);
      }
      if (a.scoring == Scoring::kSoftmax) {
        T dot = 0;
        for (int64_t e = 0; e < E; ++e) dot += p[e] * g[e];
        for (int64_t e = 0; e < E; ++e) g[e] = p[e] * (g[e] - dot);
      } else {
        for (int64_t e = 0; e < E; ++e) g[e] *= slope(a.scoring, p[e]);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_cpu(const Tensor& logits,
                                                    const OptionalTensor& choice_scores, int64_t k,
                                                    const std::string& scoring, bool renormalise,
                                                    double scale) {
  const GateArgs a = gate_args(logits, choice_scores, k, scoring, renormalise, scale);
  const ScalarType dtype = accumulate_type(a.logits.scalar_type());
  Tensor weights = empty(a.logits, {a.num_tokens, a.top_k}, dtype);
  Tensor experts = empty(a.logits, {a.num_tokens, a.top_k}, ScalarType::Int);
  Tensor probs = empty(a.logits, {a.num_tokens, a.num_experts}, dtype);
  Tensor importance = empty(a.logits, {a.num_experts}, dtype);
  visit_float(a.logits.scalar_type(), [&](auto zero) {
    gate_kernel<decltype(zero)>(a, weights, experts, probs, importance);
  });
  return {weights, experts, probs, importance};
}

Tensor gate_backward_cpu(const OptionalTensor& grad_weights, const OptionalTensor& grad_probs,
                         const OptionalTensor& grad_importance, const Tensor& probs,
                         const Tensor& experts, const std::string& scoring, bool renormalise,
                         double scale) {
  const GateBackwardArgs a = gate_backward_args(grad_weights, grad_probs, grad_importance, probs,
                                                experts, scoring, renormalise, scale);
  check_ids(Check("gate_backward"), const_data<int32_t>(a.experts), a.num_tokens * a.top_k, a.top_k,
            0, a.num_experts);
  Tensor grad = empty(a.probs, {a.num_tokens, a.num_experts}, a.probs.scalar_type());
  if (a.probs.scalar_type() == ScalarType::Double) {
    gate_backward_kernel<double>(a, grad);
  } else {
    gate_backward_kernel<float>(a, grad);
  }
  return grad;
}

}  // namespace
}  // namespace moe_ext

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("gate", TORCH_BOX(&moe_ext::gate_cpu));
  m.impl("gate_backward", TORCH_BOX(&moe_ext::gate_backward_cpu));
}
