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
Tensor dispatch_kernel(const MoveArgs& a) {
  const Routes<scalar_t> routes(a.routes);
  const int64_t H = a.hidden, K = routes.top_k;
  Tensor out = fresh(a.from, {routes.num_rows, H}, a.from.scalar_type());
  const auto* tokens = const_data<scalar_t>(a.from);  // [T, H]
  auto* rows = data<scalar_t>(out);                   // [R, H]
  Found found;
  const auto run = [&](int64_t begin, int64_t end) {
    const RowWriter<scalar_t> writer(out.numel());
    on_widest([&](auto bytes) __attribute__((always_inline)) {
      for (int64_t route = begin * K; route < end * K; ++route) {
        if (!routes.has_row(route, found)) continue;
        const scalar_t* token = tokens + route / K * H;
        scalar_t* row = rows + routes.slots[route] * H;
        if (routes.weights) {
          writer.template scale<bytes>(token, routes.weights[route], row, H);
        } else {
          writer.copy(token, row, H);
        }
      }
    });
  };
  parallel_for(0, routes.num_tokens, grain(H * (K + 1) * sizeof(scalar_t)), run);
  routes.zero_empty_rows(rows, H, found);
  routes.check("dispatch", found);
  return out;
}

Tensor dispatch_cpu(const MoveArgs& a) {
  return visit_float(a.from.scalar_type(),
                     [&](auto zero) { return dispatch_kernel<decltype(zero)>(a); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("dispatch", boxed<dispatch_args, dispatch_cpu>);
}

}  // namespace moe_ext
