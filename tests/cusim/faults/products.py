"""Faults of the products on tensor cores, and of what is beside them."""

from . import BARRIER, Mutant

TESTS = ["products"]
OPERAND, LOOP, TILES = "products/operand.cuh", "products/main_loop.cuh", "products/tiles.cuh"
MM, OUTER = "products/grouped_mm.cuh", "products/grouped_outer.cuh"
EPILOGUES, DOTS, ROWS = "products/epilogues.cuh", "products/sum_dots.cu", "products/sum_rows.cu"
MUTANTS = [
    # Copies, and the places of fragments.
    Mutant(OPERAND, "kIsRight ? lane / 16 : lane / 8 % 2;", "lane / 8 % 2;"),
    Mutant(OPERAND, "kIsRight ? lane / 8 % 2 : lane / 16;", "lane / 16;"),
    Mutant(OPERAND, "(lane_place ^ 2 * step)", "(lane_place + 2 * step)"),
    Mutant(OPERAND, "(lane_place ^ 2 * block)", "(lane_place + 2 * block)"),
    Mutant(OPERAND, "16 * kOfLine * block", "8 * kOfLine * block"),
    Mutant(OPERAND, "load_matrices_transposed(out", "load_matrices(out"),
    Mutant(OPERAND, "lane_place ^ (4 * block + 2 * row_half)", "lane_place ^ (2 * row_half)"),
    Mutant(OPERAND, "first_row / 4 + lane / 16", "first_row / 4"),
    Mutant(OPERAND, "rows_[i], left_ > 0", "rows_[i], true"),
    Mutant(OPERAND, "rows_[i] += kSliceDepth<T>;", ""),
    Mutant(OPERAND, "left_ > i * Of::kApart", "left_ > 0"),
    Mutant(OPERAND, "from_ += apart_;", ""),
    Mutant(OPERAND, "row < last_row_ ? found : -1", "found"),
    Mutant(OPERAND, "source_.find(min(row, last_row_ - 1))", "source_.find(row)"),
    Mutant(OPERAND, "is_route ? top_k.divide(route) : -1", "top_k.divide(route)"),
    Mutant(OPERAND, "2 * static_cast<unsigned>(n)", "static_cast<unsigned>(n)"),
    # The ring of slices.
    Mutant(LOOP, "wait_for_copies<kMostSlices - 2>()", "wait_for_copies<kMostSlices - 1>()"),
    Mutant(LOOP, "wait_for_copies<kFewSlices - 2>()", "wait_for_copies<kFewSlices - 1>()"),
    Mutant(LOOP, "i = 1; i < ring_slices", "i = 0; i < ring_slices"),
    Mutant(LOOP, BARRIER, "", after=": wait_for_copies<kFewSlices - 2>();"),
    Mutant(LOOP, BARRIER, "", after="if (slice == end) slice = ring;\n  }"),
    Mutant(LOOP, "if (target == end) target = ring;", ""),
    Mutant(LOOP, "if (slice == end) slice = ring;", ""),
    Mutant(LOOP, "commit_copies();", "if (to_copy >= 0) commit_copies();"),
    Mutant(LOOP, "right[2 * half], right[2 * half + 1]", "right[half], right[half + 2]"),
    Mutant(LOOP, "add_both(all, sums[i][j], small_lefts[i], of_right);", ""),
    Mutant(LOOP, "add_both(all, sums[i][j], lefts[i], small_right);", ""),
    Mutant(
        LOOP, "add_slice_apart<N, Left, Right>(sums, slice", "add_slice<N, Left, Right>(sums, slice"
    ),
    # Sums on their way to rows.
    Mutant(LOOP, "__syncwarp();", "", after="write(sums[i]);"),
    Mutant(
        LOOP, "__syncwarp();", "", after="[&](int column) { return read(row, column); });\n      }"
    ),
    Mutant(LOOP, "lane / 4 + 8 * half", "lane / 4"),
    Mutant(LOOP, "v < 16 * vectors", "v < 8 * vectors"),
    # Tiles.
    Mutant(
        TILES, "min(max(load(groups.load + group), 0), end - first)", "load(groups.load + group)"
    ),
    Mutant(TILES, "max(load(groups.offsets + group), 0)", "load(groups.offsets + group)"),
    Mutant(TILES, "before_ += __shfl_sync", "__shfl_sync"),
    Mutant(TILES, "first_ += kWarp;", "first_ += kWarp - 1;"),
    Mutant(TILES, "within - tile.column * count", "within"),
    Mutant(TILES, "<= row ? group : above", "< row ? group : above"),
    Mutant(TILES, "row < owned.first || row >= owned.last", "row > owned.last"),
    # Columns and rows of tiles.
    Mutant(MM, "column / kPairColumns % 2 * pair", "0"),
    Mutant(MM, "n < product.width ? n : 0", "n"),
    Mutant(MM, "min(tile.first_row + i, tile.last_row - 1)", "tile.first_row + i"),
    Mutant(MM, "threadIdx.x < N::kM && ", ""),
    Mutant(MM, "tile.first_row + row < tile.last_row && ", ""),
    Mutant(MM, BARRIER, "", after="store_vector<WarpSums<N>::kSize>(spot, read, column);\n    });"),
    Mutant(MM, "epilogue.zero_rows(product.groups);", ""),
    Mutant(OUTER, "own < source.width ? own : 0", "own"),
    Mutant(OUTER, "n >= height || m >= width", "n >= height"),
    Mutant(OUTER, BARRIER, "", after="narrowed<T>(read(column)));\n    });"),
    # Epilogues.
    Mutant(EPILOGUES, "add(sums, more, spot.weight)", "add(sums, more, 1)"),
    Mutant(EPILOGUES, "rounded(column + kPairColumns,", "rounded(column,"),
    Mutant(EPILOGUES, "found.inner.write(row_of(grad_pre_activation), columns, at);", ""),
    Mutant(EPILOGUES, "lanes_sum<kLanes>(dot)", "lanes_sum<kLanes / 2>(dot)"),
    Mutant(EPILOGUES, "spot.exists && column == 0", "column == 0"),
    Mutant(DOTS, "sum = lanes_sum<kWarp>(sum);", ""),
    Mutant(DOTS, "if (row >= 0) {", "{"),
    Mutant(ROWS, "row += kWarps", "row += 1"),
    Mutant(ROWS, "if (found < 0) continue;", ""),
    Mutant(ROWS, BARRIER, "", after="lane] = sum.at[j];"),
    Mutant(EPILOGUES, "gate.at[2 * j + 1]", "gate.at[2 * j]"),
    Mutant(
        "products/epilogues.cuh",
        "spot.row, width, spot.column / 2)",
        "spot.row, width, spot.column)",
    ),
    Mutant(
        EPILOGUES,
        "is_gated(activation) && !is_interleaved(activation)",
        "is_gated(activation)",
    ),
]
