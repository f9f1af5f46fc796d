// Chooses the loops of a product (gemm.h), and compiles them.

#include "gemm.h"

#include <array>

#include "../tiles/tile_product.h"
#include "block_product.h"
#include "direct_product.h"
#include "few_outer.h"
#include "few_rows_flat.h"
#include "quad_product.h"

namespace moe_ext {
namespace {

// Calls an operator that writes into its last argument.
template <size_t size>
void call_out(const char* name, std::array<StableIValue, size> stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// out = left @ right^T + first; `first` is one row for all of out's, or out itself, or nothing.
void multiply_by_torch(const Matrix& out, const Matrix& left, const Matrix& right,
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

// The next of eight sizes for every doubling; a multiple of eight.
int64_t padded_size(int64_t n) {
  int64_t step = 8;
  while (step * 16 <= n) step *= 2;
  return (n + step - 1) / step * step;
}

}  // namespace

Gemm::Gemm(ScalarType dtype) : borders_(dtype) {
  if (borders_.path() == Path::kTiles) tiles_.emplace();
  const bool is_16bit = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  pads_ = is_16bit && borders_.path() != Path::kWidened;
}

void Gemm::rows_by_weight(const Matrix& out, const Indexed& rows, const Matrix& weight,
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
  if (padded == rows.rows) return multiply(out, rows, weight, first);
  const Matrix result = out_.get(rows.dtype, padded, out.columns);
  multiply(result, left_.copy_of(gathered_left_.of(rows), rows.dtype, padded), weight, first);
  copy(out, result.row_range(0, rows.rows));
}

void Gemm::outer(const Matrix& out, const Indexed& left, const Indexed& right, bool outgrows) {
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
  if (by_tiles(out, left.transposed(), right, nullptr, around)) return;
  const int64_t padded = pads_ ? padded_size(left.rows) : left.rows;
  const bool is_whole = padded == left.rows;
  if (is_whole) return multiply_outer(out, left, right, nullptr, around);
  multiply_outer(out, left_.copy_of(gathered_left_.of(left), left.dtype, padded),
                 right_.copy_of(gathered_right_.of(right), right.dtype, padded), nullptr, around);
}

// QuadProduct takes no fewer than kLeastColumns: a smaller weight gets lines of zeros, lest its
// sums have another order.
void Gemm::by_fours(const Matrix& out, const Matrix& rows, const Matrix& weight,
                    const Matrix* bias) {
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
bool Gemm::by_tiles([[maybe_unused]] const Matrix& out, [[maybe_unused]] const Indexed& left,
                    [[maybe_unused]] const Indexed& right, [[maybe_unused]] const Matrix* first,
                    [[maybe_unused]] bool around) {
  if (!left.is_dense() || !right.is_dense()) return false;
#if defined(MOE_EXT_TILES)
  const TileProduct product{out, left, right, first, around};
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

// MKL adds the terms of small products one by one to what is there.
void Gemm::add_outer(const Matrix& sum, const Indexed& left, const Indexed& right, bool starts) {
  constexpr int64_t kSmall = 1 << 14;
  if (by_tiles(sum, left.transposed(), right, starts ? nullptr : &sum)) return;
  if (starts) return multiply_outer(sum, left, right, nullptr);
  if (sum.rows * sum.columns > kSmall || borders_.blocks_outer(left.rows, sum, false)) {
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
void Gemm::multiply(const Matrix& out, const Indexed& left, const Matrix& right,
                    const Matrix* first) {
  const BlockProduct product{out, left, readable(right).transposed(), first};
  if (product.is_possible() && borders_.blocks(left.rows, right)) {
    return on_widest(product, packed_left_, packed_right_);
  }
  by_torch(out, gathered_left_.of(left), right, first);
}

// out = left^T @ right + first, where `first` is out or nothing.
void Gemm::multiply_outer(const Matrix& out, const Indexed& left, const Indexed& right,
                          const Matrix* first, bool around) {
  const bool goes_around = around && borders_.blocks_go_around();
  const BlockProduct product{out, left.transposed(), right, first, true, goes_around};
  if (product.is_possible() && borders_.blocks_outer(left.rows, out, around)) {
    return on_widest(product, packed_left_, packed_right_);
  }
  by_torch(out, gathered_left_.of(left).transposed(), gathered_right_.of(right).transposed(),
           first);
}

// A weight as block_product.h can read it, where that takes all but few rows: a copy if neither its
// rows nor its columns are dense.
Matrix Gemm::readable(const Matrix& weight) {
  if (borders_.path() != Path::kWidened || weight.is_dense()) return weight;
  return right_.copy_of(weight, weight.dtype, weight.rows);
}

void Gemm::by_torch(const Matrix& out, const Matrix& left, const Matrix& right,
                    const Matrix* first) {
  multiply_by_torch(out, left, right, first);
  if (tiles_) tiles_.emplace();  // the library may have released them
}

}  // namespace moe_ext
