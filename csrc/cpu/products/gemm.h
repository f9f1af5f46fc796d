// One matrix product on one thread, whatever the dtype: few rows by the loops of few_*.h, floats by
// those of direct_product.h, quad_product.h and block_product.h, bfloat16 by those of
// tile_product.h where the CPU has instructions for it, else by torch's GEMM.
//
// Without instructions for a 16-bit type torch multiplies it ten to a hundred times slower than
// float32: there operands are widened, a block that fits the cache at a time, and sums stay float32
// to the last. With them, torch's library compiles code for every size it meets, milliseconds each:
// the number of rows, which changes with every routing, is padded to one of few.

#pragma once

#include <array>
#include <optional>

#include "block_product.h"
#include "direct_product.h"
#include "few_outer.h"
#include "few_rows.h"
#include "few_rows_flat.h"
#include "paths.h"
#include "quad_product.h"
#include "tile_product.h"

namespace moe_ext {

// Calls an operator that writes into its last argument.
template <size_t size>
void call_out(const char* name, std::array<StableIValue, size> stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// out = left @ right^T + first; `first` is one row for all of out's, or out itself, or nothing.
inline void multiply_by_torch(const Matrix& out, const Matrix& left, const Matrix& right,
                              const Matrix* first) {
  using torch::stable::detail::from;
  const Tensor target = out.tensor();
  if (!first) {  // linear would get there by several operators
    const Tensor columns = right.transposed().tensor();
    return call_out("aten::mm", std::array{from(left.tensor()), from(columns), from(target)});
  }
  const OptionalTensor added = first->data == out.data ? target : first->tensor();
  call_out("aten::linear",
           std::array{from(left.tensor()), from(right.tensor()), from(added), from(target)});
}

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
  explicit Gemm(ScalarType dtype) : borders_(dtype) {
    if (borders_.path() == Path::kTiles) tiles_.emplace();
    if (dtype == ScalarType::Float || dtype == ScalarType::Double) return;
    widens_ = borders_.path() == Path::kWidened || (kEmulatesTiles && !multiplies_natively(dtype));
    pads_ = !widens_;
  }

  // Whether it multiplies on tiles, any number of rows.
  bool is_tiled() const { return tiles_.has_value(); }

  // out [n, N] = rows [n, M] @ weight [N, M]^T + bias [1, N]
  void rows_by_weight(const Matrix& out, const Indexed& rows, const Matrix& weight,
                      const std::optional<Matrix>& bias) {
    const Matrix* first = bias ? &*bias : nullptr;
    const bool is_flat = weight.row_stride == 1 && weight.column_stride != 1;
    const bool has_loops = has_lanes(rows.dtype) && rows.column_stride == 1 &&
                           out.column_stride == 1 && weight.is_dense();
    if (has_loops && is_flat && borders_.direct(rows.rows, weight)) {
      return on_registers<64>(
          DirectProduct{out, gathered_left_.of(rows), weight.transposed(), first});
    }
    if (has_loops && !is_flat && borders_.quad(rows.rows, weight)) {
      return by_fours(out, gathered_left_.of(rows), weight, first);
    }
    if (has_loops &&
        rows.rows <= borders_.rows(is_flat, rows.columns, weight.rows * weight.columns)) {
      const Matrix few = gathered_left_.of(rows);
      if (is_flat) return on_widest(FewRowsFlat{out, few, weight, first}, left_);
      return on_widest(FewRows{out, few, first, {weight}}, left_);
    }
    if (by_tiles(out, rows, weight.transposed(), first)) return;
    const int64_t padded = pads_ ? padded_size(rows.rows) : rows.rows;
    if (!widens_ && padded == rows.rows) return multiply(out, rows, weight, first);
    const ScalarType dtype = widens_ ? ScalarType::Float : rows.dtype;
    const Matrix result = out_.get(dtype, padded, out.columns);
    const Matrix left = left_.copy_of(gathered_left_.of(rows), dtype, padded);
    if (widens_) {
      const auto wide = bias ? std::optional(bias_.copy_of(*bias, dtype, 1)) : std::nullopt;
      multiply(result, left, right_.copy_as_it_lies(weight, dtype), wide ? &*wide : nullptr);
    } else {
      multiply(result, left, weight, first);
    }
    copy(out, result.row_range(0, rows.rows));
  }

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
  void outer(const Matrix& out, const Indexed& left, const Indexed& right, bool outgrows) {
    const bool around = outgrows && FewOuter::goes_around(out);
    if (has_lanes(left.dtype) && left.rows <= borders_.outer(out, around) &&
        left.column_stride == 1 && right.column_stride == 1 && out.column_stride == 1) {
      return on_widest(FewOuter{out, gathered_left_.of(left), gathered_right_.of(right), around},
                       left_);
    }
    if (borders_.direct_outer(left.rows, out, around) && right.column_stride == 1 &&
        out.column_stride == 1) {
      return on_registers<64>(DirectProduct{out, gathered_left_.of(left).transposed(),
                                            gathered_right_.of(right), nullptr});
    }
    if (by_tiles(out, left.transposed(), right, nullptr)) return;
    if (widens_) {
      const Matrix sum = out_.get(ScalarType::Float, out.rows, out.columns);
      add_outer(sum, left, right, true);
      return copy(out, sum);
    }
    const int64_t padded = pads_ ? padded_size(left.rows) : left.rows;
    const bool is_whole = padded == left.rows;
    if (is_whole) return multiply_outer(out, left, right, nullptr, around);
    multiply_outer(out, left_.copy_of(gathered_left_.of(left), left.dtype, padded),
                   right_.copy_of(gathered_right_.of(right), right.dtype, padded), nullptr, around);
  }

  // Whether there is add_outer: torch's GEMM rounds what it adds to 16 bits.
  bool adds_outer() const { return !pads_ || has_pairs(); }

  // sum [N, M] += left [n, N]^T @ right [n, M], or = where it starts. sum has floats, or doubles.
  void add_outer(const Matrix& sum, const Indexed& left, const Indexed& right, bool starts) {
    if (by_tiles(sum, left.transposed(), right, starts ? nullptr : &sum)) return;
    if (!widens_) return add_product(sum, left, right, starts);
    for (int64_t begin = 0; begin < left.rows; begin += kRows) {
      const int64_t end = std::min(begin + kRows, left.rows);
      const auto wide = [&](Panel& panel, const Indexed& rows) {
        return panel.copy_of(gathered_left_.of(rows.row_range(begin, end)), sum.dtype, end - begin);
      };
      add_product(sum, wide(left_, left), wide(right_, right), starts && begin == 0);
    }
  }

 private:
  static constexpr int64_t kRows = 256;

  // Whether tile_product.h multiplies.
  bool has_pairs() const { return is_tiled() || borders_.path() == Path::kRegisters; }

  // QuadProduct takes no fewer than kLeastColumns: a smaller weight gets lines of zeros, lest its
  // sums have another order.
  void by_fours(const Matrix& out, const Matrix& rows, const Matrix& weight, const Matrix* bias) {
    constexpr int64_t kLeast = QuadProduct::kLeastColumns;
    if (weight.rows >= kLeast) {
      return on_registers<64>(QuadProduct{out, rows, weight, bias}, left_);
    }
    const Matrix result = out_.get(out.dtype, rows.rows, kLeast);
    const Matrix lines = right_.copy_of(weight, weight.dtype, kLeast);
    std::optional<Matrix> more;
    if (bias) more = bias_.copy_of(bias->transposed(), bias->dtype, kLeast).transposed();
    on_registers<64>(QuadProduct{result, rows, lines, more ? &*more : nullptr}, left_);
    copy(out, result.column_range(0, out.columns));
  }

  // out = left @ right + first; false where tile_product.h does not multiply.
  bool by_tiles([[maybe_unused]] const Matrix& out, [[maybe_unused]] const Indexed& left,
                [[maybe_unused]] const Indexed& right, [[maybe_unused]] const Matrix* first) {
    if (!left.is_dense() || !right.is_dense()) return false;
#if defined(MOE_EXT_TILES)
    const TileProduct product{out, left, right, first};
    if (tiles_) {
      on_widest(product, *tiles_, packed_left_);
      return true;
    }
#endif
#if defined(MOE_EXT_PAIR_LOOPS)
    if (borders_.path() == Path::kRegisters) {
      PairLoops loops;
      on_widest(product, loops, packed_left_);
      return true;
    }
#endif
    return false;
  }

  // sum += left^T @ right, or = where it starts. MKL adds the terms of small products one by one to
  // what is there.
  void add_product(const Matrix& sum, const Indexed& left, const Indexed& right, bool starts) {
    constexpr int64_t kSmall = 1 << 14;
    if (starts) return multiply_outer(sum, left, right, nullptr);
    if (sum.rows * sum.columns > kSmall || Borders(sum.dtype).blocks_outer(left.rows, sum, false)) {
      return multiply_outer(sum, left, right, &sum);
    }
    const Matrix part = part_.get(sum.dtype, sum.rows, sum.columns);
    multiply_outer(part, left, right, nullptr);
    visit_sums(sum.dtype, [&](auto zero) {
      using T = decltype(zero);
      for (int64_t i = 0; i < sum.rows; ++i) {
        T* to = row_of<T>(sum, i);
        const T* from = row_of<const T>(part, i);
        for (int64_t j = 0; j < sum.columns; ++j) to[j] += from[j];
      }
    });
  }

  // out = left @ right^T + first, as of multiply_by_torch.
  void multiply(const Matrix& out, const Indexed& left, const Matrix& right, const Matrix* first) {
    const BlockProduct product{out, left, right.transposed(), first};
    if (product.is_possible() && Borders(out.dtype).blocks(left.rows, right)) {
      return on_widest(product, packed_left_, packed_right_);
    }
    by_torch(out, gathered_left_.of(left), right, first);
  }

  // out = left^T @ right + first, where `first` is out or nothing.
  void multiply_outer(const Matrix& out, const Indexed& left, const Indexed& right,
                      const Matrix* first, bool around = false) {
    const bool goes_around = around && borders_.blocks_go_around();
    const BlockProduct product{out, left.transposed(), right, first, true, goes_around};
    if (product.is_possible() && Borders(out.dtype).blocks_outer(left.rows, out, around)) {
      return on_widest(product, packed_left_, packed_right_);
    }
    by_torch(out, gathered_left_.of(left).transposed(), gathered_right_.of(right).transposed(),
             first);
  }

  void by_torch(const Matrix& out, const Matrix& left, const Matrix& right, const Matrix* first) {
    multiply_by_torch(out, left, right, first);
    if (tiles_) tiles_.emplace();  // the library may have released them
  }

  // The next of eight sizes for every doubling; a multiple of eight.
  static int64_t padded_size(int64_t n) {
    int64_t step = 8;
    while (step * 16 <= n) step *= 2;
    return (n + step - 1) / step * step;
  }

  Borders borders_;
  bool widens_ = false, pads_ = false;
  std::optional<TileLoops> tiles_;  // where they multiply bfloat16
  Panel left_, right_, out_, part_, bias_, packed_left_, packed_right_;
  Gathered gathered_left_, gathered_right_;
};

}  // namespace moe_ext
