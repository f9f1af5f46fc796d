// The gradient of feed_forward.cpp, for the row of token t at expert e; w is its route's weight.
//
//   d active         = down[e]^T @ grad[t]
//   d pre_activation = w * fn'(pre_activation) * d active
//   d weights[t, k]  = <d active, active> + <grad[t], down_bias[e]>
//   d up[e]          = sum of d pre_activation ⊗ tokens[t]
//   d down[e]        = sum of grad[t] ⊗ (w * active)
//   d tokens[t]      = sum over k of up[e]^T @ d pre_activation
//
// An index finds the rows of grad and of tokens, as in the forward.

#include <memory>
#include <tuple>

#include "feed_forward.h"

namespace moe_ext {
namespace {

// A route's weight has its gradient in sums over so many columns, which are added in order.
constexpr int64_t kSumColumns = TileSize::kLeast;

// Fills [R, G] and [R, F], and sums of [R, num_sums] numbers that add up to the gradients of the
// routes' weights; the last is that of the bias.
template <typename scalar_t>
void backward_to_pre_activation(const Experts<scalar_t>& at, const Indexed& grads,
                                const Matrix& pre_activation, const Matrix& grad_pre_activation,
                                const Matrix& active, accumulate_t<scalar_t>* sums,
                                int64_t num_sums) {
  const FeedForwardArgs& a = at.a;
  std::vector<Tile> tiles;
  add_row_tiles(tiles, at.owned, a.width);
  run(tiles, at.dtype, [&](Worker& worker, const Tile& t) {
    const Matrix grad_active = worker.room(at.dtype, t.rows(), t.columns());
    worker.gemm.rows_by_weight(
        grad_active, grads.row_range(t.row_begin, t.row_end),
        matrix_of(a.down, t.expert).transposed().row_range(t.column_begin, t.column_end),
        std::nullopt);
    on_widest([&](auto bytes) __attribute__((always_inline)) {
      for (int64_t j = 0; j < t.rows(); ++j) {
        const int64_t r = t.row_begin + j;
        const auto inner =
            inner_row(a.activation, row_of<const scalar_t>(pre_activation, r), a.width);
        const auto grad_inner =
            inner_row(a.activation, row_of<scalar_t>(grad_pre_activation, r), a.width);
        for (int64_t f = t.column_begin; f < t.column_end; f += kSumColumns) {
          const RowBackward<scalar_t> row{
              row_of<const scalar_t>(grad_active, j) + f - t.column_begin, inner.from(f),
              at.weight_of(r), grad_inner.from(f), row_of<scalar_t>(active, r) + f};
          const int64_t columns = std::min(kSumColumns, t.column_end - f);
          row.inner.ask_next(pre_activation.row_stride, columns);
          row.grad_inner.ask_next(grad_pre_activation.row_stride, columns);
          prefetch(row.active + active.row_stride, columns);
          sums[r * num_sums + f / kSumColumns] = row.template run<bytes>(a.activation, columns);
        }
      }
    });
  });
}

// Fills the last sum of every row.
template <typename scalar_t>
void multiply_by_bias(const Experts<scalar_t>& at, const Indexed& grads,
                      accumulate_t<scalar_t>* sums, int64_t num_sums) {
  const FeedForwardArgs& a = at.a;
  std::vector<Tile> tiles;
  add_row_tiles(tiles, at.owned, 1);
  run(tiles, at.dtype, [&](Worker&, const Tile& t) {
    const auto* bias = const_data<scalar_t>(*a.down_bias) + t.expert * a.hidden;
    on_widest([&](auto bytes) __attribute__((always_inline)) {
      for (int64_t r = t.row_begin; r < t.row_end; ++r) {
        sums[(r + 1) * num_sums - 1] = dot<bytes>(row_of<const scalar_t>(grads, r), bias, a.hidden);
      }
    });
  });
}

// The gradients of the routes' weights, [T, K].
template <typename scalar_t>
Tensor add_sums(const Experts<scalar_t>& at, const accumulate_t<scalar_t>* sums, int64_t num_sums) {
  using T = accumulate_t<scalar_t>;
  const Tensor out = empty_route_sums(at.a.tokens, at.a.routes);
  T* grad_weights = data<T>(out);
  std::fill_n(grad_weights, at.routes.size(), T{0});
  const auto E = static_cast<int64_t>(at.owned.size());
  const int64_t bytes = at.routes.num_rows * num_sums * static_cast<int64_t>(sizeof(T));
  parallel_for(0, E, grain(bytes / std::max<int64_t>(E, 1)), [&](int64_t first, int64_t last) {
    for (int64_t e = first; e < last; ++e) {
      for (int64_t r = at.owned[e].begin; r < at.owned[e].end; ++r) {
        if (at.routes.sources[r] < 0) continue;
        T sum = 0;
        for (int64_t i = 0; i < num_sums; ++i) sum += sums[r * num_sums + i];
        grad_weights[at.routes.sources[r]] = sum;
      }
    }
  });
  return out;
}

// The sums over each expert's rows, weighed or not: the gradient of a bias, [E, width].
template <typename scalar_t>
Tensor sum_rows(const Experts<scalar_t>& at, const Indexed& rows, bool weighs) {
  using T = accumulate_t<scalar_t>;
  constexpr int64_t kColumns = 256, kRows = 256;
  const int64_t E = at.a.groups.num_experts, width = rows.columns;
  const int64_t count = parts(width, kColumns);
  const Tensor out = empty(at.a.tokens, {E, width}, at.dtype);
  scalar_t* to = data<scalar_t>(out);
  parallel_for(0, E * count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t e = i / count, begin = i % count * kColumns;
      const int64_t columns = std::min(kColumns, width - begin);
      // Sums of kRows rows each are added up, so that errors of a million rows stay small.
      T sums[kColumns] = {};
      for (int64_t row = at.owned[e].begin; row < at.owned[e].end; row += kRows) {
        T part[kColumns] = {};
        for (int64_t r = row; r < std::min(row + kRows, at.owned[e].end); ++r) {
          if (at.routes.sources[r] < 0) continue;
          const T factor = weighs ? at.weight_of(r) : T{1};
          const scalar_t* from = row_of<const scalar_t>(rows, r) + begin;
          for (int64_t c = 0; c < columns; ++c) part[c] += factor * static_cast<T>(from[c]);
        }
        for (int64_t c = 0; c < columns; ++c) sums[c] += part[c];
      }
      for (int64_t c = 0; c < columns; ++c) {
        to[e * width + begin + c] = static_cast<scalar_t>(sums[c]);
      }
    }
  });
  return out;
}

// The gradient of a weight [E, N, M], laid out as it is: of [E, M, N] where that is transposed.
class WeightGrad {
 public:
  WeightGrad(const Tensor& weight, bool is_needed)
      : turns_(weight.stride(1) < weight.stride(2)), is_needed_(is_needed) {
    const int64_t E = weight.size(0), N = weight.size(1), M = weight.size(2);
    rows_ = turns_ ? M : N;
    columns_ = turns_ ? N : M;
    memory_ = is_needed ? fresh(weight, {E, rows_, columns_}, weight.scalar_type()) : none(weight);
  }

  void add_tiles_to(std::vector<Tile>& tiles, int product) const {
    if (is_needed_) add_outer_tiles(tiles, memory_.size(0), rows_, columns_, product);
  }

  // A tile of left^T @ right over the owned rows of its expert.
  void fill(Worker& worker, const Tile& t, const Range& owned, const Indexed& left,
            const Indexed& right) const {
    outer_tile(worker, t, owned, memory_, turns_ ? right : left, turns_ ? left : right);
  }

  Tensor tensor() const {
    return is_needed_ && turns_ ? torch::stable::transpose(memory_, 1, 2) : memory_;
  }

 private:
  bool turns_, is_needed_;
  int64_t rows_, columns_;
  Tensor memory_;
};

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename scalar_t>
SixTensors feed_forward_backward(const FeedForwardBackwardArgs& b, bool needs_tokens, bool needs_up,
                                 bool needs_down) {
  using T = accumulate_t<scalar_t>;
  const FeedForwardArgs& a = b.forward;
  const Experts<scalar_t> at("feed_forward_backward", a);
  const Tensor indexed_grad = at.indexed(b.grad), indexed_tokens = at.indexed(a.tokens);
  const Indexed grads = at.rows_of(indexed_grad), tokens = at.rows_of(indexed_tokens);
  const Tensor inner = at.fresh_rows(a.inner_width), active = at.fresh_rows(a.width);
  const int64_t num_sums = parts(a.width, kSumColumns) + (a.down_bias ? 1 : 0);
  const std::unique_ptr<T[]> sums(new T[at.routes.num_rows * num_sums]);  // owned rows are filled
  const Matrix inner_rows = matrix_of(inner), active_rows = matrix_of(active);
  backward_to_pre_activation(at, grads, matrix_of(b.pre_activation), inner_rows, active_rows,
                             sums.get(), num_sums);
  if (a.down_bias) multiply_by_bias(at, grads, sums.get(), num_sums);

  enum Product { kUp, kDown, kTokens };
  std::vector<Tile> tiles;
  const WeightGrad grad_up(a.up, needs_up), grad_down(a.down, needs_down);
  grad_up.add_tiles_to(tiles, kUp);
  grad_down.add_tiles_to(tiles, kDown);
  const Tensor rows = needs_tokens ? at.fresh_rows(a.hidden) : none(a.tokens);
  if (needs_tokens) add_row_tiles(tiles, at.owned, a.hidden, TileSize::kColumns, kTokens);
  run(tiles, at.dtype, [&](Worker& worker, const Tile& t) {
    const Range& owned = at.owned[t.expert];
    if (t.product == kUp) return grad_up.fill(worker, t, owned, inner_rows, tokens);
    if (t.product == kDown) return grad_down.fill(worker, t, owned, grads, active_rows);
    multiply_tile(worker, t, matrix_of(rows), inner_rows, matrix_of(a.up, t.expert).transposed(),
                  std::nullopt);
  });

  const bool sums_up = needs_up && a.up_bias, sums_down = needs_down && a.down_bias;
  return {needs_tokens ? at.combined(rows, false) : none(a.tokens),
          grad_up.tensor(),
          grad_down.tensor(),
          sums_up ? sum_rows(at, inner_rows, false) : none(a.tokens),
          sums_down ? sum_rows(at, grads, true) : none(a.tokens),
          add_sums(at, sums.get(), num_sums)};
}

SixTensors feed_forward_backward_cpu(const FeedForwardBackwardArgs& b, bool needs_tokens,
                                     bool needs_up, bool needs_down) {
  return visit_float(b.forward.tokens.scalar_type(), [&](auto zero) {
    return feed_forward_backward<decltype(zero)>(b, needs_tokens, needs_up, needs_down);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("feed_forward_backward", boxed<feed_forward_backward_args, feed_forward_backward_cpu>);
}

}  // namespace moe_ext
