// The forward and the backward of the experts share their arguments, checked, and the rows of
// these.

#pragma once

#include "../activate_rows.h"
#include "products.h"

namespace moe_ext {

// In the place of a result that is not wanted.
inline Tensor none(const Tensor& like) { return empty(like, {0}, like.scalar_type()); }

// The arguments of both directions, checked.
template <typename scalar_t>
struct Experts {
  using T = accumulate_t<scalar_t>;

  const FeedForwardArgs& a;
  Routes<scalar_t> routes;
  std::vector<Range> owned;
  std::vector<int32_t> tokens_of;  // the token of every row
  bool lacks_tokens = false;       // whether a row that is owned has none
  ScalarType dtype;
  bool interleaved;
  int64_t halves;  // of a row of pre-activations: 2 where gates are before what they multiply

  Experts(const char* op, const FeedForwardArgs& args)
      : a(args),
        routes(args.routes),
        owned(owned_rows(Check(op), args.groups, args.routes.num_rows)),
        dtype(args.tokens.scalar_type()),
        interleaved(is_interleaved(args.activation)),
        halves(is_gated(args.activation) && !interleaved ? 2 : 1) {
    routes.check_all(op);
    tokens_of.resize(routes.num_rows);
    const auto top_k = static_cast<int32_t>(routes.top_k);
    for (const auto [begin, end] : owned) {
      for (int64_t r = begin; r < end; ++r) {
        const int32_t source = routes.sources[r];
        lacks_tokens |= source < 0;
        tokens_of[r] = source < 0 ? static_cast<int32_t>(routes.num_tokens) : source / top_k;
      }
    }
  }

  // The tokens; in an inconsistent plan, where a row that is owned has none, with zeros after them.
  Tensor indexed(const Tensor& tokens) const {
    if (!lacks_tokens) return tokens;
    const Tensor more = empty(tokens, {routes.num_tokens + 1, tokens.size(1)}, dtype);
    const Matrix all = matrix_of(more);
    copy(all.row_range(0, routes.num_tokens), matrix_of(tokens));
    zero_rows(all, routes.num_tokens, routes.num_tokens + 1);
    return more;
  }

  // The token of every row, [R, M], of a result of `indexed`.
  Indexed rows_of(const Tensor& tokens) const {
    Indexed rows = matrix_of(tokens);
    rows.rows = routes.num_rows;
    rows.row_index = tokens_of.data();
    return rows;
  }

  Tensor fresh_rows(int64_t width) const {
    return fresh(a.tokens, {routes.num_rows, width}, dtype);
  }

  // The sum of every token's rows [R, H], weighed or not. A row of a route that its expert does not
  // own, in an inconsistent plan, counts as zero.
  Tensor combined(const Tensor& rows, bool weighs) const {
    zero_read_unowned(matrix_of(rows));
    RouteArgs by = a.routes;
    if (!weighs) by.weights = std::nullopt;
    return combine({rows, by, a.hidden});
  }

  // The weight of a row's route; zero for a row without one.
  T weight_of(int64_t row) const {
    return routes.sources[row] < 0 ? T{0} : routes.weights[routes.sources[row]];
  }

 private:
  void zero_read_unowned(const Matrix& rows) const {
    int64_t done = 0;
    const auto zero_until = [&](int64_t end) {
      for (; done < end; ++done) {
        if (routes.sources[done] >= 0) zero_rows(rows, done, done + 1);
      }
    };
    for (const Range& range : owned) {
      zero_until(range.begin);
      done = range.end;
    }
    zero_until(rows.rows);
  }
};

}  // namespace moe_ext
