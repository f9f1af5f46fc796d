// Grouped matrix products: one GEMM per expert on the rows that routes own.
//
//   grouped_mm:     out[r, :]    = weights[e] @ rows[r, :] + bias[e]       r in the rows of e
//   grouped_outer:  out[e, :, :] = sum over those r of left[r, :] ⊗ right[r, :]
//
// The rows of e are offsets[e] and the min(load[e], offsets[e+1] - offsets[e]) after it. All other
// rows are never read and come out zero.
//
// Every GEMM is cut into tiles, and a thread takes whole tiles: many small experts keep all threads
// busy, and so does one that has all rows.

#include <exception>
#include <mutex>
#include <vector>

#include "gemm.h"

namespace moe_ext {
namespace {

constexpr int64_t kTileRows = 256, kTileColumns = 1024;
// For few rows: no GEMM divides their product among threads.
constexpr int64_t kFewTileColumns = 256;
constexpr int64_t kOuterTileRows = 512, kOuterTileColumns = 1024;

// A part of one expert's product: rows and columns of what comes out.
struct Tile {
  int64_t expert, row_begin, row_end, column_begin, column_end;
};

void add_tiles(std::vector<Tile>& tiles, int64_t expert, int64_t row_begin, int64_t row_end,
               int64_t tile_rows, int64_t num_columns, int64_t tile_columns) {
  for (int64_t column = 0; column < num_columns; column += tile_columns) {
    for (int64_t row = row_begin; row < row_end; row += tile_rows) {
      tiles.push_back({expert, row, std::min(row + tile_rows, row_end), column,
                       std::min(column + tile_columns, num_columns)});
    }
  }
}

// body(gemm, tile) for all. A thread that is done takes the next one: products of few rows are
// slower than their size says. What a body throws is thrown again here.
template <typename Body>
void run(const std::vector<Tile>& tiles, ScalarType dtype, const Body& body) {
  // One tile alone is left to the threads of torch's GEMM.
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tiles.size());
  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;
  parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    try {
      Gemm gemm(dtype);
      for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tiles.size();) {
        body(gemm, tiles[i]);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!failure) failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

// The rows that routes own, of every expert.
struct Range {
  int64_t begin, end;
};

std::vector<Range> owned_rows(const Check& check, const Groups& groups, int64_t num_rows) {
  const int32_t* offsets = const_data<int32_t>(groups.offsets);
  const int32_t* load = const_data<int32_t>(groups.load);
  int64_t previous = 0;
  for (int64_t e = 0; e <= groups.num_experts; ++e) {
    if (offsets[e] < previous || offsets[e] > num_rows || (e == 0 && offsets[e] != 0)) {
      check.fail("offsets must rise from 0 to at most R = ", num_rows, ", got ", offsets[e],
                 " at [", e, "]");
    }
    previous = offsets[e];
  }
  std::vector<Range> ranges;
  for (int64_t e = 0; e < groups.num_experts; ++e) {
    if (load[e] < 0) check.fail("load must not be negative, got ", load[e], " at [", e, "]");
    const int64_t begin = offsets[e], room = offsets[e + 1] - offsets[e];
    ranges.push_back({begin, begin + std::min<int64_t>(load[e], room)});
  }
  return ranges;
}

void zero_rows(const Matrix& matrix, int64_t begin, int64_t end) {
  const Matrix rows = matrix.row_range(begin, end);
  std::memset(rows.data, 0, rows.rows * rows.columns * rows.width());
}

void zero_unowned(const Matrix& out, const std::vector<Range>& owned) {
  int64_t done = 0;
  for (const Range& range : owned) {
    zero_rows(out, done, range.begin);
    done = range.end;
  }
  zero_rows(out, done, out.rows);
}

Tensor grouped_mm_cpu(const Tensor& rows, const Tensor& weights, const OptionalTensor& bias,
                      const Tensor& offsets, const Tensor& load, std::optional<int64_t> capacity) {
  const GroupedMMArgs a = grouped_mm_args(rows, weights, bias, offsets, load, capacity);
  const std::vector<Range> owned = owned_rows(Check("grouped_mm"), a.groups, a.num_rows);
  const Tensor out = fresh(a.rows, {a.num_rows, a.out_width}, a.rows.scalar_type());
  const Matrix all_out = matrix_of(out), all_rows = matrix_of(a.rows);
  zero_unowned(all_out, owned);

  std::vector<Tile> tiles;
  for (int64_t e = 0; e < a.groups.num_experts; ++e) {
    const auto [begin, end] = owned[e];
    const bool few = Gemm::takes_few(all_rows.row_range(begin, end));
    add_tiles(tiles, e, begin, end, kTileRows, a.out_width, few ? kFewTileColumns : kTileColumns);
  }
  run(tiles, a.rows.scalar_type(), [&](Gemm& gemm, const Tile& t) {
    std::optional<Matrix> first;
    if (a.bias) {
      first = matrix_of(*a.bias)
                  .row_range(t.expert, t.expert + 1)
                  .column_range(t.column_begin, t.column_end);
    }
    gemm.rows_by_weight(
        all_out.row_range(t.row_begin, t.row_end).column_range(t.column_begin, t.column_end),
        all_rows.row_range(t.row_begin, t.row_end),
        matrix_of(a.weights, t.expert).row_range(t.column_begin, t.column_end), first);
  });
  return out;
}

Tensor grouped_outer_cpu(const Tensor& left, const Tensor& right, const Tensor& offsets,
                         const Tensor& load, std::optional<int64_t> capacity) {
  const GroupedOuterArgs a = grouped_outer_args(left, right, offsets, load, capacity);
  const std::vector<Range> owned = owned_rows(Check("grouped_outer"), a.groups, a.num_rows);
  const Tensor out =
      fresh(a.left, {a.groups.num_experts, a.left_width, a.right_width}, a.left.scalar_type());

  std::vector<Tile> tiles;
  for (int64_t e = 0; e < a.groups.num_experts; ++e) {
    add_tiles(tiles, e, 0, a.left_width, kOuterTileRows, a.right_width, kOuterTileColumns);
  }
  const Matrix lefts = matrix_of(a.left), rights = matrix_of(a.right);
  run(tiles, a.left.scalar_type(), [&](Gemm& gemm, const Tile& t) {
    const auto [begin, end] = owned[t.expert];
    const Matrix rows = matrix_of(out, t.expert).row_range(t.row_begin, t.row_end);
    if (begin == end) {
      if (t.column_begin == 0) zero_rows(rows, 0, rows.rows);
      return;
    }
    gemm.outer(rows.column_range(t.column_begin, t.column_end),
               lefts.row_range(begin, end).column_range(t.row_begin, t.row_end),
               rights.row_range(begin, end).column_range(t.column_begin, t.column_end));
  });
  return out;
}

bool widens_cpu(const Tensor& rows) {
  const ScalarType dtype = rows.scalar_type();
  return (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half) &&
         !multiplies_natively(dtype);
}

}  // namespace
}  // namespace moe_ext

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("grouped_mm", TORCH_BOX(&moe_ext::grouped_mm_cpu));
  m.impl("grouped_outer", TORCH_BOX(&moe_ext::grouped_outer_cpu));
  m.impl("widens", TORCH_BOX(&moe_ext::widens_cpu));
}
