// What the forward and the backward of the experts share: their arguments, checked, the order of
// their products, and the rows between these.

#pragma once

#include <algorithm>
#include <array>
#include <utility>

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

// Products of experts in two stages: tiles of the second one read rows that the first one left of
// the same expert.
//
//   together  threads share the tiles of all experts, one stage after the other
//   alone     a thread takes both stages of an expert, and then those of another one. Rows between
//             them may stay in its caches, and take less memory if a thread has several experts;
//             but in the end threads wait for the last expert. (On one and two threads of Intel's
//             CPUs steps of most layers are 1 to 5 % shorter with 128 rows of an expert and more,
//             and 3 % longer with 64. Other CPUs and more threads were not measured.)
class Stages {
 public:
  Stages(const std::vector<Range>& owned, ScalarType dtype, std::array<std::vector<Tile>, 2> stages)
      : owned_(owned),
        dtype_(dtype),
        stages_(std::move(stages)),
        threads_(torch::stable::get_num_threads()) {
    if (have_many_rows()) {
      sort_experts();
      experts_are_alone_ = are_even();
    }
    if (experts_are_alone_) {
      // 64 rows of any width are whole cache lines: the rows of all threads are aligned alike, on
      // which sums of torch's GEMM may depend.
      constexpr int64_t kAligned = 64;
      rows_of_thread_ = parts(rows(largest_first_[0]), kAligned) * kAligned;
      num_rows_ = threads_ * rows_of_thread_;
    } else if (!owned.empty()) {
      num_rows_ = owned.back().end;
    }
  }

  // body(worker, tile) for all tiles.
  template <typename Body>
  void run(const Body& body) const {
    if (!experts_are_alone_) {
      for (const auto& tiles : stages_) moe_ext::run(tiles, dtype_, body);
      return;
    }
    std::vector<std::vector<Tile>> tiles_of(owned_.size());
    for (const auto& tiles : stages_) {
      for (const Tile& t : tiles) tiles_of[t.expert].push_back(t);
    }
    run_each(static_cast<int64_t>(owned_.size()), threads_, dtype_, [&](Worker& worker, int64_t i) {
      for (const Tile& t : tiles_of[largest_first_[i]]) body(worker, t);
    });
  }

 private:
  friend class RowsBetween;

  int64_t rows(size_t expert) const { return owned_[expert].end - owned_[expert].begin; }

  // Whether experts that have rows have many on average.
  bool have_many_rows() const {
    constexpr int64_t kMany = 128;
    int64_t all = 0, experts = 0;
    for (const auto [begin, end] : owned_) {
      all += end - begin;
      experts += end > begin;
    }
    return experts > 0 && all >= kMany * experts;
  }

  void sort_experts() {
    for (size_t e = 0; e < owned_.size(); ++e) largest_first_.push_back(e);
    std::stable_sort(largest_first_.begin(), largest_first_.end(),
                     [&](size_t a, size_t b) { return rows(a) > rows(b); });
  }

  // Whether no thread would have more than 1/32 above its share of the rows.
  bool are_even() const {
    int64_t all = 0;
    std::vector<int64_t> of_thread(threads_);
    for (const size_t e : largest_first_) {
      all += rows(e);
      *std::min_element(of_thread.begin(), of_thread.end()) += rows(e);
    }
    const int64_t most = *std::max_element(of_thread.begin(), of_thread.end());
    return most * threads_ - all <= all / 32;
  }

  const std::vector<Range>& owned_;
  ScalarType dtype_;
  std::array<std::vector<Tile>, 2> stages_;
  int64_t threads_;
  std::vector<size_t> largest_first_;
  bool experts_are_alone_ = false;
  int64_t num_rows_ = 0, rows_of_thread_ = 0;  // of memory between the stages
};

// Rows [n, width] between two stages: of every expert, or of one for each thread where experts are
// alone.
class RowsBetween {
 public:
  RowsBetween(const Stages& stages, int64_t width, const Tensor& like)
      : stages_(stages), memory_(fresh(like, {stages.num_rows_, width}, like.scalar_type())) {}

  Matrix of_expert(const Worker& worker, int64_t expert) const {
    const auto [begin, end] = stages_.owned_[expert];
    return rows(worker, begin, begin, end);
  }

  Matrix of_tile(const Worker& worker, const Tile& t) const {
    return rows(worker, stages_.owned_[t.expert].begin, t.row_begin, t.row_end);
  }

 private:
  Matrix rows(const Worker& worker, int64_t expert_begin, int64_t begin, int64_t end) const {
    const int64_t place =
        stages_.experts_are_alone_ ? worker.index * stages_.rows_of_thread_ : expert_begin;
    return matrix_of(memory_).row_range(place + begin - expert_begin, place + end - expert_begin);
  }

  const Stages& stages_;
  Tensor memory_;
};

}  // namespace moe_ext
