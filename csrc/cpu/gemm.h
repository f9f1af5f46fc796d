// One matrix product on one thread, whatever the dtype: few rows by the loops of few_*.h, floats by
// those of block_product.h, bfloat16 by those of tile_product.h where the CPU has instructions for
// it, else by torch's GEMM.
//
// Without instructions for a 16-bit type torch multiplies it ten to a hundred times slower than
// float32: there operands are widened, a block that fits the cache at a time, and sums stay float32
// to the last. With them, torch's library compiles code for every size it meets, milliseconds each:
// the number of rows, which changes with every routing, is padded to one of few.

#pragma once

#include <array>
#include <cstdlib>
#include <optional>

#include "block_product.h"
#include "few_outer.h"
#include "few_rows.h"
#include "few_rows_flat.h"
#include "tile_product.h"

namespace moe_ext {

// MOE_EXT_WIDEN_16BIT says no always: for tests on a CPU that has the instructions.
inline bool multiplies_natively([[maybe_unused]] ScalarType dtype) {
#if defined(MOE_EXT_WIDEN_16BIT)
  return false;
#elif defined(__x86_64__) && defined(__GNUC__)
  const bool is_bfloat16 = dtype == ScalarType::BFloat16;
  __builtin_cpu_init();
  if (is_bfloat16 && !__builtin_cpu_supports("avx512bf16")) return false;
#if !defined(__clang__) && __GNUC__ >= 12
  if (!is_bfloat16 && !__builtin_cpu_supports("avx512fp16")) return false;
#else
  if (!is_bfloat16) return false;
#endif
  // The library may have been told to leave them alone (ONEDNN_MAX_CPU_ISA), or torch may have been
  // built without it, and without the operator.
  std::array<StableIValue, 1> stack{};
  const AOTITorchError error = torch_call_dispatcher(
      is_bfloat16 ? "mkldnn::_is_mkldnn_bf16_supported" : "mkldnn::_is_mkldnn_fp16_supported", "",
      stack.data(), TORCH_ABI_VERSION);
  return error == AOTI_TORCH_SUCCESS && torch::stable::detail::to<bool>(stack[0]);
#else
  return true;
#endif
}

// Whether bfloat16 is multiplied on tiles (tile_loops.h). ONEDNN_MAX_CPU_ISA, which limits torch's
// library, limits us too.
inline bool multiplies_on_tiles(ScalarType dtype) {
  static const bool may = [] {
    const char* most = std::getenv("ONEDNN_MAX_CPU_ISA");
    const bool is_held =
        most && *most && !std::strstr(most, "AMX") && !std::strstr(most, "DEFAULT");
    return has_tiles() &&
           (kEmulatesTiles || (!is_held && multiplies_natively(ScalarType::BFloat16)));
  }();
  return dtype == ScalarType::BFloat16 && may;
}

// Whether own loops take what torch's library multiplies on Intel's CPUs, for which it is made. On
// a Zen 5 it is half as fast for floats as the loops of block_product.h with registers of 64 bytes,
// and as fast as those with 32. For bfloat16 it is slower than those of few_rows.h and
// pair_loops.h. MOE_EXT_OWN_PRODUCTS says yes on every CPU: for tests.
inline bool prefers_own_loops() {
#if defined(MOE_EXT_OWN_PRODUCTS)
  return true;
#elif defined(__x86_64__)
  __builtin_cpu_init();
  return !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

// Whether bfloat16 is multiplied in registers (pair_loops.h).
inline bool multiplies_in_registers([[maybe_unused]] ScalarType dtype) {
#if defined(MOE_EXT_PAIR_LOOPS)
  static const bool may = multiplies_pairs() && prefers_own_loops() &&
                          !multiplies_on_tiles(ScalarType::BFloat16) &&
                          multiplies_natively(ScalarType::BFloat16);
  return dtype == ScalarType::BFloat16 && may;
#else
  return false;
#endif
}

// Whether own loops multiply any number of rows of floats.
inline bool multiplies_floats() { return prefers_own_loops() && register_bytes() >= 32; }

// Whether own loops multiply floats of up to some number of rows. MKL is faster for more.
inline bool multiplies_some_floats() { return multiplies_floats() || register_bytes() == 64; }

// Calls an operator that writes into its last argument.
template <size_t size>
void call_out(const char* name, std::array<StableIValue, size> stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// out = left @ right^T + first; `first` is one row for all of out's, or out itself, or nothing.
inline void multiply_by_torch(const Matrix& out, const Matrix& left, const Matrix& right,
                              const std::optional<Matrix>& first) {
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

// The products of one thread.
class Gemm {
 public:
  explicit Gemm(ScalarType dtype) {
    if (dtype == ScalarType::Float || dtype == ScalarType::Double) return;
    if (multiplies_on_tiles(dtype)) tiles_.emplace();
    in_registers_ = multiplies_in_registers(dtype);
    multiplies_natively(dtype) ? pads_ = true : widens_ = true;
  }

  static std::string description(ScalarType dtype) {
    const bool is_float = dtype == ScalarType::Float;
    if ((is_float && multiplies_floats()) || multiplies_in_registers(dtype)) return "own loops";
    if (multiplies_on_tiles(dtype)) return "own loops on AMX tiles";
    std::string text = "torch's GEMM";
    if (!is_float && dtype != ScalarType::Double && !multiplies_natively(dtype)) {
      text = "in float32, as this CPU's torch has no " + dtype_name(dtype) + " instructions";
    }
    if (has_lanes(dtype)) {
      const auto up_to = [](int64_t rows) { return "up to " + std::to_string(rows); };
      const std::string own = is_float && multiplies_some_floats()
                                  ? up_to(kSomeFloats) + " rows of an expert, " +
                                        up_to(kFlatFloats) + " where a weight's columns are dense"
                                  : up_to(Gemm(dtype).most_rows(dtype, 0)) + " rows of an expert";
      return "own loops " + own + ", else " + text;
    }
    return text;
  }

  // Whether it multiplies on tiles, any number of rows.
  bool is_tiled() const { return tiles_.has_value(); }

  // out [n, N] = rows [n, M] @ weight [N, M]^T + bias [1, N]
  void rows_by_weight(const Matrix& out, const Matrix& rows, const Matrix& weight,
                      const std::optional<Matrix>& bias) {
    const Matrix* first = bias ? &*bias : nullptr;
    const bool is_flat = weight.row_stride == 1 && weight.column_stride != 1;
    const bool has_loops =
        has_lanes(rows.dtype) && rows.column_stride == 1 && out.column_stride == 1;
    const bool is_few = has_loops && rows.rows <= most_before_tiles(is_flat, rows.columns);
    if (!is_few && by_tiles(out, rows, weight.transposed(), first)) return;
    if (has_loops) {
      if (weight.column_stride == 1 && rows.rows <= most_rows(rows.dtype, rows.columns)) {
        return on_widest(FewRows{out, rows, first, {weight}}, left_);
      }
      if (weight.row_stride == 1 && rows.rows <= most_flat_rows(rows.columns)) {
        return on_widest(FewRowsFlat{out, rows, weight, first}, left_);
      }
    }
    const int64_t padded = pads_ ? padded_size(rows.rows) : rows.rows;
    if (!widens_ && padded == rows.rows) return multiply(out, rows, weight, bias);
    const ScalarType dtype = widens_ ? ScalarType::Float : rows.dtype;
    const Matrix result = out_.get(dtype, padded, out.columns);
    const Matrix left = left_.copy_of(rows, dtype, padded);
    if (widens_) {
      multiply(result, left, right_.copy_as_it_lies(weight, dtype),
               bias ? std::optional(bias_.copy_of(*bias, dtype, 1)) : std::nullopt);
    } else {
      multiply(result, left, weight, bias);
    }
    copy(out, result.row_range(0, rows.rows));
  }

  // The same with the lines of a source (lines.h); false where other products are faster.
  template <typename Source>
  bool rows_by_lines(const Matrix& out, const Matrix& rows, const std::optional<Matrix>& bias,
                     const Source& source) {
    if (is_tiled() || !has_lanes(rows.dtype) || rows.column_stride != 1 || out.column_stride != 1 ||
        rows.rows > most_lines(rows.dtype, rows.columns)) {
      return false;
    }
    on_widest(FewRowsOf<Source>{out, rows, bias ? &*bias : nullptr, source}, left_);
    return true;
  }

  // out [N, M] = left [n, N]^T @ right [n, M]; outgrows: whether all results outgrow the caches
  void outer(const Matrix& out, const Matrix& left, const Matrix& right, bool outgrows) {
    const bool around = outgrows && FewOuter::goes_around(out);
    if (has_lanes(left.dtype) && left.rows <= most_outer_rows(out, around) &&
        left.column_stride == 1 && right.column_stride == 1 && out.column_stride == 1) {
      return on_widest(FewOuter{out, left, right, around}, left_);
    }
    if (by_tiles(out, left.transposed(), right, nullptr)) return;
    if (widens_) {
      const Matrix sum = out_.get(ScalarType::Float, out.rows, out.columns);
      add_outer(sum, left, right, true);
      return copy(out, sum);
    }
    const int64_t padded = pads_ ? padded_size(left.rows) : left.rows;
    if (padded == left.rows) {
      return multiply(out, left.transposed(), right.transposed(), std::nullopt, true);
    }
    multiply(out, left_.copy_of(left, left.dtype, padded).transposed(),
             right_.copy_of(right, right.dtype, padded).transposed(), std::nullopt, true);
  }

  // Whether there is add_outer: torch's GEMM rounds what it adds to 16 bits.
  bool adds_outer() const { return !pads_ || tiles_ || in_registers_; }

  // sum [N, M] += left [n, N]^T @ right [n, M], or = where it starts. sum has floats, or doubles.
  void add_outer(const Matrix& sum, const Matrix& left, const Matrix& right, bool starts) {
    const std::optional<Matrix> before = starts ? std::nullopt : std::optional(sum);
    if (by_tiles(sum, left.transposed(), right, before ? &*before : nullptr)) return;
    if (!widens_) return multiply(sum, left.transposed(), right.transposed(), before, true);
    for (int64_t begin = 0; begin < left.rows; begin += kRows) {
      const int64_t end = std::min(begin + kRows, left.rows);
      const auto wide = [&](Panel& panel, const Matrix& rows) {
        return panel.copy_of(rows.row_range(begin, end), sum.dtype, end - begin).transposed();
      };
      multiply(sum, wide(left_, left), wide(right_, right), begin == 0 ? before : sum, true);
    }
  }

 private:
  static constexpr int64_t kRows = 256;
  // Up to so many rows the loops of few_rows.h are faster than the others. kFewFloats is for the
  // longest rows of floats, kFewBesidePairs where pair_loops.h takes more.
  static constexpr int64_t kFewRows = 16, kFewPairs = 48, kFewFloats = 64, kFewBesidePairs = 24;
  // few_rows_flat.h is faster than pair_loops.h for up to kFewFlat rows, and for up to kMostFlat if
  // they are long. On AMX tiles it is faster for up to four rows and equal for up to eight
  // (kFewBesideTiles; measured with floats instead of pairs).
  static constexpr int64_t kFewFlat = 48, kMostFlat = 96, kFewBesideTiles = 6;
  // few_outer.h is faster than other products up to so many rows:
  //   kOuterBesidePairs  pair_loops.h
  //   kOuterWidened      16-bit types without instructions
  //   kOuterFloats       block_product.h; kOuterTall for tiles of few columns, kOuterAround for
  //                      results that go around the caches
  //   kFewLong           MKL, long rows of floats
  static constexpr int64_t kOuterBesidePairs = 128, kOuterWidened = 96, kOuterFloats = 20;
  static constexpr int64_t kOuterTall = 128, kOuterAround = 32, kFewLong = 12;
  // Where MKL multiplies many rows of floats, the loops of block_product.h take up to kSomeFloats;
  // kFlatFloats if the columns of the weight are dense; kSmallFloats if such a weight has up to
  // kSmallFlat numbers, or a gradient up to kSmallOuter. If an expert has several tiles of rows,
  // each has more than kSomeFloats, so that the same library multiplies all.
  static constexpr int64_t kSomeFloats = 240, kFlatFloats = 24, kSmallFloats = 64;
  static constexpr int64_t kSmallFlat = 1 << 13, kSmallOuter = 1 << 15;

  // The same for lines that a source decodes. Other loops would read them from memory.
  static int64_t most_lines(ScalarType dtype, int64_t columns) {
    // Sums over lanes cost too much for short rows.
    if (dtype == ScalarType::Float && multiplies_some_floats()) {
      return std::clamp<int64_t>(columns / 16, 4, kFewFloats);
    }
    const bool in_pairs = dtype == ScalarType::BFloat16 && multiplies_pairs();
    return in_pairs && prefers_own_loops() ? kFewPairs : kFewRows;
  }

  // The same where the rows of the weight are dense. On a Sapphire Rapids packed blocks are faster
  // from kFewRows on unless the rows are long. On a Zen 5 columns / 16 was measured.
  int64_t most_rows(ScalarType dtype, int64_t columns) const {
    if (in_registers_) return most_beside_pairs(columns);
    const int64_t most = most_lines(dtype, columns);
    if (dtype != ScalarType::Float || prefers_own_loops()) return most;
    return std::max(std::min(most, kFewRows), std::min(columns / 48, most));
  }

  // The same for the loops of few_outer.h.
  int64_t most_outer_rows(const Matrix& out, bool around) const {
    if (in_registers_) return kOuterBesidePairs;
    if (widens_ && !tiles_ && prefers_own_loops()) return kOuterWidened;
    if (out.dtype != ScalarType::Float) return kFewRows;
    if (!multiplies_floats()) return out.columns > 256 ? kFewLong : kFewRows;
    if (out.rows >= 3 * out.columns) return kOuterTall;
    return around ? kOuterAround : kOuterFloats;
  }

  // The same where the columns of the weight are dense. Short rows of which there are many take
  // longer than in registers, as every chunk of few_rows_flat.h starts and ends their sums.
  int64_t most_flat_rows(int64_t columns) const {
    return in_registers_ ? std::clamp(columns / 4, kFewFlat, kMostFlat) : kFewRows;
  }

  // The same for rows that tile_product.h would take too.
  int64_t most_before_tiles(bool is_flat, int64_t columns) const {
    if (is_flat) return is_tiled() ? kFewBesideTiles : most_flat_rows(columns);
    return in_registers_ ? most_beside_pairs(columns) : 0;
  }

  // The most rows for few_rows.h beside registers. Sums over lanes cost too much for short rows.
  static int64_t most_beside_pairs(int64_t columns) {
    return std::clamp<int64_t>(columns / 24, 2, kFewBesidePairs);
  }

  // out = left @ right + first; false where tile_product.h does not multiply.
  bool by_tiles([[maybe_unused]] const Matrix& out, [[maybe_unused]] const Matrix& left,
                [[maybe_unused]] const Matrix& right, [[maybe_unused]] const Matrix* first) {
    if (!is_dense(left) || !is_dense(right)) return false;
#if defined(MOE_EXT_TILES)
    const TileProduct product{out, left, right, first};
    if (tiles_) {
      on_widest(product, *tiles_, packed_left_);
      return true;
    }
#endif
#if defined(MOE_EXT_PAIR_LOOPS)
    if (in_registers_) {
      PairLoops loops;
      on_widest(product, loops, packed_left_);
      return true;
    }
#endif
    return false;
  }

  static bool is_dense(const Matrix& matrix) {
    return matrix.row_stride == 1 || matrix.column_stride == 1;
  }

  // Whether floats are multiplied by block_product.h.
  static bool takes_blocks(const Matrix& left, const Matrix& right, bool is_gradient) {
    if (multiplies_floats()) return true;
    if (!multiplies_some_floats()) return false;
    const int64_t rows = is_gradient ? left.columns : left.rows;
    if (is_gradient) return rows <= kSmallFloats && left.rows * right.rows <= kSmallOuter;
    if (right.column_stride == 1) return rows <= kSomeFloats;
    const bool is_small = right.rows * right.columns <= kSmallFlat;
    return rows <= (is_small ? kSmallFloats : kFlatFloats);
  }

  // out = left @ right^T + first, as of multiply_by_torch.
  void multiply(const Matrix& out, const Matrix& left, const Matrix& right,
                const std::optional<Matrix>& first, bool is_gradient = false) {
    if (out.dtype == ScalarType::Float && out.column_stride == 1 && is_dense(left) &&
        is_dense(right) && takes_blocks(left, right, is_gradient)) {
      const BlockProduct product{out, left, right.transposed(), first ? &*first : nullptr,
                                 is_gradient};
      return on_widest(product, packed_left_, packed_right_);
    }
    multiply_by_torch(out, left, right, first);
    if (tiles_) tiles_.emplace();  // the library may have released them
  }

  // The next of eight sizes for every doubling; a multiple of eight.
  static int64_t padded_size(int64_t n) {
    int64_t step = 8;
    while (step * 16 <= n) step *= 2;
    return (n + step - 1) / step * step;
  }

  bool widens_ = false, pads_ = false, in_registers_ = false;
  std::optional<TileLoops> tiles_;  // where they multiply bfloat16
  Panel left_, right_, out_, bias_, packed_left_, packed_right_;
};

}  // namespace moe_ext
