// A feed-forward network per expert, and its gradient.
//
//   pre_activation[r] = up[e] @ tokens[t] + up_bias[e]        r: the row of token t at expert e
//   active[r]         = fn(pre_activation[r])
//   rows[r]           = down[e] @ active[r] + down_bias[e]
//   out[t]            = sum over k of weights[t, k] * rows[slots[t, k]]
//
// Tokens are gathered a tile at a time, and activated while their tile is in cache. `active` and
// `rows` are whole, since the columns of a product are divided among threads. A weight that is
// applied before is a factor of active[r], and of the bias.
//
// Rows that no route owns are not read. Those of the pre-activation, which is a result, are zero.

#include "activate_rows.h"
#include "products.h"

namespace moe_ext {
namespace {

// Columns of a gate in a tile; as many of its `up` go with them.
constexpr int64_t kGateColumns = TileSize::kColumns / 2;
// A route's weight has its gradient in sums over so many columns, which are added in order.
constexpr int64_t kSumColumns = TileSize::kLeast;

Tensor none(const Tensor& like) { return empty(like, {0}, like.scalar_type()); }

template <typename scalar_t>
scalar_t* row_of(const Matrix& matrix, int64_t row) {
  return reinterpret_cast<scalar_t*>(matrix.row_range(row, row).data);
}

// The arguments of both directions, checked.
template <typename scalar_t>
struct Experts {
  using T = accumulate_t<scalar_t>;

  const FeedForwardArgs& a;
  Routes<scalar_t> routes;
  std::vector<Range> owned;
  ScalarType dtype;
  bool gated;

  Experts(const char* op, const FeedForwardArgs& args)
      : a(args),
        routes(args.routes),
        owned(owned_rows(Check(op), args.groups, args.routes.num_rows)),
        dtype(args.tokens.scalar_type()),
        gated(is_gated(args.activation)) {
    routes.check_all(op);
  }

  Rows rows_of(const Tensor& tokens) const {
    return {matrix_of(tokens), routes.sources, routes.top_k};
  }

  Tensor fresh_rows(int64_t width) const {
    return fresh(a.tokens, {routes.num_rows, width}, dtype);
  }

  // The weight of a row's route; zero for a row without one.
  T weight_of(int64_t row) const {
    return routes.sources[row] < 0 ? T{0} : routes.weights[routes.sources[row]];
  }

  // A row of a route that its expert does not own, in an inconsistent plan, counts as zero.
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

// Activates the rows of a tile; columns are those of `active`.
template <typename scalar_t>
struct ActivateTile {
  const Experts<scalar_t>& at;
  const Tile& tile;
  Matrix gates, ups, active;

  template <int bytes>
  MOE_EXT_INLINE void run() const {
    for (int64_t j = 0; j < tile.rows(); ++j) {
      activate_row<bytes>(
          at.a.activation, row_of<const scalar_t>(gates, j),
          at.gated ? row_of<const scalar_t>(ups, j) : nullptr,
          at.a.score_before_experts ? at.weight_of(tile.row_begin + j) : accumulate_t<scalar_t>{1},
          row_of<scalar_t>(active, j), tile.columns());
    }
  }
};

template <typename scalar_t>
void project_up(const Experts<scalar_t>& at, const Tensor& pre_activation, const Matrix& active) {
  const FeedForwardArgs& a = at.a;
  const bool keeps = pre_activation.dim() == 2;
  const Matrix kept = keeps ? matrix_of(pre_activation) : Matrix{};
  if (keeps) zero_unowned(kept, at.owned);
  const Rows tokens = at.rows_of(a.tokens);
  std::vector<Tile> tiles;
  add_tiles(tiles, at.owned, a.width,
            {TileSize::kRows, at.gated ? kGateColumns : TileSize::kColumns});
  run(tiles, at.dtype, [&](Worker& worker, const Tile& t) {
    const Matrix weight = matrix_of(a.up, t.expert);
    const Matrix rows = tokens.range(t.row_begin, t.row_end, 0, a.hidden, worker.left);
    const int64_t parts = at.gated ? 2 : 1, width = t.columns();
    const Matrix room = keeps ? kept.row_range(t.row_begin, t.row_end)
                              : worker.out.get(at.dtype, t.rows(), parts * width);
    const auto part = [&](int64_t p) {
      const int64_t begin = keeps ? p * a.width + t.column_begin : p * width;
      return room.column_range(begin, begin + width);
    };
    const auto multiply = [&](const Matrix& out, int64_t begin) {
      worker.gemm.rows_by_weight(out, rows, weight.row_range(begin, begin + out.columns),
                                 bias_of(a.up_bias, t.expert, begin, begin + out.columns));
    };
    if (width == a.width) {
      multiply(room, 0);
    } else {
      for (int64_t p = 0; p < parts; ++p) multiply(part(p), p * a.width + t.column_begin);
    }
    on_widest(ActivateTile<scalar_t>{at, t, part(0), part(parts - 1), t.of(active)});
  });
}

template <typename scalar_t>
void project_down(const Experts<scalar_t>& at, const Matrix& active, const Matrix& rows) {
  using T = accumulate_t<scalar_t>;
  const FeedForwardArgs& a = at.a;
  const bool weighs_bias = a.score_before_experts && a.down_bias;
  std::vector<Tile> tiles;
  add_tiles(tiles, at.owned, a.hidden);
  run(tiles, at.dtype, [&](Worker& worker, const Tile& t) {
    multiply_tile(worker, t, rows, Rows{active}, matrix_of(a.down, t.expert),
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
  });
}

std::tuple<Tensor, Tensor> feed_forward_cpu(
    const Tensor& tokens, const Tensor& slots, const Tensor& sources, const Tensor& offsets,
    const Tensor& load, const Tensor& weights, const Tensor& up, const Tensor& down,
    const OptionalTensor& up_bias, const OptionalTensor& down_bias, const std::string& activation,
    bool score_before_experts, std::optional<int64_t> capacity, bool keeps) {
  const FeedForwardArgs a =
      feed_forward_args(tokens, slots, sources, offsets, load, weights, up, down, up_bias,
                        down_bias, activation, score_before_experts, capacity);
  const ScalarType dtype = a.tokens.scalar_type();
  const Tensor out = fresh(a.tokens, {a.routes.num_tokens, a.hidden}, dtype);
  Tensor pre_activation;
  visit_float(dtype, [&](auto zero) {
    const Experts<decltype(zero)> at("feed_forward", a);
    pre_activation = keeps ? at.fresh_rows(a.inner_width) : none(a.tokens);
    const Tensor rows = at.fresh_rows(a.hidden);
    {
      const Tensor active = at.fresh_rows(a.width);
      project_up(at, pre_activation, matrix_of(active));
      project_down(at, matrix_of(active), matrix_of(rows));
    }
    at.zero_read_unowned(matrix_of(rows));
    RouteArgs routes = a.routes;
    if (a.score_before_experts) routes.weights = std::nullopt;
    combine({rows, routes, a.hidden}, out);
  });
  return {out, pre_activation};
}

// ---- The gradient -------------------------------------------------------------------------------

// The gradients of a tile's pre-activations, from that of its activations.
template <typename scalar_t>
struct ActivateTileBackward {
  using T = accumulate_t<scalar_t>;
  const Experts<scalar_t>& at;
  const Tile& tile;
  Matrix grad_active;                  // [rows, columns] of the tile
  Matrix pre_activation;               // [R, G]
  Matrix grad_pre_activation, active;  // [R, G], [R, F]
  T* sums;                             // [R, num_sums]
  int64_t num_sums;

  template <int bytes>
  MOE_EXT_INLINE void run() const {
    const int64_t width = at.a.width;
    for (int64_t j = 0; j < tile.rows(); ++j) {
      const int64_t r = tile.row_begin + j;
      for (int64_t f = tile.column_begin; f < tile.column_end; f += kSumColumns) {
        const auto* gate = row_of<const scalar_t>(pre_activation, r) + f;
        auto* grad_gate = row_of<scalar_t>(grad_pre_activation, r) + f;
        const RowBackward<scalar_t> row{
            row_of<const scalar_t>(grad_active, j) + f - tile.column_begin,
            gate,
            at.gated ? gate + width : nullptr,
            at.weight_of(r),
            grad_gate,
            at.gated ? grad_gate + width : nullptr,
            row_of<scalar_t>(active, r) + f};
        sums[r * num_sums + f / kSumColumns] =
            row.template run<bytes>(at.a.activation, std::min(kSumColumns, tile.column_end - f));
      }
    }
  }
};

// The products of a tile's rows of the output's gradient with the bias; `sums` of one row are
// num_sums apart.
template <typename scalar_t>
struct BiasDots {
  const Tile& tile;
  Matrix grad;  // [rows of the tile, H]
  const scalar_t* bias;
  accumulate_t<scalar_t>* sums;
  int64_t num_sums;

  template <int bytes>
  MOE_EXT_INLINE void run() const {
    for (int64_t j = 0; j < tile.rows(); ++j) {
      sums[(tile.row_begin + j) * num_sums] =
          dot<bytes>(row_of<const scalar_t>(grad, j), bias, grad.columns);
    }
  }
};

// Fills [R, G] and [R, F], and sums of [R, num_sums] numbers that add up to the gradients of the
// routes' weights; the last is that of the bias.
template <typename scalar_t>
void backward_to_pre_activation(const Experts<scalar_t>& at, const Rows& grads,
                                const Matrix& pre_activation, const Matrix& grad_pre_activation,
                                const Matrix& active, accumulate_t<scalar_t>* sums,
                                int64_t num_sums) {
  const FeedForwardArgs& a = at.a;
  std::vector<Tile> tiles;
  add_tiles(tiles, at.owned, a.width);
  run(tiles, at.dtype, [&](Worker& worker, const Tile& t) {
    const Matrix grad = grads.range(t.row_begin, t.row_end, 0, a.hidden, worker.left);
    const Matrix grad_active = worker.out.get(at.dtype, t.rows(), t.columns());
    worker.gemm.rows_by_weight(
        grad_active, grad,
        matrix_of(a.down, t.expert).transposed().row_range(t.column_begin, t.column_end),
        std::nullopt);
    on_widest(ActivateTileBackward<scalar_t>{at, t, grad_active, pre_activation,
                                             grad_pre_activation, active, sums, num_sums});
  });
}

// Fills the last sum of every row.
template <typename scalar_t>
void multiply_by_bias(const Experts<scalar_t>& at, const Rows& grads, accumulate_t<scalar_t>* sums,
                      int64_t num_sums) {
  const FeedForwardArgs& a = at.a;
  std::vector<Tile> tiles;
  add_tiles(tiles, at.owned, 1);
  run(tiles, at.dtype, [&](Worker& worker, const Tile& t) {
    const Matrix grad = grads.range(t.row_begin, t.row_end, 0, a.hidden, worker.left);
    const auto* bias = const_data<scalar_t>(*a.down_bias) + t.expert * a.hidden;
    on_widest(BiasDots<scalar_t>{t, grad, bias, sums + num_sums - 1, num_sums});
  });
}

// The gradients of the routes' weights, [T, K].
template <typename scalar_t>
Tensor add_sums(const Experts<scalar_t>& at, const accumulate_t<scalar_t>* sums, int64_t num_sums) {
  using T = accumulate_t<scalar_t>;
  const Tensor out = empty(at.a.tokens, {at.routes.num_tokens, at.routes.top_k},
                           at.a.routes.weights->scalar_type());
  T* grad_weights = data<T>(out);
  std::fill_n(grad_weights, at.routes.size(), T{0});
  for (const auto [begin, end] : at.owned) {
    for (int64_t r = begin; r < end; ++r) {
      if (at.routes.sources[r] < 0) continue;
      T sum = 0;
      for (int64_t i = 0; i < num_sums; ++i) sum += sums[r * num_sums + i];
      grad_weights[at.routes.sources[r]] = sum;
    }
  }
  return out;
}

// The sums over each expert's rows of weight(r) * row(r), [E, width].
template <typename scalar_t, typename Weight, typename Row>
Tensor sum_rows(const Experts<scalar_t>& at, int64_t width, const Weight& weight, const Row& row) {
  using T = accumulate_t<scalar_t>;
  constexpr int64_t kColumns = 256;
  const int64_t E = at.a.groups.num_experts, parts = (width + kColumns - 1) / kColumns;
  const Tensor out = empty(at.a.tokens, {E, width}, at.dtype);
  scalar_t* to = data<scalar_t>(out);
  parallel_for(0, E * parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t e = i / parts, begin = i % parts * kColumns;
      const int64_t columns = std::min(kColumns, width - begin);
      T sums[kColumns] = {};
      for (int64_t r = at.owned[e].begin; r < at.owned[e].end; ++r) {
        if (at.routes.sources[r] < 0) continue;
        const T factor = weight(r);
        const scalar_t* from = row(r) + begin;
        for (int64_t c = 0; c < columns; ++c) sums[c] += factor * static_cast<T>(from[c]);
      }
      for (int64_t c = 0; c < columns; ++c) {
        to[e * width + begin + c] = static_cast<scalar_t>(sums[c]);
      }
    }
  });
  return out;
}

// Memory for the gradient of a weight, laid out as it is.
Tensor fresh_like(const Tensor& weight) {
  const bool is_transposed = weight.stride(1) < weight.stride(2);
  const int64_t E = weight.size(0), N = weight.size(1), M = weight.size(2);
  if (!is_transposed) return fresh(weight, {E, N, M}, weight.scalar_type());
  return torch::stable::transpose(fresh(weight, {E, M, N}, weight.scalar_type()), 1, 2);
}

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Needs {
  bool tokens, up, down;
};

template <typename scalar_t>
SixTensors feed_forward_backward(const FeedForwardBackwardArgs& b, const Needs& needs) {
  using T = accumulate_t<scalar_t>;
  const FeedForwardArgs& a = b.forward;
  const Experts<scalar_t> at("feed_forward_backward", a);
  const Rows grads = at.rows_of(b.grad), tokens = at.rows_of(a.tokens);
  const Tensor d_pre_activation = at.fresh_rows(a.inner_width), active = at.fresh_rows(a.width);
  const int64_t num_sums = (a.width + kSumColumns - 1) / kSumColumns + (a.down_bias ? 1 : 0);
  std::vector<T> sums(at.routes.num_rows * num_sums);
  backward_to_pre_activation(at, grads, matrix_of(b.pre_activation), matrix_of(d_pre_activation),
                             matrix_of(active), sums.data(), num_sums);
  if (a.down_bias) multiply_by_bias(at, grads, sums.data(), num_sums);

  enum Product { kUp, kDown, kTokens };
  std::vector<Tile> tiles;
  const int64_t E = a.groups.num_experts;
  const Tensor grad_up = needs.up ? fresh_like(a.up) : none(a.tokens);
  const Tensor grad_down = needs.down ? fresh_like(a.down) : none(a.tokens);
  const Tensor rows = needs.tokens ? at.fresh_rows(a.hidden) : none(a.tokens);
  const bool turns_up = needs.up && grad_up.stride(1) < grad_up.stride(2);
  const bool turns_down = needs.down && grad_down.stride(1) < grad_down.stride(2);
  if (needs.up) {
    add_outer_tiles(tiles, E, turns_up ? a.hidden : a.inner_width,
                    turns_up ? a.inner_width : a.hidden, kUp);
  }
  if (needs.down) {
    add_outer_tiles(tiles, E, turns_down ? a.width : a.hidden, turns_down ? a.hidden : a.width,
                    kDown);
  }
  if (needs.tokens)
    add_tiles(tiles, at.owned, a.hidden, {TileSize::kRows, TileSize::kColumns}, kTokens);
  const Rows d_rows{matrix_of(d_pre_activation)}, active_rows{matrix_of(active)};
  const auto outer = [&](Worker& worker, const Tile& t, const Tensor& grad, bool turns,
                         const Rows& left, const Rows& right) {
    const Matrix out = matrix_of(grad, t.expert);
    outer_tile(worker, t, at.owned[t.expert], turns ? out.transposed() : out, turns ? right : left,
               turns ? left : right);
  };
  run(tiles, at.dtype, [&](Worker& worker, const Tile& t) {
    if (t.product == kUp) return outer(worker, t, grad_up, turns_up, d_rows, tokens);
    if (t.product == kDown) return outer(worker, t, grad_down, turns_down, grads, active_rows);
    multiply_tile(worker, t, matrix_of(rows), d_rows, matrix_of(a.up, t.expert).transposed(),
                  std::nullopt);
  });

  Tensor grad_tokens = none(a.tokens), grad_up_bias = none(a.tokens),
         grad_down_bias = none(a.tokens);
  if (needs.tokens) {
    at.zero_read_unowned(matrix_of(rows));
    grad_tokens = fresh(a.tokens, {a.routes.num_tokens, a.hidden}, at.dtype);
    RouteArgs routes = a.routes;
    routes.weights = std::nullopt;
    combine({rows, routes, a.hidden}, grad_tokens);
  }
  if (needs.up && a.up_bias) {
    grad_up_bias = sum_rows(
        at, a.inner_width, [](int64_t) { return T{1}; },
        [&](int64_t r) { return row_of<const scalar_t>(d_rows.matrix, r); });
  }
  if (needs.down && a.down_bias) {
    grad_down_bias = sum_rows(
        at, a.hidden, [&](int64_t r) { return at.weight_of(r); },
        [&](int64_t r) {
          return row_of<const scalar_t>(grads.matrix, at.routes.sources[r] / at.routes.top_k);
        });
  }
  return {grad_tokens,  grad_up,        grad_down,
          grad_up_bias, grad_down_bias, add_sums(at, sums.data(), num_sums)};
}

SixTensors feed_forward_backward_cpu(const Tensor& grad, const Tensor& tokens,
                                     const Tensor& pre_activation, const Tensor& slots,
                                     const Tensor& sources, const Tensor& offsets,
                                     const Tensor& load, const Tensor& weights, const Tensor& up,
                                     const Tensor& down, const OptionalTensor& up_bias,
                                     const OptionalTensor& down_bias, const std::string& activation,
                                     bool score_before_experts, std::optional<int64_t> capacity,
                                     bool needs_tokens, bool needs_up, bool needs_down) {
  const FeedForwardBackwardArgs b = feed_forward_backward_args(
      grad, tokens, pre_activation, slots, sources, offsets, load, weights, up, down, up_bias,
      down_bias, activation, score_before_experts, capacity);
  const Needs needs{needs_tokens, needs_up, needs_down};
  SixTensors results;
  visit_float(b.forward.tokens.scalar_type(),
              [&](auto zero) { results = feed_forward_backward<decltype(zero)>(b, needs); });
  return results;
}

}  // namespace
}  // namespace moe_ext

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("feed_forward", TORCH_BOX(&moe_ext::feed_forward_cpu));
  m.impl("feed_forward_backward", TORCH_BOX(&moe_ext::feed_forward_backward_cpu));
}
