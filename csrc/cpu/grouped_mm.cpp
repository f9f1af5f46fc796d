// Grouped matrix products: one GEMM per expert on the rows that routes own.
//
//   grouped_mm:     out[r, :]    = weights[e] @ rows[r, :] + bias[e]       r in the rows of e
//   grouped_outer:  out[e, :, :] = sum over those r of left[r, :] ⊗ right[r, :]
//
// The rows of e are offsets[e] and the min(load[e], offsets[e+1] - offsets[e]) after it. All other
// rows are never read and come out zero.
//
// Every GEMM is cut into tiles, and a thread takes whole tiles: many small experts keep all threads
// busy, and so does one that has all rows. Tiles depend on sizes and routing alone, so results do
// not on the number of threads.

#include <vector>

#include "gemm.h"

namespace moe_ext {
namespace {

constexpr int64_t kTileRows = 256, kTileColumns = 1024;

struct Tile {
  int64_t expert, row_begin, row_end, column_begin, column_end;
};

// body(gemm, tile) for all. A thread that is done takes the next one: products of few rows are
// slower than their size says.
template <typename Body>
void run(const std::vector<Tile>& tiles, ScalarType dtype, const Body& body) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tiles.size());
  std::atomic<size_t> next{0};
  parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Gemm gemm(dtype);
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tiles.size();) {
      body(gemm, tiles[i]);
    }
  });
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

void zero_unowned(const Tensor& out, const std::vector<Range>& owned) {
  int64_t done = 0;
  const auto zero_to = [&](int64_t end) {
    Tensor gap = part(out, 0, done, end);
    if (done < end) torch::stable::zero_(gap);
  };
  for (const Range& range : owned) {
    zero_to(range.begin);
    done = range.end;
  }
  zero_to(out.size(0));
}

Tensor grouped_mm_cpu(const Tensor& rows, const Tensor& weights, const OptionalTensor& bias,
                      const Tensor& offsets, const Tensor& load, std::optional<int64_t> capacity) {
  const GroupedMMArgs a = grouped_mm_args(rows, weights, bias, offsets, load, capacity);
  const int64_t E = a.groups.num_experts, N = a.out_width;
  const std::vector<Range> owned = owned_rows(Check("grouped_mm"), a.groups, a.num_rows);
  const Tensor out = fresh(a.rows, {a.num_rows, N}, a.rows.scalar_type());
  zero_unowned(out, owned);

  std::vector<Tile> tiles;
  for (int64_t e = 0; e < E; ++e) {
    for (int64_t column = 0; column < N; column += kTileColumns) {
      const int64_t column_end = std::min(column + kTileColumns, N);
      for (int64_t row = owned[e].begin; row < owned[e].end; row += kTileRows) {
        tiles.push_back({e, row, std::min(row + kTileRows, owned[e].end), column, column_end});
      }
    }
  }
  const Tensor all_rows = plain(a.rows), all_weights = plain(a.weights);
  const OptionalTensor biases = a.bias ? OptionalTensor(plain(*a.bias)) : std::nullopt;
  run(tiles, a.rows.scalar_type(), [&](Gemm& gemm, const Tile& t) {
    const auto columns_of = [&](const Tensor& stack) {
      return part(torch::stable::select(stack, 0, t.expert), 0, t.column_begin, t.column_end);
    };
    const Tensor target = part(out, 0, t.row_begin, t.row_end);
    gemm.rows_by_weight(part(target, 1, t.column_begin, t.column_end),
                        part(all_rows, 0, t.row_begin, t.row_end), columns_of(all_weights),
                        biases ? OptionalTensor(columns_of(*biases)) : std::nullopt);
  });
  return out;
}

Tensor grouped_outer_cpu(const Tensor& left, const Tensor& right, const Tensor& offsets,
                         const Tensor& load, std::optional<int64_t> capacity) {
  const GroupedOuterArgs a = grouped_outer_args(left, right, offsets, load, capacity);
  const int64_t E = a.groups.num_experts, N = a.left_width, M = a.right_width;
  const std::vector<Range> owned = owned_rows(Check("grouped_outer"), a.groups, a.num_rows);
  const Tensor out = fresh(a.left, {E, N, M}, a.left.scalar_type());

  std::vector<Tile> tiles;
  for (int64_t e = 0; e < E; ++e) {
    for (int64_t column = 0; column < N; column += kTileColumns) {
      tiles.push_back(
          {e, owned[e].begin, owned[e].end, column, std::min(column + kTileColumns, N)});
    }
  }
  const Tensor lefts = plain(a.left), rights = plain(a.right);
  run(tiles, a.left.scalar_type(), [&](Gemm& gemm, const Tile& t) {
    Tensor target = part(torch::stable::select(out, 0, t.expert), 0, t.column_begin, t.column_end);
    if (t.row_begin == t.row_end) {
      torch::stable::zero_(target);
      return;
    }
    const Tensor left_rows = part(lefts, 0, t.row_begin, t.row_end);
    gemm.outer(target, part(left_rows, 1, t.column_begin, t.column_end),
               part(rights, 0, t.row_begin, t.row_end));
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
