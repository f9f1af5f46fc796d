// Combine: sum every token's rows.
//
//   tokens[t, :] = sum over k of weights[t, k] * rows[slots[t, k], :]    (-1 adds nothing)
//
// A thread takes whole tokens. A piece of each of the K rows after the other is added, in the order
// of k, to a sum that stays in registers until it is rounded once. Meanwhile pieces that come
// later, which lie anywhere, are fetched: long ones, as memory gives most where it is read in a
// row.

#include "rows.h"

namespace moe_ext {
namespace {

template <typename scalar_t>
struct CombineTokens {
  using T = accumulate_t<scalar_t>;
  const scalar_t* rows;  // [R, H]
  Routes<scalar_t> routes;
  scalar_t* tokens;  // [T, H]
  int64_t hidden;

  // A piece of a row is kSums registers of the sum.
  template <int bytes>
  MOE_EXT_INLINE void run(int64_t begin, int64_t end) const {
    using V = Vector<T, bytes>;
    constexpr int64_t kWidth = bytes / sizeof(T), kSums = bytes == 64 ? 16 : 8;
    constexpr int64_t kPiece = kSums * kWidth;
    PiecesAhead<scalar_t> ahead(rows, routes, hidden, kPiece, begin * routes.top_k, routes.top_k);
    for (int64_t t = begin; t < end; ++t) {
      int64_t h = 0;
      for (; h + kPiece <= hidden; h += kPiece) {
        sum<V, kSums>(t, h, [&]() __attribute__((always_inline)) { ahead.fetch(); });
      }
      if (h == hidden) continue;
      for (int64_t k = 0; k < routes.top_k; ++k) ahead.fetch();
      for (; h + 4 * kWidth <= hidden; h += 4 * kWidth) sum<V, 4>(t, h);
      for_registers<bytes, T>(h, hidden, [&](auto& v, int64_t i) __attribute__((always_inline)) {
        sum<std::decay_t<decltype(v)>, 1>(t, i);
      });
    }
  }

 private:
  // Elements h, h + 1, ... of token t, as many as `count` of V hold; `meanwhile` is called for
  // every route.
  template <typename V, int count, typename Meanwhile = Nothing>
  MOE_EXT_INLINE void sum(int64_t t, int64_t h, const Meanwhile& meanwhile = {}) const {
    constexpr int64_t kWidth = sizeof(V) / sizeof(T);
    const int64_t top_k = routes.top_k;
    scalar_t* const token = tokens + t * hidden + h;
    V sums[count]{};
    for (int64_t route = t * top_k; route < (t + 1) * top_k; ++route) {
      meanwhile();
      if (routes.slots[route] == -1) continue;
      const scalar_t* row = rows + routes.slots[route] * hidden + h;
      const T weight = routes.weights ? routes.weights[route] : T{1};
#pragma GCC unroll 16
      for (int i = 0; i < count; ++i) {
        V value;
        load_as(value, row + i * kWidth);
        sums[i] += weight * value;
      }
    }
    for (int i = 0; i < count; ++i) store_as(sums[i], token + i * kWidth);
  }
};

template <typename scalar_t>
Tensor combine_kernel(const MoveArgs& a) {
  const Routes<scalar_t> routes(a.routes);
  const int64_t K = routes.top_k, H = a.hidden;
  Tensor out = fresh(a.from, {routes.num_tokens, H}, a.from.scalar_type());
  const CombineTokens<scalar_t> tokens{const_data<scalar_t>(a.from), routes, data<scalar_t>(out),
                                       H};
  Found found;
  parallel_for(0, routes.num_tokens, grain(H * (K + 1) * sizeof(scalar_t)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t route = begin * K; route < end * K; ++route) {
                   routes.has_row(route, found);
                 }
                 if (!found.bad_slot.found()) on_widest(tokens, begin, end);
               });
  routes.check("combine", found);
  return out;
}

}  // namespace

Tensor combine(const MoveArgs& a) {
  return visit_float(a.from.scalar_type(),
                     [&](auto zero) { return combine_kernel<decltype(zero)>(a); });
}

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("combine", boxed<combine_args, combine>); }

}  // namespace moe_ext
