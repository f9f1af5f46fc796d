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

// Fills a tile of grad_pre_activation and of active, which have the tile's rows, and its part of
// sums [R, num_sums], which add up to the gradients of the routes' weights. The other operands have
// all rows.
template <typename scalar_t>
void backward_to_pre_activation(const Experts<scalar_t>& at, Worker& worker, const Tile& t,
                                const Indexed& grads, const Matrix& pre_activation,
                                const Matrix& grad_pre_activation, const Matrix& active,
                                accumulate_t<scalar_t>* sums, int64_t num_sums) {
  const FeedForwardArgs& a = at.a;
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
          inner_row(a.activation, row_of<scalar_t>(grad_pre_activation, j), a.width);
      for (int64_t f = t.column_begin; f < t.column_end; f += kSumColumns) {
        const RowBackward<scalar_t> row{row_of<const scalar_t>(grad_active, j) + f - t.column_begin,
                                        inner.from(f), at.weight_of(r), grad_inner.from(f),
                                        row_of<scalar_t>(active, j) + f};
        const int64_t columns = std::min(kSumColumns, t.column_end - f);
        row.inner.ask_next(pre_activation.row_stride, columns);
        row.grad_inner.ask_next(grad_pre_activation.row_stride, columns);
        prefetch(row.active + active.row_stride, columns);
        sums[r * num_sums + f / kSumColumns] = row.template run<bytes>(a.activation, columns);
      }
    }
  });
}

// Fills the last sum of each of a tile's rows, which is the bias's.
template <typename scalar_t>
void multiply_by_bias(const Experts<scalar_t>& at, const Tile& t, const Indexed& grads,
                      accumulate_t<scalar_t>* sums, int64_t num_sums) {
  const auto* bias = const_data<scalar_t>(*at.a.down_bias) + t.expert * at.a.hidden;
  on_widest([&](auto bytes) __attribute__((always_inline)) {
    for (int64_t r = t.row_begin; r < t.row_end; ++r) {
      sums[(r + 1) * num_sums - 1] =
          dot<bytes>(row_of<const scalar_t>(grads, r), bias, at.a.hidden);
    }
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

// The gradient of a bias [E, width]: the sums over each expert's rows, weighed or not.
template <typename scalar_t>
class BiasGrad {
 public:
  BiasGrad(const Experts<scalar_t>& at, bool is_needed, int64_t width, bool weighs)
      : at_(at),
        is_needed_(is_needed),
        weighs_(weighs),
        width_(width),
        memory_(is_needed ? empty(at.a.tokens, {at.a.groups.num_experts, width}, at.dtype)
                          : none(at.a.tokens)) {}

  void add_tiles_to(std::vector<Tile>& tiles, int product) const {
    const std::vector<Range> all(at_.owned.size(), {0, 1});
    if (is_needed_) add_tiles(tiles, all, width_, {1, kColumns}, product);
  }

  // rows: those that the expert owns
  void fill(const Tile& t, const Indexed& rows) const {
    const int64_t begin = at_.owned[t.expert].begin, columns = t.columns();
    // Sums of kRows rows each are added up, so that errors of a million rows stay small.
    T sums[kColumns] = {};
    for (int64_t row = 0; row < rows.rows; row += kRows) {
      T part[kColumns] = {};
      for (int64_t r = row; r < std::min(row + kRows, rows.rows); ++r) {
        if (at_.routes.sources[begin + r] < 0) continue;
        const T factor = weighs_ ? at_.weight_of(begin + r) : T{1};
        const scalar_t* from = row_of<const scalar_t>(rows, r) + t.column_begin;
        for (int64_t c = 0; c < columns; ++c) part[c] += factor * static_cast<T>(from[c]);
      }
      for (int64_t c = 0; c < columns; ++c) sums[c] += part[c];
    }
    scalar_t* to = data<scalar_t>(memory_) + t.expert * width_ + t.column_begin;
    for (int64_t c = 0; c < columns; ++c) to[c] = static_cast<scalar_t>(sums[c]);
  }

  Tensor tensor() const { return memory_; }

 private:
  using T = accumulate_t<scalar_t>;
  static constexpr int64_t kColumns = 256, kRows = 256;

  const Experts<scalar_t>& at_;
  bool is_needed_, weighs_;
  int64_t width_;
  Tensor memory_;
};

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

  // A tile of left^T @ right; both: the rows that the expert owns.
  void fill(Worker& worker, const Tile& t, const Indexed& left, const Indexed& right) const {
    outer_tile(worker, t, memory_, turns_ ? right : left, turns_ ? left : right);
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
  const Indexed all_grads = at.rows_of(indexed_grad), all_tokens = at.rows_of(indexed_tokens);
  const Matrix pre_activation = matrix_of(b.pre_activation);
  const int64_t num_sums = parts(a.width, kSumColumns) + (a.down_bias ? 1 : 0);
  const std::unique_ptr<T[]> sums(new T[at.routes.num_rows * num_sums]);  // owned rows are filled
  const WeightGrad grad_up(a.up, needs_up), grad_down(a.down, needs_down);
  const BiasGrad<scalar_t> grad_up_bias(at, needs_up && a.up_bias, a.inner_width, false);
  const BiasGrad<scalar_t> grad_down_bias(at, needs_down && a.down_bias, a.hidden, true);
  const Tensor rows = needs_tokens ? at.fresh_rows(a.hidden) : none(a.tokens);

  enum Product { kInner, kBiasSums, kUp, kDown, kTokens, kUpBias, kDownBias };
  std::vector<Tile> first, second;
  add_row_tiles(first, at.owned, a.width, TileSize::kColumns, kInner);
  if (a.down_bias) add_row_tiles(first, at.owned, 1, TileSize::kColumns, kBiasSums);
  grad_up.add_tiles_to(second, kUp);
  grad_down.add_tiles_to(second, kDown);
  if (needs_tokens) add_row_tiles(second, at.owned, a.hidden, TileSize::kColumns, kTokens);
  grad_up_bias.add_tiles_to(second, kUpBias);
  grad_down_bias.add_tiles_to(second, kDownBias);
  const Stages stages(at.owned, at.dtype, {std::move(first), std::move(second)});
  const RowsBetween inner(stages, a.inner_width, a.tokens), active(stages, a.width, a.tokens);
  stages.run([&](Worker& worker, const Tile& t) {
    const auto [begin, end] = at.owned[t.expert];
    const Indexed grads = all_grads.row_range(begin, end);
    const Indexed tokens = all_tokens.row_range(begin, end);
    switch (t.product) {
      case kInner:
        return backward_to_pre_activation(at, worker, t, all_grads, pre_activation,
                                          inner.of_tile(worker, t), active.of_tile(worker, t),
                                          sums.get(), num_sums);
      case kBiasSums: return multiply_by_bias(at, t, all_grads, sums.get(), num_sums);
      case kUp: return grad_up.fill(worker, t, inner.of_expert(worker, t.expert), tokens);
      case kDown: return grad_down.fill(worker, t, grads, active.of_expert(worker, t.expert));
      case kTokens:
        return multiply_tile(worker, t, matrix_of(rows), inner.of_tile(worker, t),
                             matrix_of(a.up, t.expert).transposed(), std::nullopt);
      case kUpBias: return grad_up_bias.fill(t, inner.of_expert(worker, t.expert));
      default: return grad_down_bias.fill(t, grads);
    }
  });
  return {needs_tokens ? at.combined(rows, false) : none(a.tokens),
          grad_up.tensor(),
          grad_down.tensor(),
          grad_up_bias.tensor(),
          grad_down_bias.tensor(),
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
