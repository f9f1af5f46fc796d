// Route dot: the product of every token with each of its rows; and combine_backward, which
// dispatches the tokens in the same pass.
//
//   dots[t, k]                 = sum over h of tokens[t, h] * rows[slots[t, k], h]
//   dispatched[slots[t, k], :] = weights[t, k] * tokens[t, :]
//
// 0 where the slot is -1, and where the source is. No result depends on the number of threads.

#include "rows.h"

namespace moe_ext {
namespace {

// dispatched: [R, H], null for the dots alone
template <typename scalar_t>
Tensor route_dot_kernel(const char* op, const RouteDotArgs& a, const Tensor* dispatched) {
  const Routes<scalar_t> routes(a.routes);
  Tensor dots = empty_route_sums(a.tokens, a.routes);
  const int64_t H = a.hidden, K = routes.top_k;
  const auto* tokens = const_data<scalar_t>(a.tokens);  // [T, H]
  const auto* rows = const_data<scalar_t>(a.rows);      // [R, H]
  auto* all_dots = data<accumulate_t<scalar_t>>(dots);  // [T, K]
  auto* scaled = dispatched ? data<scalar_t>(*dispatched) : nullptr;
  Found found;
  const auto run = [&](int64_t begin, int64_t end) {
    const RowWriter<scalar_t> writer(dispatched ? dispatched->numel() : 0);
    on_widest([&](auto bytes) __attribute__((always_inline)) {
      PiecesAhead<scalar_t> ahead(rows, routes, H, kDotPiece, begin * K, 1);
      for (int64_t route = begin * K; route < end * K; ++route) {
        all_dots[route] = 0;
        if (!routes.has_row(route, found)) {
          for (int64_t h = 0; h < H; h += kDotPiece) ahead.fetch();
          continue;
        }
        const scalar_t* token = tokens + route / K * H;
        const int64_t row = routes.slots[route] * H;
        all_dots[route] = dot<bytes>(token, rows + row, H,
                                     [&]() __attribute__((always_inline)) { ahead.fetch(); });
        if (!scaled) continue;
        writer.template scale<bytes>(token, routes.weights[route], scaled + row, H);
      }
    });
  };
  parallel_for(0, routes.num_tokens, grain(H * (K * (scaled ? 2 : 1) + 1) * sizeof(scalar_t)), run);
  if (scaled) routes.zero_empty_rows(scaled, H, found);
  routes.check(op, found);
  return dots;
}

Tensor route_dot_cpu(const RouteDotArgs& a) {
  return visit_float(a.tokens.scalar_type(), [&](auto zero) {
    return route_dot_kernel<decltype(zero)>("route_dot", a, nullptr);
  });
}

std::tuple<Tensor, Tensor> combine_backward_cpu(const RouteDotArgs& a) {
  const Tensor dispatched = fresh(a.tokens, {a.routes.num_rows, a.hidden}, a.tokens.scalar_type());
  return {dispatched, visit_float(a.tokens.scalar_type(), [&](auto zero) {
            return route_dot_kernel<decltype(zero)>("combine_backward", a, &dispatched);
          })};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("route_dot", boxed<route_dot_args, route_dot_cpu>);
  m.impl("combine_backward", boxed<combine_backward_args, combine_backward_cpu>);
}

}  // namespace moe_ext
