// Grouped matrix products: one GEMM per expert on the rows that routes own.
//
//   grouped_mm:     out[r, :]    = weights[e] @ rows[r, :] + bias[e]       r in the rows of e
//   grouped_outer:  out[e, :, :] = sum over those r of left[r, :] ⊗ right[r, :]
//
// All other rows are never read and come out zero.

#include "products.h"

namespace moe_ext {
namespace {

Tensor grouped_mm_cpu(const GroupedMMArgs& a) {
  const std::vector<Range> owned = owned_rows(Check("grouped_mm"), a.groups, a.num_rows);
  const Tensor out = fresh(a.rows, {a.num_rows, a.out_width}, a.rows.scalar_type());
  const Matrix all_out = matrix_of(out);
  const Matrix all_rows = matrix_of(a.rows);
  zero_unowned(all_out, owned);

  std::vector<Tile> tiles;
  add_row_tiles(tiles, owned, a.out_width);
  run(tiles, a.rows.scalar_type(), [&](Worker& worker, const Tile& t) {
    multiply_tile(worker, t, all_out, all_rows.row_range(t.row_begin, t.row_end),
                  matrix_of(a.weights, t.expert), a.bias);
  });
  return out;
}

Tensor grouped_outer_cpu(const GroupedOuterArgs& a) {
  const std::vector<Range> owned = owned_rows(Check("grouped_outer"), a.groups, a.num_rows);
  const Tensor out =
      fresh(a.left, {a.groups.num_experts, a.left_width, a.right_width}, a.left.scalar_type());

  std::vector<Tile> tiles;
  add_outer_tiles(tiles, a.groups.num_experts, a.left_width, a.right_width);
  const Matrix left_rows = matrix_of(a.left), right_rows = matrix_of(a.right);
  run(tiles, a.left.scalar_type(), [&](Worker& worker, const Tile& t) {
    const auto [begin, end] = owned[t.expert];
    outer_tile(worker, t, out, left_rows.row_range(begin, end), right_rows.row_range(begin, end));
  });
  return out;
}

std::string products_cpu(const Tensor& rows) { return Borders(rows.scalar_type()).text(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("grouped_mm", boxed<grouped_mm_args, grouped_mm_cpu>);
  m.impl("grouped_outer", boxed<grouped_outer_args, grouped_outer_cpu>);
  m.impl("products", TORCH_BOX(&products_cpu));
}

}  // namespace moe_ext
