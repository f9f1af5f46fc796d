// Products of every expert's rows, in tiles.
//
// The rows of expert e that routes own are offsets[e] and the min(load[e], offsets[e+1] -
// offsets[e]) after it. A thread takes whole tiles of their products: many small experts keep all
// threads busy, and so does one that has all rows. (Stages, in feed_forward.h, also has it take
// whole experts.)

#pragma once

#include <exception>
#include <mutex>
#include <vector>

#include "../gemm/gemm.h"
#include "../machine/around_caches.h"

namespace moe_ext {

// A part of one expert's product: rows and columns of what comes out.
struct Tile {
  int64_t expert, row_begin, row_end, column_begin, column_end;
  int product;  // which one, where there are several

  int64_t rows() const { return row_end - row_begin; }
  int64_t columns() const { return column_end - column_begin; }
  Matrix of(const Matrix& matrix) const {
    return matrix.row_range(row_begin, row_end).column_range(column_begin, column_end);
  }
};

// The rows that routes own, of every expert.
struct Range {
  int64_t begin, end;
};

inline std::vector<Range> owned_rows(const Check& check, const Groups& groups, int64_t num_rows) {
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

inline void zero_rows(const Matrix& matrix, int64_t begin, int64_t end) {
  const Matrix rows = matrix.row_range(begin, end);
  std::memset(rows.data, 0, rows.rows * rows.columns * rows.width());
}

inline void zero_unowned(const Matrix& out, const std::vector<Range>& owned) {
  const auto E = static_cast<int64_t>(owned.size());
  int64_t rows = out.rows;
  for (const auto [begin, end] : owned) rows -= end - begin;
  const int64_t bytes = rows * out.columns * out.width();
  parallel_for(0, E + 1, grain(bytes / (E + 1)), [&](int64_t first, int64_t last) {
    for (int64_t e = first; e < last; ++e) {
      zero_rows(out, e > 0 ? owned[e - 1].end : 0, e < E ? owned[e].begin : out.rows);
    }
  });
}

// Sizes of tiles: as large as keeps all threads busy.
struct TileSize {
  static constexpr int64_t kRows = 512, kColumns = 1024, kLeast = 128;

  int64_t rows, columns;

  // Few rows leave room for more columns: a weight is read in longer pieces.
  TileSize widened(const std::vector<Range>& ranges, int64_t all_columns) const {
    int64_t most = 1;
    for (const auto [begin, end] : ranges) most = std::max(most, end - begin);
    TileSize size = *this;
    while (size.columns < all_columns && 2 * size.columns * most <= rows * columns) {
      size.columns *= 2;
    }
    return size;
  }

  // For products of so many rows and columns.
  static TileSize fit(const std::vector<Range>& rows, int64_t columns, TileSize size) {
    const int64_t threads = torch::stable::get_num_threads(), wanted = 4 * threads;
    // A thread that is alone waits for none, and every further tile would pack the same rows again.
    if (threads == 1) return size;
    const auto count = [&] {
      int64_t tiles = 0;
      for (const auto [begin, end] : rows) tiles += parts(end - begin, size.rows);
      return tiles * parts(columns, size.columns);
    };
    while (size.columns > kLeast && count() < wanted) size.columns /= 2;
    return size;
  }
};

inline void add_tiles(std::vector<Tile>& tiles, const std::vector<Range>& ranges, int64_t columns,
                      TileSize most, int product) {
  const TileSize size = TileSize::fit(ranges, columns, most);
  for (size_t e = 0; e < ranges.size(); ++e) {
    const auto [begin, end] = ranges[e];
    // Rows are divided evenly: a rest of few rows would be multiplied by other loops.
    const int64_t count = parts(end - begin, size.rows);
    const auto border = [&, begin = begin, end = end](int64_t i) {
      return begin + (end - begin) * i / count;
    };
    for (int64_t column = 0; column < columns; column += size.columns) {
      for (int64_t i = 0; i < count; ++i) {
        tiles.push_back({static_cast<int64_t>(e), border(i), border(i + 1), column,
                         std::min(column + size.columns, columns), product});
      }
    }
  }
}

// Tiles of the products of ranges of rows, one for each expert, to so many columns.
inline void add_row_tiles(std::vector<Tile>& tiles, const std::vector<Range>& rows, int64_t columns,
                          int64_t most_columns = TileSize::kColumns, int product = 0) {
  const TileSize most{TileSize::kRows, most_columns};
  add_tiles(tiles, rows, columns, most.widened(rows, columns), product);
}

// Tiles of the sums of outer products, [rows, columns] for each expert.
inline void add_outer_tiles(std::vector<Tile>& tiles, int64_t num_experts, int64_t rows,
                            int64_t columns, int product = 0) {
  const std::vector<Range> all(num_experts, {0, rows});
  add_tiles(tiles, all, columns, {TileSize::kRows, TileSize::kColumns}, product);
}

// A thread's products and memory.
struct Worker {
  Worker(ScalarType dtype, int64_t index) : gemm(dtype), index(index) {}

  // Memory for a product. Rows are not whole pages apart, because loops that write a piece of each
  // row would be slow.
  Matrix room(ScalarType dtype, int64_t rows, int64_t columns) {
    constexpr int64_t kPage = 4096, kMore = 32;
    const Matrix dense = out.get(dtype, rows, columns);
    if (columns * dense.width() % kPage != 0) return dense;
    return out.get(dtype, rows, columns + kMore).column_range(0, columns);
  }

  Gemm gemm;
  int64_t index;  // below the number of threads; no other worker has it at the same time
  Panel left, right, out;
};

// body(worker, i) for all i below count, on at most so many threads. One that is done takes the
// next i: products of few rows are slower than their size says. Rethrows an exception of a body.
template <typename Body>
void run_each(int64_t count, int64_t threads, ScalarType dtype, const Body& body) {
  // A single body is left to the threads of torch's GEMM, where that multiplies.
  threads = std::min(threads, count);
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;
  parallel_for(0, threads, 1, [&](int64_t index, int64_t) {
    try {
      Worker worker(dtype, index);
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        body(worker, i);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!failure) failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

// body(worker, tile) for all.
template <typename Body>
void run(const std::vector<Tile>& tiles, ScalarType dtype, const Body& body) {
  run_each(static_cast<int64_t>(tiles.size()), torch::stable::get_num_threads(), dtype,
           [&](Worker& worker, int64_t i) { body(worker, tiles[i]); });
}

// One row of a bias, as far as a tile goes.
inline std::optional<Matrix> bias_of(const OptionalTensor& bias, int64_t expert,
                                     int64_t column_begin, int64_t column_end) {
  if (!bias) return std::nullopt;
  return matrix_of(*bias).row_range(expert, expert + 1).column_range(column_begin, column_end);
}

// A tile of out = rows @ weights[e]^T + bias[e]; rows has the tile's rows, out all.
inline void multiply_tile(Worker& worker, const Tile& t, const Matrix& out, const Indexed& rows,
                          const Matrix& weight, const OptionalTensor& bias) {
  worker.gemm.rows_by_weight(t.of(out), rows, weight.row_range(t.column_begin, t.column_end),
                             bias_of(bias, t.expert, t.column_begin, t.column_end));
}

// around: whether its writes go around the caches
inline void zero_tile(const Matrix& tile, bool around) {
  const int64_t bytes = tile.columns * tile.width();
  for (int64_t row = 0; row < tile.rows; ++row) {
    char* to = tile.row_range(row, row + 1).data;
    if (around) {
      zero_around(to, bytes);
    } else {
      std::memset(to, 0, bytes);
    }
  }
  if (around) finish_around();
}

// The rows of an expert whose outer products are added up at a time. Copies of them stay small, and
// so do the errors of sums over a million rows.
constexpr int64_t kMostOuterRows = 2048;

// A tile of out[e] = left^T @ right; both: the rows that the expert owns. out: [E, N, M].
inline void outer_tile(Worker& worker, const Tile& t, const Tensor& out, const Indexed& left,
                       const Indexed& right) {
  const Matrix tile = t.of(matrix_of(out, t.expert));
  const bool around = outgrows_caches(out.numel() * tile.width());
  if (left.rows == 0) return zero_tile(tile, around);
  const Indexed lefts = left.column_range(t.row_begin, t.row_end);
  const Indexed rights = right.column_range(t.column_begin, t.column_end);
  const int64_t count = parts(left.rows, kMostOuterRows);
  if (count == 1 || !worker.gemm.adds_outer()) {
    return worker.gemm.outer(tile, lefts, rights, around);
  }
  const ScalarType wide = tile.dtype == ScalarType::Double ? tile.dtype : ScalarType::Float;
  const Matrix sum = tile.dtype == wide ? tile : worker.out.get(wide, tile.rows, tile.columns);
  const int64_t rows = parts(left.rows, count);
  for (int64_t row = 0; row < left.rows; row += rows) {
    const int64_t last = std::min(row + rows, left.rows);
    worker.gemm.add_outer(sum, lefts.row_range(row, last), rights.row_range(row, last), row == 0);
  }
  if (sum.data != tile.data) copy(tile, sum);
}

}  // namespace moe_ext
