// Balance: the load-balance loss of a routing, and its slope for each expert's importance.
//
//   l_aux    = sum over e of importance[e] / T * share[e]      slope[e] = share[e] / T
//   share[e] = E / choices / T * load[e]            load: of the first `choices` choices of tokens
//
// Rounded as torch's operators round: the gradient is compared with DeepSpeed's to the bit.

#include <vector>

#include "common.h"

namespace moe_ext {
namespace {

std::vector<int64_t> first_load(const BalanceArgs& a) {
  const int32_t* load = const_data<int32_t>(a.load);
  if (a.choices == a.top_k) return {load, load + a.num_experts};
  const int32_t* expert_ids = const_data<int32_t>(a.expert_ids);
  check_ids(Check("balance"), expert_ids, a.num_tokens * a.top_k, a.top_k, -1, a.num_experts);
  std::vector<int64_t> counts(a.num_experts);
  for (int64_t t = 0; t < a.num_tokens; ++t) {
    for (int64_t k = 0; k < a.choices; ++k) {
      const int32_t e = expert_ids[t * a.top_k + k];
      if (e >= 0) ++counts[e];
    }
  }
  return counts;
}

template <typename T>
std::tuple<Tensor, Tensor> balance(const BalanceArgs& a) {
  Tensor l_aux = empty(a.importance, {}, a.importance.scalar_type());
  Tensor slopes = empty(a.importance, {a.num_experts}, a.importance.scalar_type());
  const std::vector<int64_t> load = first_load(a);
  const double tokens = static_cast<double>(std::max<int64_t>(1, a.num_tokens));
  const T even = static_cast<T>(tokens * (a.choices / static_cast<double>(a.num_experts)));
  const T* importance = const_data<T>(a.importance);
  T* slope = data<T>(slopes);
  double sum = 0;
  for (int64_t e = 0; e < a.num_experts; ++e) {
    const T share = static_cast<T>(load[e]) / even;
    slope[e] = share * static_cast<T>(1 / tokens);
    sum += static_cast<double>(importance[e] / static_cast<T>(tokens) * share);
  }
  *data<T>(l_aux) = static_cast<T>(sum);
  return {l_aux, slopes};
}

std::tuple<Tensor, Tensor> balance_cpu(const BalanceArgs& a) {
  return visit_sums(a.importance.scalar_type(),
                    [&](auto zero) { return balance<decltype(zero)>(a); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("balance", boxed<balance_args, balance_cpu>); }

}  // namespace moe_ext
