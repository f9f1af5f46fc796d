// Products with weights in 8 and 4 bits: one per expert on the rows that routes own.
//
//   out[r, :] = weight[e] @ rows[r, :] + bias[e], or weight[e]^T @ rows[r, :], the gradient of rows
//
// Few rows are multiplied as the codes are read (few_rows_quantized.h). For more, lines of the
// weight become numbers of the rows' dtype: four at a time in the first cache where own loops
// multiply them, else a panel for another product.

#include "../products/products.h"
#include "few_rows_quantized.h"
#include "panels.h"

namespace moe_ext {
namespace {

// Up to so many rows are multiplied as the weight is read.
constexpr int64_t kFewRows = 4, kFewRowsOf32 = 16;    // by registers of 64 and of 32 bytes
constexpr int64_t kFewBy8Bits = 64, kFewBy4Bits = 8;  // rows of 8 bits, by weights of 8 and of 4
// A panel has so many bytes, and lines of the weight; or all lines and so many columns.
constexpr int64_t kPanelBytes = 1 << 21, kPanelLines = 64, kPanelColumns = 128;
// Tiles multiply up to so many rows by a smaller panel, which stays in the second cache.
constexpr int64_t kFewOnTiles = 64, kTiledBytes = 1 << 19;
constexpr int64_t kStep = 128;  // whole steps of registers of any size

// A source of lines (lines.h): numbers of a weight, a part at a time.
template <typename scalar_t>
struct DecodedLines {
  template <typename other_t>
  static constexpr bool kHas = std::is_same_v<other_t, scalar_t>;
  static constexpr bool kInMemory = false;
  // Half as many bytes took 6 % more time on a Zen 5 (int4, 32 rows of 2048 bfloat16).
  static constexpr int64_t kDeep = 1 << 12, kWhole = kStep;

  const QuantizedMatrix& weight;
  Panel &numbers, &memory;
  bool in_pairs;

  int64_t count() const { return weight.rows; }

  template <int bytes>
  MOE_EXT_INLINE Matrix find(int64_t first, int64_t lines, int64_t begin, int64_t end) const {
    const Matrix found =
        numbers.get(torch::headeronly::CppTypeToScalarType<scalar_t>::value, lines, end - begin);
    const QuantizedMatrix some = weight.row_range(first, first + lines);
    if (begin == 0) weight.prefetch_scales(first + lines, first + 2 * lines);
    const DecodePanel<scalar_t> decode{some, begin, found, in_pairs, false};
    on_registers<bytes>(decode, memory);
    return found;
  }

  MOE_EXT_INLINE Stored stored(int64_t first, int64_t elements) const {
    const int64_t apart = weight.row_bytes();
    return {reinterpret_cast<const char*>(weight.values) + first * apart, apart,
            elements * bits_of(weight.format) / 8};
  }

  // Numbers of 8 bits are multiplied without their line's scale.
  MOE_EXT_INLINE void complete(int64_t first, Vector<float, 16>& products) const {
    if (weight.has_codes()) return;
    const auto* scales = reinterpret_cast<const float*>(weight.scales);
    for (int64_t i = 0; i < kLines; ++i) {
      products[i] *= scales[std::min(first + i, weight.rows - 1)];
    }
  }
};

template <typename scalar_t>
class QuantizedProducts {
 public:
  explicit QuantizedProducts(const QuantizedMMArgs& args)
      : a(args), dtype_(args.rows.scalar_type()) {}

  Tensor run() const {
    const std::vector<Range> owned = owned_rows(Check("quantized_mm"), a.groups, a.num_rows);
    const Tensor out = fresh(a.rows, {a.num_rows, a.out_width}, dtype_);
    zero_unowned(matrix_of(out), owned);
    std::vector<Tile> tiles;
    add_row_tiles(tiles, owned, a.out_width);
    moe_ext::run(tiles, dtype_,
                 [&](Worker& worker, const Tile& t) { multiply(worker, t, matrix_of(out)); });
    return out;
  }

 private:
  void multiply(Worker& worker, const Tile& t, const Matrix& all_out) const {
    const QuantizedMatrix weight = quantized_matrix(a, t.expert);
    const Matrix out = t.of(all_out);
    const Matrix given = matrix_of(a.rows).row_range(t.row_begin, t.row_end);
    const std::optional<Matrix> bias = bias_of(a.bias, t.expert, t.column_begin, t.column_end);
    const bool in_bytes = a.int8_rows && multiplies_bytes(a.format, a.rows_width);
    const int64_t most = in_bytes ? (weight.has_codes() ? kFewBy4Bits : kFewBy8Bits)
                                  : (register_bytes() == 64 ? kFewRows : kFewRowsOf32);
    if (!a.transposed && has_lanes(dtype_) && given.rows <= most) {
      const FewRowsQuantized product{out, given, weight.row_range(t.column_begin, t.column_end),
                                     bias ? &*bias : nullptr, a.int8_rows};
      return on_widest(product, worker.left);
    }
    const bool as_they_lie = a.transposed || !weight.has_codes();
    const Matrix rows = as_they_lie && !a.int8_rows ? given : packed(worker, given, as_they_lie);
    if (a.transposed) return multiply_columns(worker, t, rows, weight, out);
    const QuantizedMatrix all = weight.row_range(t.column_begin, t.column_end);
    const DecodedLines<scalar_t> lines_of{all, worker.right, worker.out, multiplies_pairs()};
    if (worker.gemm.rows_by_lines(out, rows, bias, lines_of)) return;
    const bool few = worker.gemm.is_tiled() && rows.rows <= kFewOnTiles;
    const int64_t bytes = few ? kTiledBytes : kPanelBytes;
    const int64_t lines =
        std::max(kPanelLines, bytes / std::max<int64_t>(1, rows.columns * out.width()) / 16 * 16);
    for (int64_t c = 0; c < t.columns(); c += lines) {
      const int64_t end = std::min(c + lines, t.columns());
      const QuantizedMatrix some = weight.row_range(t.column_begin + c, t.column_begin + end);
      worker.gemm.rows_by_weight(
          out.column_range(c, end), rows, decoded(worker, some, 0, rows.columns),
          bias_of(a.bias, t.expert, t.column_begin + c, t.column_begin + end));
    }
  }

  // Rows times a weight as it lies: some columns of all lines at a time.
  void multiply_columns(Worker& worker, const Tile& t, const Matrix& rows,
                        const QuantizedMatrix& weight, const Matrix& out) const {
    for (int64_t c = 0; c < t.columns(); c += kPanelColumns) {
      const int64_t end = std::min(c + kPanelColumns, t.columns());
      const Matrix panel = decoded(worker, weight, t.column_begin + c, padded(end - c));
      const Matrix part = out.column_range(c, end);
      if (!weight.has_codes()) {
        worker.gemm.rows_by_weight(part, rows, panel.transposed(), std::nullopt);
        continue;
      }
      const Matrix product = worker.out.get(dtype_, rows.rows, panel.columns);
      worker.gemm.rows_by_weight(product, rows, panel.transposed(), std::nullopt);
      // From the panels' order of columns to the weight's.
      on_widest([&](auto bytes) __attribute__((always_inline)) {
        const auto unpack = [&](auto order) __attribute__((always_inline)) {
          for (int64_t r = 0; r < part.rows; ++r) {
            order.unpack(row_of<const scalar_t>(product, r), part.columns,
                         row_of<scalar_t>(part, r));
          }
        };
        with_panel_order<bytes, scalar_t>(multiplies_pairs(), unpack);
      });
    }
  }

  // Columns of panels: whole steps.
  int64_t padded(int64_t columns) const {
    return a.format == WeightFormat::kInt8 ? columns : (columns + kStep - 1) / kStep * kStep;
  }

  // Rows in the order of panels, filled up with zeros; rounded to whole numbers times their scale.
  Matrix packed(Worker& worker, const Matrix& rows, bool as_they_lie) const {
    using T = accumulate_t<scalar_t>;
    const int64_t M = rows.columns;
    const Matrix to = worker.left.get(dtype_, rows.rows, as_they_lie ? M : padded(M));
    auto* numbers = reinterpret_cast<T*>(worker.out.get(ScalarType::Double, 2, M).data);
    auto* rounded = reinterpret_cast<scalar_t*>(numbers + M);
    on_widest([&](auto bytes) __attribute__((always_inline)) {
      for (int64_t r = 0; r < rows.rows; ++r) {
        const auto* row = row_of<const scalar_t>(rows, r);
        auto* out = row_of<scalar_t>(to, r);
        if (a.int8_rows) {
          convert<bytes>(row, M, numbers);
          const T scale = round_row<bytes>(numbers, M);
          for (int64_t m = 0; m < M; ++m) numbers[m] *= scale;
          convert<bytes>(numbers, M, rounded);
          row = rounded;
        }
        if (as_they_lie) {
          std::copy_n(row, M, out);
          continue;
        }
        std::fill(out + M / kStep * kStep, out + to.columns, scalar_t(0));
        with_panel_order<bytes, scalar_t>(
            multiplies_pairs(),
            [&](auto order) __attribute__((always_inline)) { order.pack(row, M, out); });
      }
    });
    return to;
  }

  Matrix decoded(Worker& worker, const QuantizedMatrix& weight, int64_t begin,
                 int64_t columns) const {
    const Matrix panel = worker.right.get(dtype_, weight.rows, columns);
    on_widest(DecodePanel<scalar_t>{weight, begin, panel, multiplies_pairs(), true}, worker.out);
    return panel;
  }

  const QuantizedMMArgs& a;
  ScalarType dtype_;
};

Tensor quantized_mm_cpu(const QuantizedMMArgs& a) {
  return visit_float(a.rows.scalar_type(),
                     [&](auto zero) { return QuantizedProducts<decltype(zero)>(a).run(); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("quantized_mm", boxed<quantized_mm_args, quantized_mm_cpu>);
}

}  // namespace moe_ext
