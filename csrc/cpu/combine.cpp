// Combine: sum every token's rows.
//
//   tokens[t, :] = sum over k of weights[t, k] * rows[slots[t, k], :]    (-1 adds nothing)
//
// A thread takes whole tokens and walks them in tiles that stay in the first-level cache; within a
// tile the K rows are added in the order of k and rounded once.

#include "common.h"

namespace moe_ext {
namespace {

constexpr int64_t kTile = 512;

template <typename scalar_t>
void combine_kernel(const CombineArgs& a, const Tensor& out) {
  using T = accumulate_t<scalar_t>;
  const int64_t K = a.top_k, H = a.hidden, R = a.num_rows;
  const auto* rows = const_data<scalar_t>(a.rows);
  const T* weights = data_or_null<T>(a.weights);
  const int32_t* slots = const_data<int32_t>(a.slots);
  const int32_t* sources = const_data<int32_t>(a.sources);
  scalar_t* tokens = data<scalar_t>(out);
  Fault bad_slot;

  parallel_for(0, a.num_tokens, grain(H * (K + 1) * sizeof(scalar_t)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t route = begin * K; route < end * K; ++route) {
                   has_row(slots, sources, route, R, bad_slot);
                 }
                 if (bad_slot.found()) return;
                 T tile[kTile];
                 for (int64_t t = begin; t < end; ++t) {
                   for (int64_t h0 = 0; h0 < H; h0 += kTile) {
                     const int64_t width = std::min(kTile, H - h0);
                     std::fill_n(tile, width, T{0});
                     for (int64_t k = 0; k < K; ++k) {
                       const int64_t slot = slots[t * K + k];
                       if (slot == -1) continue;
                       const scalar_t* row = rows + slot * H + h0;
                       const T weight = weights ? weights[t * K + k] : T{1};
                       for (int64_t h = 0; h < width; ++h)
                         tile[h] += weight * static_cast<T>(row[h]);
                     }
                     scalar_t* token = tokens + t * H + h0;
                     for (int64_t h = 0; h < width; ++h) token[h] = static_cast<scalar_t>(tile[h]);
                   }
                 }
               });
  check_routes_agree(Check("combine"), bad_slot, slots, K, R);
}

Tensor combine_cpu(const Tensor& rows, const Tensor& slots, const Tensor& sources,
                   const OptionalTensor& weights) {
  const CombineArgs a = combine_args(rows, slots, sources, weights);
  Tensor tokens = fresh(a.rows, {a.num_tokens, a.hidden}, a.rows.scalar_type());
  visit_float(a.rows.scalar_type(), [&](auto zero) { combine_kernel<decltype(zero)>(a, tokens); });
  return tokens;
}

}  // namespace
}  // namespace moe_ext

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("combine", TORCH_BOX(&moe_ext::combine_cpu)); }
