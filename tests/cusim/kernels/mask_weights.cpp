// mask_weights and its gradient, beside plain C++.

#include "testing.h"

namespace testing {
namespace {

template <typename T>
void test_mask_weights(int64_t num_tokens, int64_t K, bool normalize) {
  const double eps = 0.4, scale = 1.5;
  Array<T> weights(num_tokens * K), grad(num_tokens * K), kept(num_tokens * K);
  Array<T> grad_weights(num_tokens * K);
  Array<int32_t> slots(num_tokens * K);
  fill(grad);
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
    std::vector<int64_t> with_row;
    for (int64_t i = t * K; i < (t + 1) * K; ++i) {
      if (slots[i] >= 0) with_row.push_back(i), sum += number(weights[i]);
    }
    const double divisor = normalize ? std::max(sum, eps) : 1;
    for (int64_t i = t * K; i < (t + 1) * K; ++i) {
      const bool has_row = slots[i] >= 0;
      const double weight = has_row ? number(weights[i]) * scale / divisor : 0;
      CHECK(close(kept[i], weight, weight, K + 4));
      double g = has_row ? number(grad[i]) : 0, size = std::abs(g);
      if (has_row && normalize && sum >= eps) {
        // The mean is subtracted term by term.
        g = size = 0;
        for (const int64_t other : with_row) {
          if (other == i) continue;
          const double share = number(weights[other]) / sum;
          g += share * (number(grad[i]) - number(grad[other]));
          size += share * (std::abs(number(grad[i])) + std::abs(number(grad[other])));
        }
      }
      CHECK(close(grad_weights[i], g * scale / divisor, size * scale / divisor, K + 6));
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

const Registration registration("mask_weights",
                                {test_all,
                                 {{"mask_weights", 256}, {"mask_weights_backward", 256}}});

}  // namespace
}  // namespace testing
