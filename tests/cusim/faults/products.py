"""Faults of the products on tensor cores, and of what is beside them."""

from . import BARRIER

MUTANTS = {
    "products/operand.cuh": [
        # Copies, and the places of fragments.
        ("kIsRight ? lane / 16 : lane / 8 % 2;", "lane / 8 % 2;"),
        ("kIsRight ? lane / 8 % 2 : lane / 16;", "lane / 16;"),
        ("(lane_place ^ 2 * step)", "(lane_place + 2 * step)"),
        ("(lane_place ^ 2 * block)", "(lane_place + 2 * block)"),
        ("16 * kOfLine * block", "8 * kOfLine * block"),
        ("load_matrices_transposed(out", "load_matrices(out"),
        ("lane_place ^ (4 * block + 2 * row_half)", "lane_place ^ (2 * row_half)"),
        ("first_row / 4 + lane / 16", "first_row / 4"),
        ("rows_[i], left_ > 0", "rows_[i], true"),
        ("rows_[i] += kSliceDepth<T>;", ""),
        ("left_ > i * Of::kApart", "left_ > 0"),
        ("from_ += apart_;", ""),
        ("row < last_row_ ? found : -1", "found"),
        ("source_.find(min(row, last_row_ - 1))", "source_.find(row)"),
        ("is_route ? top_k.divide(route) : -1", "top_k.divide(route)"),
        ("2 * static_cast<unsigned>(n)", "static_cast<unsigned>(n)"),
    ],
    "products/main_loop.cuh": [
        # The ring of slices.
        ("wait_for_copies<kMostSlices - 2>()", "wait_for_copies<kMostSlices - 1>()"),
        ("wait_for_copies<kFewSlices - 2>()", "wait_for_copies<kFewSlices - 1>()"),
        ("i = 1; i < ring_slices", "i = 0; i < ring_slices"),
        (BARRIER, "", ": wait_for_copies<kFewSlices - 2>();"),
        (BARRIER, "", "if (slice == end) slice = ring;\n  }"),
        ("if (target == end) target = ring;", ""),
        ("if (slice == end) slice = ring;", ""),
        ("commit_copies();", "if (to_copy >= 0) commit_copies();"),
        ("right[2 * half], right[2 * half + 1]", "right[half], right[half + 2]"),
        ("add_both(all, sums[i][j], small_lefts[i], of_right);", ""),
        ("add_both(all, sums[i][j], lefts[i], small_right);", ""),
        ("add_slice_apart<N, Left, Right>(sums, slice", "add_slice<N, Left, Right>(sums, slice"),
        # Sums on their way to rows.
        ("__syncwarp();", "", "write(sums[i]);"),
        ("__syncwarp();", "", "[&](int column) { return read(row, column); });\n      }"),
        ("lane / 4 + 8 * half", "lane / 4"),
        ("v < 16 * vectors", "v < 8 * vectors"),
    ],
    "products/tiles.cuh": [
        ("min(max(load(groups.load + group), 0), end - first)", "load(groups.load + group)"),
        ("max(load(groups.offsets + group), 0)", "load(groups.offsets + group)"),
        ("before_ += __shfl_sync", "__shfl_sync"),
        ("first_ += kWarp;", "first_ += kWarp - 1;"),
        ("within - tile.column * count", "within"),
        ("<= row ? group : above", "< row ? group : above"),
        ("row < owned.first || row >= owned.last", "row > owned.last"),
    ],
    "products/grouped_mm.cuh": [
        ("column / kPairColumns % 2 * pair", "0"),
        ("n < product.width ? n : 0", "n"),
        ("min(tile.first_row + i, tile.last_row - 1)", "tile.first_row + i"),
        ("threadIdx.x < N::kM && ", ""),
        ("tile.first_row + row < tile.last_row && ", ""),
        (BARRIER, "", "store_vector<WarpSums<N>::kSize>(spot, read, column);\n    });"),
        ("epilogue.zero_rows(product.groups);", ""),
    ],
    "products/grouped_outer.cuh": [
        ("own < source.width ? own : 0", "own"),
        ("n >= height || m >= width", "n >= height"),
        (BARRIER, "", "narrowed<T>(read(column)));\n    });"),
    ],
    "products/epilogues.cuh": [
        ("add(sums, more, spot.weight)", "add(sums, more, 1)"),
        ("rounded(column + kPairColumns,", "rounded(column,"),
        ("found.inner.write(row_of(grad_pre_activation), columns, at);", ""),
        ("lanes_sum<kLanes>(dot)", "lanes_sum<kLanes / 2>(dot)"),
        ("spot.exists && column == 0", "column == 0"),
        ("gate.at[2 * j + 1]", "gate.at[2 * j]"),
        ("spot.row, width, spot.column / 2)", "spot.row, width, spot.column)"),
        ("is_gated(activation) && !is_interleaved(activation)", "is_gated(activation)"),
    ],
    "products/sum_dots.cu": [
        ("sum = lanes_sum<kWarp>(sum);", ""),
        ("if (row >= 0) {", "{"),
    ],
    "products/sum_rows.cu": [
        ("row += kWarps", "row += 1"),
        ("if (found < 0) continue;", ""),
        (BARRIER, "", "lane] = sum.at[j];"),
    ],
}
