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
  const scalar_t* tokens;        // [T, H]
  const scalar_t* rows;          // [R, H]
  const int32_t* slots;          // [T, K]
  const int32_t* sources;        // [R]
  accumulate_t<scalar_t>* dots;  // [T, K]
  int64_t top_k, hidden, num_rows;

  template <int bytes>
  MOE_EXT_INLINE void run(int64_t begin, int64_t end, Fault& bad_slot) const {
    for (int64_t route = begin * top_k; route < end * top_k; ++route) {
      dots[route] =
          has_row(slots, sources, route, num_rows, bad_slot)
              ? dot<bytes>(tokens + route / top_k * hidden, rows + slots[route] * hidden, hidden)
              : 0;
    }
  }
};

// Also writes each route's row of the dispatched tokens.
template <typename scalar_t>
struct CombineBackwardTokens {
  RouteDotTokens<scalar_t> at;
  const accumulate_t<scalar_t>* weights;  // [T, K]
  scalar_t* dispatched;                   // [R, H]

  template <int bytes>
  MOE_EXT_INLINE void run(int64_t begin, int64_t end, const RowWriter<scalar_t>& writer,
                          Fault& bad_slot) const {
    for (int64_t route = begin * at.top_k; route < end * at.top_k; ++route) {
      at.dots[route] = 0;
      if (!has_row(at.slots, at.sources, route, at.num_rows, bad_slot)) continue;
      const scalar_t* token = at.tokens + route / at.top_k * at.hidden;
      const int64_t row = at.slots[route] * at.hidden;
      at.dots[route] = dot<bytes>(token, at.rows + row, at.hidden);
      writer.scale(token, weights[route], dispatched + row, at.hidden);
    }
  }
};

template <typename scalar_t>
void route_dot_kernel(const RouteDotArgs& a, const Tensor& out) {
  using T = accumulate_t<scalar_t>;
  const int64_t K = a.top_k, H = a.hidden, R = a.num_rows;
  const int32_t* slots = const_data<int32_t>(a.slots);
  const int32_t* sources = const_data<int32_t>(a.sources);
  Fault bad_slot;

  const RouteDotTokens<scalar_t> tokens{const_data<scalar_t>(a.tokens),
                                        const_data<scalar_t>(a.rows),
                                        slots,
                                        sources,
                                        data<T>(out),
                                        K,
                                        H,
                                        R};
  parallel_for(0, a.num_tokens, grain(H * (K + 1) * sizeof(scalar_t)),
               [&](int64_t begin, int64_t end) { on_widest(tokens, begin, end, bad_slot); });
  check_routes_agree(Check("route_dot"), bad_slot, slots, K, R);
}

template <typename scalar_t>
void combine_backward_kernel(const CombineBackwardArgs& a, const Tensor& out_rows,
                             const Tensor& out) {
  using T = accumulate_t<scalar_t>;
  const int64_t K = a.top_k, H = a.hidden, R = a.num_rows;
  const int32_t* slots = const_data<int32_t>(a.slots);
  const int32_t* sources = const_data<int32_t>(a.sources);
  scalar_t* dispatched = data<scalar_t>(out_rows);
  Fault bad_slot, bad_source;

  const CombineBackwardTokens<scalar_t> tokens{
      {const_data<scalar_t>(a.tokens), const_data<scalar_t>(a.rows), slots, sources, data<T>(out),
       K, H, R},
      const_data<T>(a.weights),
      dispatched};
  parallel_for(0, a.num_tokens, grain(H * (2 * K + 1) * sizeof(scalar_t)),
               [&](int64_t begin, int64_t end) {
                 const RowWriter<scalar_t> writer(out_rows);
                 on_widest(tokens, begin, end, writer, bad_slot);
               });
  zero_empty_rows(slots, sources, a.num_tokens * K, R, dispatched, H, bad_source);
  const Check check("combine_backward");
  check_routes_agree(check, bad_slot, slots, K, R);
  check_sources_agree(check, bad_source, sources, a.num_tokens * K);
}

Tensor route_dot_cpu(const Tensor& tokens, const Tensor& rows, const Tensor& slots,
                     const Tensor& sources) {
  const RouteDotArgs a = route_dot_args(tokens, rows, slots, sources);
  Tensor dots = empty(a.tokens, {a.num_tokens, a.top_k}, accumulate_type(a.tokens.scalar_type()));
  visit_float(a.tokens.scalar_type(),
              [&](auto zero) { route_dot_kernel<decltype(zero)>(a, dots); });
  return dots;
}

std::tuple<Tensor, Tensor> combine_backward_cpu(const Tensor& tokens, const Tensor& rows,
                                                const Tensor& slots, const Tensor& sources,
                                                const Tensor& weights) {
  const CombineBackwardArgs a = combine_backward_args(tokens, rows, slots, sources, weights);
  Tensor dispatched = fresh(a.tokens, {a.num_rows, a.hidden}, a.tokens.scalar_type());
  Tensor dots = empty(a.tokens, {a.num_tokens, a.top_k}, a.weights.scalar_type());
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
