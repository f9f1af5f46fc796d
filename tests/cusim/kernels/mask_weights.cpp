// mask_weights and its gradient, beside plain C++.

#include "testing.h"

namespace testing {
namespace {

template <typename T>
void test_mask_weights(int64_t num_tokens, int64_t K, bool normalize) {
  const double eps = 0.4, scale = 1.5;
  Array<T> weights(num_tokens * K), kept(num_tokens * K);
  Array<T> grad = filled<T>(num_tokens * K), grad_weights(num_tokens * K);
  Array<int32_t> slots(num_tokens * K);
  for (int64_t route = 0; route < slots.size(); ++route) {
    // Some tokens' sums are below the eps, and of some one weight is nearly all; what stands
    // beside a dropped route is poison.
    slots[route] = below(3) ? static_cast<int32_t>(route) : -1;
    const double weight = route / K % 4 == 0               ? 0.1 / K
                          : route / K % 4 == 1             ? 0.45
                          : route % K == route / K / 4 % K ? 0.9
                                                           : 1e-9;
    weights[route] = make<T>(slots[route] < 0 ? NAN : weight * (1 + 1e-3 * below(9)));
    if (slots[route] < 0) grad[route] = make<T>(INFINITY);
  }
  const MaskWeights call{dtype_of<T>, weights.data(), slots.data(), num_tokens,
                         K,           normalize,      eps,          scale};
  mask_weights(call, kept.data(), nullptr);
  mask_weights_backward(call, grad.data(), grad_weights.data(), nullptr);
  for (int64_t t = 0; t < num_tokens; ++t) {
    double sum = 0;
    std::vector<Share> all;  // none of a dropped route
    for (int64_t i = t * K; i < (t + 1) * K; ++i) {
      const double g = slots[i] >= 0 ? number(grad[i]) : 0;
      all.push_back({slots[i] >= 0 ? number(weights[i]) : 0, {g, std::abs(g)}});
      sum += all.back().share;
    }
    const double divisor = normalize ? std::max(sum, eps) : 1;
    for (Share& one : all) one.share /= divisor;
    for (int64_t k = 0; k < K; ++k) {
      const bool is_mean = slots[t * K + k] >= 0 && normalize && sum >= eps;
      const double weight = all[k].share * scale, factor = scale / divisor;
      CHECK(close(kept[t * K + k], weight, weight, K + 4));
      const ExactSum g = is_mean ? centred(all, k) : all[k].grad;
      CHECK(close(grad_weights[t * K + k], g.value * factor, g.terms * factor, K + 6));
    }
  }
}

void test_all() {
  const std::pair<int64_t, int64_t> cases[] = {{0, 2},   {1, 1},   {255, 2},
                                               {256, 8}, {257, 3}, {9, 40}};
  for (const auto& [T, K] : cases) {
    context = "mask_weights T" + std::to_string(T) + " K" + std::to_string(K);
    for (const bool normalize : {false, true}) {
      test_mask_weights<float>(T, K, normalize);
      test_mask_weights<double>(T, K, normalize);
    }
  }
}

const Registration registration("mask_weights", test_all,
                                {{"mask_weights", 256}, {"mask_weights_backward", 256}});

}  // namespace
}  // namespace testing
