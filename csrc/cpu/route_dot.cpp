// Route dot: the product of every token with each of its rows.
//
//   weights[t, k] = sum over h of tokens[t, h] * rows[slots[t, k], h]    (0 where the slot is -1)
//
// The sum runs in kLanes interleaved lanes, which the compiler turns into vector registers, and the
// lanes are added in their order: the result does not depend on the number of threads.

#include "common.h"

namespace moe_ext {
namespace {

constexpr int64_t kLanes = 16;

template <typename scalar_t>
accumulate_t<scalar_t> dot(const scalar_t* a, const scalar_t* b, int64_t size) {
  using T = accumulate_t<scalar_t>;
  T lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += static_cast<T>(a[i + lane]) * static_cast<T>(b[i + lane]);
    }
  }
  for (; i < size; ++i) lanes[i % kLanes] += static_cast<T>(a[i]) * static_cast<T>(b[i]);
  T sum = 0;
  for (const T lane : lanes) sum += lane;
  return sum;
}

template <typename scalar_t>
void route_dot_kernel(const RouteDotArgs& a, const Tensor& out) {
  using T = accumulate_t<scalar_t>;
  const int64_t K = a.top_k, H = a.hidden, R = a.num_rows;
  const auto* tokens = const_data<scalar_t>(a.tokens);
  const auto* rows = const_data<scalar_t>(a.rows);
  const int32_t* slots = const_data<int32_t>(a.slots);
  const int32_t* sources = const_data<int32_t>(a.sources);
  T* weights = data<T>(out);
  Fault bad_slot;

  parallel_for(
      0, a.num_tokens, grain(H * (K + 1) * sizeof(scalar_t)), [&](int64_t begin, int64_t end) {
        for (int64_t route = begin * K; route < end * K; ++route) {
          weights[route] = has_row(slots, sources, route, R, bad_slot)
                               ? dot(tokens + route / K * H, rows + int64_t{slots[route]} * H, H)
                               : T{0};
        }
      });
  check_routes_agree(Check("route_dot"), bad_slot, slots, K, R);
}

Tensor route_dot_cpu(const Tensor& tokens, const Tensor& rows, const Tensor& slots,
                     const Tensor& sources) {
  const RouteDotArgs a = route_dot_args(tokens, rows, slots, sources);
  Tensor weights =
      empty(a.tokens, {a.num_tokens, a.top_k}, accumulate_type(a.tokens.scalar_type()));
  visit_float(a.tokens.scalar_type(),
              [&](auto zero) { route_dot_kernel<decltype(zero)>(a, weights); });
  return weights;
}

}  // namespace
}  // namespace moe_ext

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("route_dot", TORCH_BOX(&moe_ext::route_dot_cpu));
}
