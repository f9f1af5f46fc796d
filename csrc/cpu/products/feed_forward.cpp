// A feed-forward network per expert.
//
//   pre_activation[r] = up[e] @ tokens[t] + up_bias[e]        r: the row of token t at expert e
//   active[r]         = fn(pre_activation[r])
//   rows[r]           = down[e] @ active[r] + down_bias[e]
//   out[t]            = sum over k of weights[t, k] * rows[slots[t, k]]
//
// An index finds the tokens when they are multiplied, and a tile is activated while it is in cache.
// `rows` are whole, since a token adds up rows of several experts. `active` is whole where threads
// share the columns of an expert; elsewhere a thread has that of one expert. A weight that is
// applied before is a factor of active[r], and of the bias.
//
// Rows that no route owns are not read. Those of the pre-activation, which is a result, are zero.

#include "feed_forward.h"

namespace moe_ext {
namespace {

// Columns of a gate in a tile; as many of its `up` go with them.
constexpr int64_t kGateColumns = TileSize::kColumns / 2;

// Fills a tile of active, which has the tile's rows, and of pre_activation, which has all rows, if
// that is kept.
template <typename scalar_t>
void project_up(const Experts<scalar_t>& at, Worker& worker, const Tile& t, const Indexed& tokens,
                const std::optional<Matrix>& pre_activation, const Matrix& active) {
  using T = accumulate_t<scalar_t>;
  const FeedForwardArgs& a = at.a;
  const Matrix weight = matrix_of(a.up, t.expert);
  const Indexed rows = tokens.row_range(t.row_begin, t.row_end);
  const bool keeps = pre_activation.has_value();
  const int64_t step = at.interleaved ? 2 : 1;
  const int64_t first = t.column_begin * step, width = t.columns() * step;
  const Matrix room = keeps ? pre_activation->row_range(t.row_begin, t.row_end)
                            : worker.room(at.dtype, t.rows(), at.halves * width);
  const auto half = [&](int64_t h) {
    const int64_t begin = keeps ? h * a.width + first : h * width;
    return room.column_range(begin, begin + width);
  };
  const auto multiply = [&](const Matrix& out, int64_t begin) {
    worker.gemm.rows_by_weight(out, rows, weight.row_range(begin, begin + out.columns),
                               bias_of(a.up_bias, t.expert, begin, begin + out.columns));
  };
  if (t.columns() == a.width) {
    multiply(room, 0);
  } else {
    for (int64_t h = 0; h < at.halves; ++h) multiply(half(h), h * a.width + first);
  }
  const Matrix inner = half(0), result = active.column_range(t.column_begin, t.column_end);
  const int64_t inner_columns = keeps ? a.width : t.columns();  // of a gate in a row of inner
  on_widest([&](auto bytes) __attribute__((always_inline)) {
    for (int64_t j = 0; j < t.rows(); ++j) {
      const auto row = inner_row(a.activation, row_of<const scalar_t>(inner, j), inner_columns);
      const T scale = a.score_before_experts ? at.weight_of(t.row_begin + j) : T{1};
      activate_row<bytes>(a.activation, row, scale, row_of<scalar_t>(result, j), t.columns());
    }
  });
}

// Fills a tile of rows, which are all; active has the tile's rows.
template <typename scalar_t>
void project_down(const Experts<scalar_t>& at, Worker& worker, const Tile& t, const Matrix& active,
                  const Matrix& rows) {
  using T = accumulate_t<scalar_t>;
  const FeedForwardArgs& a = at.a;
  const bool weighs_bias = a.score_before_experts && a.down_bias;
  multiply_tile(worker, t, rows, active, matrix_of(a.down, t.expert),
                weighs_bias ? std::nullopt : a.down_bias);
  if (!weighs_bias) return;
  const auto* bias = const_data<scalar_t>(*a.down_bias) + t.expert * a.hidden;
  for (int64_t r = t.row_begin; r < t.row_end; ++r) {
    const T weight = at.weight_of(r);
    auto* row = row_of<scalar_t>(rows, r);
    for (int64_t h = t.column_begin; h < t.column_end; ++h) {
      row[h] = static_cast<scalar_t>(static_cast<T>(row[h]) + weight * static_cast<T>(bias[h]));
    }
  }
}

template <typename scalar_t>
std::tuple<Tensor, Tensor> feed_forward(const FeedForwardArgs& a, bool keeps) {
  const Experts<scalar_t> at("feed_forward", a);
  const Tensor pre_activation = keeps ? at.fresh_rows(a.inner_width) : none(a.tokens);
  const Tensor rows = at.fresh_rows(a.hidden);
  std::optional<Matrix> kept;
  if (keeps) {
    kept = matrix_of(pre_activation);
    zero_unowned(*kept, at.owned);
  }
  const Tensor indexed = at.indexed(a.tokens);
  const Indexed tokens = at.rows_of(indexed);

  enum Product { kUp, kDown };
  std::vector<Tile> up, down;
  add_row_tiles(up, at.owned, a.width, is_gated(a.activation) ? kGateColumns : TileSize::kColumns,
                kUp);
  add_row_tiles(down, at.owned, a.hidden, TileSize::kColumns, kDown);
  const Stages stages(at.owned, at.dtype, {std::move(up), std::move(down)});
  {
    const RowsBetween active(stages, a.width, a.tokens);
    stages.run([&](Worker& worker, const Tile& t) {
      const Matrix active_rows = active.of_tile(worker, t);
      if (t.product == kUp) return project_up(at, worker, t, tokens, kept, active_rows);
      project_down(at, worker, t, active_rows, matrix_of(rows));
    });
  }
  return {at.combined(rows, !a.score_before_experts), pre_activation};
}

std::tuple<Tensor, Tensor> feed_forward_cpu(const FeedForwardArgs& a, bool keeps) {
  return visit_float(a.tokens.scalar_type(), [&](auto zero) -> std::tuple<Tensor, Tensor> {
    return feed_forward<decltype(zero)>(a, keeps);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("feed_forward", boxed<feed_forward_args, feed_forward_cpu>);
}

}  // namespace moe_ext
