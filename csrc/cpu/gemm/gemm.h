// One matrix product on one thread, whatever the dtype: few rows by the loops of few_*.h, floats by
// those of direct_product.h, quad_product.h and block_product.h, bfloat16 by those of
// tile_product.h where the CPU has instructions for it, else by torch's GEMM.
//
// Without instructions for a 16-bit type torch multiplies it ten to a hundred times slower than
// float32: there block_product.h widens what it packs. With them, torch's library compiles code for
// every size it meets, milliseconds each: the number of rows, which changes with every routing, is
// padded to one of few.
//
// gemm.cpp compiles these loops, once for all callers. rows_by_lines alone is compiled where it is
// called, for the caller's source of lines (lines.h).

#pragma once

#include <optional>

#include "../tiles/tile_loops.h"
#include "few_rows.h"
#include "paths.h"

namespace moe_ext {

// Rows for loops that find none by an index: all but those of block_product.h and tile_product.h.
class Gathered {
 public:
  // Memory that the index picks from does not change: rows that were asked for last are there.
  Matrix of(const Indexed& rows) {
    if (!rows.row_index) return rows.matrix();
    if (rows.row_index != index_ || rows.data != data_ || rows.rows != copy_.rows ||
        rows.columns != copy_.columns) {
      index_ = rows.row_index;
      data_ = rows.data;
      copy_ = gather(rows, memory_.get(rows.dtype, rows.rows, rows.columns).data);
    }
    return copy_;
  }

 private:
  const int32_t* index_ = nullptr;
  const char* data_ = nullptr;
  Matrix copy_{};
  Panel memory_;
};

// The products of one thread.
class Gemm {
 public:
  explicit Gemm(ScalarType dtype);

  // Whether it multiplies on tiles, any number of rows.
  bool is_tiled() const { return tiles_.has_value(); }

  // out [n, N] = rows [n, M] @ weight [N, M]^T + bias [1, N]
  void rows_by_weight(const Matrix& out, const Indexed& rows, const Matrix& weight,
                      const std::optional<Matrix>& bias);

  // The same with the lines of a source (lines.h); false where other products are faster.
  template <typename Source>
  bool rows_by_lines(const Matrix& out, const Matrix& rows, const std::optional<Matrix>& bias,
                     const Source& source) {
    if (!has_lanes(rows.dtype) || rows.column_stride != 1 || out.column_stride != 1 ||
        rows.rows > borders_.lines(rows.columns)) {
      return false;
    }
    on_widest(FewRowsOf<Source>{out, rows, bias ? &*bias : nullptr, source}, left_);
    return true;
  }

  // out [N, M] = left [n, N]^T @ right [n, M]; outgrows: whether all results outgrow the caches
  void outer(const Matrix& out, const Indexed& left, const Indexed& right, bool outgrows);

  // Whether there is add_outer: torch's GEMM rounds what it adds to 16 bits.
  bool adds_outer() const { return !pads_ || has_pairs(); }

  // sum [N, M] += left [n, N]^T @ right [n, M], or = where it starts. sum has floats, or doubles.
  void add_outer(const Matrix& sum, const Indexed& left, const Indexed& right, bool starts);

 private:
  // Whether tile_product.h multiplies.
  bool has_pairs() const { return is_tiled() || borders_.path() == Path::kRegisters; }

  void by_fours(const Matrix& out, const Matrix& rows, const Matrix& weight, const Matrix* bias);
  bool by_tiles(const Matrix& out, const Indexed& left, const Indexed& right, const Matrix* first,
                bool around = false);
  void multiply(const Matrix& out, const Indexed& left, const Matrix& right, const Matrix* first);
  void multiply_outer(const Matrix& out, const Indexed& left, const Indexed& right,
                      const Matrix* first, bool around = false);
  Matrix readable(const Matrix& weight);
  void by_torch(const Matrix& out, const Matrix& left, const Matrix& right, const Matrix* first);

  Borders borders_;
  bool pads_ = false;
  std::optional<TileLoops> tiles_;  // where they multiply bfloat16
  Panel left_, right_, out_, part_, bias_, packed_left_, packed_right_;
  Gathered gathered_left_, gathered_right_;
};

}  // namespace moe_ext
