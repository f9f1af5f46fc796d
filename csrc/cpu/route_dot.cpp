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

template <typename scalar_t>
struct RouteDotTokens {
  const scalar_t* tokens;  // [T, H]
  const scalar_t* rows;    // [R, H]
  Routes<scalar_t> routes;
  accumulate_t<scalar_t>* dots;  // [T, K]
  int64_t hidden;

  template <int bytes>
  MOE_EXT_INLINE void run(int64_t begin, int64_t end, Fault& bad_slot) const {
    PiecesAhead<scalar_t> ahead(rows, routes, hidden, kDotPiece, begin * routes.top_k, 1);
    for (int64_t route = begin * routes.top_k; route < end * routes.top_k; ++route) {
      run_route<bytes>(route, ahead, bad_slot);
    }
  }

  // Whether the route has a row.
  template <int bytes>
  MOE_EXT_INLINE bool run_route(int64_t route, PiecesAhead<scalar_t>& ahead,
                                Fault& bad_slot) const {
    dots[route] = 0;
    if (!routes.has_row(route, bad_slot)) {
      for (int64_t h = 0; h < hidden; h += kDotPiece) ahead.fetch();
      return false;
    }
    const scalar_t* token = tokens + route / routes.top_k * hidden;
    const scalar_t* row = rows + routes.slots[route] * hidden;
    dots[route] =
        dot<bytes>(token, row, hidden, [&]() __attribute__((always_inline)) { ahead.fetch(); });
    return true;
  }
};

// Also writes each route's row of the dispatched tokens.
template <typename scalar_t>
struct CombineBackwardTokens {
  RouteDotTokens<scalar_t> at;
  scalar_t* dispatched;  // [R, H]

  template <int bytes>
  MOE_EXT_INLINE void run(int64_t begin, int64_t end, const RowWriter<scalar_t>& writer,
                          Fault& bad_slot) const {
    const Routes<scalar_t>& routes = at.routes;
    const int64_t hidden = at.hidden, top_k = routes.top_k;
    PiecesAhead<scalar_t> ahead(at.rows, routes, hidden, kDotPiece, begin * top_k, 1);
    for (int64_t route = begin * top_k; route < end * top_k; ++route) {
      if (!at.template run_route<bytes>(route, ahead, bad_slot)) continue;
      writer.template scale<bytes>(at.tokens + route / top_k * hidden, routes.weights[route],
                                   dispatched + routes.slots[route] * hidden, hidden);
    }
  }
};

template <typename scalar_t>
RouteDotTokens<scalar_t> tokens_of(const RouteDotArgs& a, const Tensor& dots) {
  return {const_data<scalar_t>(a.tokens), const_data<scalar_t>(a.rows), Routes<scalar_t>(a.routes),
          data<accumulate_t<scalar_t>>(dots), a.hidden};
}

template <typename scalar_t>
void route_dot_kernel(const RouteDotArgs& a, const Tensor& dots) {
  const RouteDotTokens<scalar_t> tokens = tokens_of<scalar_t>(a, dots);
  Fault bad_slot;
  parallel_for(0, tokens.routes.num_tokens,
               grain(a.hidden * (tokens.routes.top_k + 1) * sizeof(scalar_t)),
               [&](int64_t begin, int64_t end) { on_widest(tokens, begin, end, bad_slot); });
  tokens.routes.check("route_dot", bad_slot);
}

template <typename scalar_t>
void combine_backward_kernel(const RouteDotArgs& a, const Tensor& out, const Tensor& dots) {
  scalar_t* dispatched = data<scalar_t>(out);
  const CombineBackwardTokens<scalar_t> tokens{tokens_of<scalar_t>(a, dots), dispatched};
  const Routes<scalar_t>& routes = tokens.at.routes;
  Fault bad_slot, bad_source;
  parallel_for(0, routes.num_tokens, grain(a.hidden * (2 * routes.top_k + 1) * sizeof(scalar_t)),
               [&](int64_t begin, int64_t end) {
                 const RowWriter<scalar_t> writer(out);
                 on_widest(tokens, begin, end, writer, bad_slot);
               });
  routes.zero_empty_rows(dispatched, a.hidden, bad_source);
  routes.check("combine_backward", bad_slot, bad_source);
}

// [T, K], in the dtype of sums
Tensor empty_dots(const RouteDotArgs& a) {
  const ScalarType dtype = accumulate_type(a.tokens.scalar_type());
  return empty(a.tokens, {a.routes.num_tokens, a.routes.top_k}, dtype);
}

Tensor route_dot_cpu(const Tensor& tokens, const Tensor& rows, const Tensor& slots,
                     const Tensor& sources) {
  const RouteDotArgs a = route_dot_args(tokens, rows, slots, sources);
  const Tensor dots = empty_dots(a);
  visit_float(a.tokens.scalar_type(),
              [&](auto zero) { route_dot_kernel<decltype(zero)>(a, dots); });
  return dots;
}

std::tuple<Tensor, Tensor> combine_backward_cpu(const Tensor& tokens, const Tensor& rows,
                                                const Tensor& slots, const Tensor& sources,
                                                const Tensor& weights) {
  const RouteDotArgs a = combine_backward_args(tokens, rows, slots, sources, weights);
  const Tensor dispatched = fresh(a.tokens, {a.routes.num_rows, a.hidden}, a.tokens.scalar_type());
  const Tensor dots = empty_dots(a);
  visit_float(a.tokens.scalar_type(),
              [&](auto zero) { combine_backward_kernel<decltype(zero)>(a, dispatched, dots); });
  return {dispatched, dots};
}

}  // namespace
}  // namespace moe_ext

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("route_dot", TORCH_BOX(&moe_ext::route_dot_cpu));
  m.impl("combine_backward", TORCH_BOX(&moe_ext::combine_backward_cpu));
}
