// Dispatch: copy every token into the rows that its choices were given.
//
//   rows[slots[t, k], :] = weights[t, k] * tokens[t, :]    where slots[t, k] >= 0
//   rows[r, :]           = 0                               where sources[r] == -1
//
// A thread takes whole tokens: each is read once and written K times. No two routes share a slot.

#include "rows.h"

namespace moe_ext {
namespace {

template <typename scalar_t>
struct DispatchTokens {
  const scalar_t* tokens;  // [T, H]
  Routes<scalar_t> routes;
  scalar_t* rows;  // [R, H]
  int64_t hidden;

  template <int bytes>
  MOE_EXT_INLINE void run(int64_t begin, int64_t end, const RowWriter<scalar_t>& writer,
                          Fault& bad_slot) const {
    const int64_t top_k = routes.top_k;
    for (int64_t route = begin * top_k; route < end * top_k; ++route) {
      if (!routes.has_row(route, bad_slot)) continue;
      const scalar_t* token = tokens + route / top_k * hidden;
      scalar_t* row = rows + routes.slots[route] * hidden;
      if (routes.weights) {
        writer.template scale<bytes>(token, routes.weights[route], row, hidden);
      } else {
        writer.copy(token, row, hidden);
      }
    }
  }
};

template <typename scalar_t>
void dispatch_kernel(const DispatchArgs& a, const Tensor& out) {
  const Routes<scalar_t> routes(a.routes);
  const int64_t H = a.hidden;
  scalar_t* rows = data<scalar_t>(out);
  const DispatchTokens<scalar_t> tokens{const_data<scalar_t>(a.tokens), routes, rows, H};
  Fault bad_slot, bad_source;
  parallel_for(0, routes.num_tokens, grain(H * (routes.top_k + 1) * sizeof(scalar_t)),
               [&](int64_t begin, int64_t end) {
                 const RowWriter<scalar_t> writer(out);
                 on_widest(tokens, begin, end, writer, bad_slot);
               });
  routes.zero_empty_rows(rows, H, bad_source);
  routes.check("dispatch", bad_slot, bad_source);
}

Tensor dispatch_cpu(const Tensor& tokens, const Tensor& slots, const Tensor& sources,
                    const OptionalTensor& weights) {
  const DispatchArgs a = dispatch_args(tokens, slots, sources, weights);
  Tensor rows = fresh(a.tokens, {a.routes.num_rows, a.hidden}, a.tokens.scalar_type());
  visit_float(a.tokens.scalar_type(), [&](auto zero) { dispatch_kernel<decltype(zero)>(a, rows); });
  return rows;
}

}  // namespace
}  // namespace moe_ext

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("dispatch", TORCH_BOX(&moe_ext::dispatch_cpu));
}
