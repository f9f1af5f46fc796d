// balance, beside plain C++.

#include "testing.h"

namespace testing {
namespace {

template <typename T>
void test_balance(int64_t num_tokens, int64_t top_k, int64_t choices, int num_experts) {
  Array<T> importance = filled<T>(num_experts), l_aux(1), slope(num_experts);
  Array<int32_t> load(num_experts), expert_ids(num_tokens * top_k);
  Array<int32_t> scratch(choices < top_k ? balance_blocks(num_tokens) * num_experts : 0);
  std::vector<int64_t> all(num_experts), first(num_experts);
  for (int64_t route = 0; route < expert_ids.size(); ++route) {
    // Ids out of range count as none.
    const int32_t e = below(num_experts + 2) - 1;
    expert_ids[route] = e;
    if (e < 0 || e >= num_experts) continue;
    ++all[e];
    if (route % top_k < choices) ++first[e];
  }
  for (int e = 0; e < num_experts; ++e) load[e] = static_cast<int32_t>(all[e]);
  balance({dtype_of<T>, importance.data(), load.data(), expert_ids.data(), num_tokens, top_k,
           choices, num_experts, l_aux.data(), slope.data(), scratch.data()},
          nullptr);
  const double tokens = std::max<int64_t>(1, num_tokens);
  const T even = static_cast<T>(tokens * (choices / static_cast<double>(num_experts)));
  ExactSum sum;
  for (int e = 0; e < num_experts; ++e) {
    const T expected = static_cast<T>(first[e]) / even;
    CHECK(slope[e] == expected * static_cast<T>(1 / tokens));
    sum.add(number(importance[e]) / tokens * number(expected));
  }
  CHECK(close(l_aux[0], sum, 4));
}

void test_all() {
  for (const int64_t T : {0, 1, 255, 300, 4097, 5000}) {
    for (const int E : {1, 3, 256, 700}) {
      for (const auto& [K, choices] : {std::pair<int64_t, int64_t>{1, 1}, {2, 1}, {3, 2}, {3, 3}}) {
        context = "balance T" + std::to_string(T) + " E" + std::to_string(E) + " K" +
                  std::to_string(K) + " choices " + std::to_string(choices);
        test_balance<float>(T, K, choices, E);
        test_balance<double>(T, K, choices, E);
      }
    }
  }
}

const Registration registration("balance", test_all, {{"balance", 256}, {"balance_count", 256}});

}  // namespace
}  // namespace testing
