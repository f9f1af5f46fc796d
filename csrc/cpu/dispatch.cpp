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
  const scalar_t* tokens;                 // [T, H]
  const accumulate_t<scalar_t>* weights;  // [T, K] or null
  const int32_t* slots;                   // [T, K]
  const int32_t* sources;                 // [R]
  scalar_t* rows;                         // [R, H]
  int64_t top_k, hidden, num_rows;

  template <int bytes>
  MOE_EXT_INLINE void run(int64_t begin, int64_t end, const RowWriter<scalar_t>& writer,
                          Fault& bad_slot) const {
    for (int64_t route = begin * top_k; route < end * top_k; ++route) {
      if (!has_row(slots, sources, route, num_rows, bad_slot)) continue;
      const scalar_t* token = tokens + route / top_k * hidden;
      scalar_t* row = rows + slots[route] * hidden;
      if (weights) {
        writer.scale(token, weights[route], row, hidden);
      } else {
        writer.copy(token, row, hidden);
      }
    }
  }
};

template <typename scalar_t>
void dispatch_kernel(const DispatchArgs& a, const Tensor& out) {
  const int64_t K = a.top_k, H = a.hidden, R = a.num_rows;
  const int32_t* slots = const_data<int32_t>(a.slots);
  const int32_t* sources = const_data<int32_t>(a.sources);
  scalar_t* rows = data<scalar_t>(out);
  const DispatchTokens<scalar_t> dispatch_tokens{const_data<scalar_t>(a.tokens),
                                                 data_or_null<accumulate_t<scalar_t>>(a.weights),
                                                 slots,
                                                 sources,
                                                 rows,
                                                 K,
                                                 H,
                                                 R};
  Fault bad_slot, bad_source;
  parallel_for(0, a.num_tokens, grain(H * (K + 1) * sizeof(scalar_t)),
               [&](int64_t begin, int64_t end) {
                 const RowWriter<scalar_t> writer(out);
                 on_widest(dispatch_tokens, begin, end, writer, bad_slot);
               });
  zero_empty_rows(slots, sources, a.num_tokens * K, R, rows, H, bad_source);
  const Check check("dispatch");
  check_routes_agree(check, bad_slot, slots, K, R);
  check_sources_agree(check, bad_source, sources, a.num_tokens * K);
}

Tensor dispatch_cpu(const Tensor& tokens, const Tensor& slots, const Tensor& sources,
                    const OptionalTensor& weights) {
  const DispatchArgs a = dispatch_args(tokens, slots, sources, weights);
  Tensor rows = fresh(a.tokens, {a.num_rows, a.hidden}, a.tokens.scalar_type());
  visit_float(a.tokens.scalar_type(), [&](auto zero) { dispatch_kernel<decltype(zero)>(a, rows); });
  return rows;
}

}  // namespace
}  // namespace moe_ext

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("dispatch", TORCH_BOX(&moe_ext::dispatch_cpu));
}
