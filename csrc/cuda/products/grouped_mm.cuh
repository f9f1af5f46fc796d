// The product of every group's rows and its weights, whose sums an epilogue takes:
//
//   sums[r, n] = sum over m of rows[r, m] * weights[e, n, m]        for the rows r of group e
//
// Blocks stay for as many tiles as it takes. In pairs a tile has the gates' columns and those of
// what they multiply by turns of 32, so that a warp has both of a pair.

#pragma once

#include "main_loop.cuh"
#include "products.cuh"

namespace moe_ext::cuda {

// The route of a tile's row.
struct OfRow {
  float weight;
  bool has_route;
};

template <typename N>
__host__ __device__ constexpr int tile_columns(bool in_pairs) {
  return in_pairs ? N::kN / 2 : N::kN;
}

// The column of the weights that a tile's column is; behind the last, another.
template <typename N>
__device__ int weights_column(const Product& product, int pair, int tile, int column) {
  if (pair == 0) {
    const int n = tile * N::kN + column;
    return n < product.width ? n : 0;
  }
  const int n = tile * (N::kN / 2) + column / kWarpColumns * kPairColumns + column % kPairColumns;
  return n < pair ? n + column / kPairColumns % 2 * pair : 0;
}

// The right operand of a tile, the weights of its group.
template <typename N, bool kTransposed>
__device__ auto weights_of(const Product& product, int pair, const Tile& tile) {
  using T = typename N::T;
  const T* weights =
      static_cast<const T*>(product.weights) + int64_t{tile.group} * product.width * product.depth;
  const auto column_of = [&](int column) {
    return weights_column<N>(product, pair, tile.column, column);
  };
  if constexpr (kTransposed) {
    using Of = Columns<T, N::kN>;
    return Of(weights, product.depth, product.width, column_of(Of::Of::vector() * kFullPack<T>));
  } else {
    return Lines<T, N::kN>(product.depth, [&](int column) {
      return weights + int64_t{column_of(column)} * product.depth;
    });
  }
}

// Multiplies all tiles of a block. right_of(tile): its right operand. The ring has slices of both,
// and of_rows kM routes.
template <typename N, typename Epilogue, typename RightOf>
__device__ void multiply_tiles(const Product& product, const Epilogue& epilogue, uint4* ring,
                               OfRow* of_rows, const RightOf& right_of) {
  using T = typename N::T;
  const int pair = epilogue.pair();
  const int columns = pair ? pair : product.width;
  Tiles<N::kM> tiles(product.groups,
                     static_cast<int>(divide_up(columns, tile_columns<N>(pair > 0))));
  Tile tile;
  for (int64_t index = blockIdx.x; tiles.find(index, tile); index += gridDim.x) {
    if (threadIdx.x < N::kM && epilogue.needs_weights()) {
      const int row = tile.first_row + static_cast<int>(threadIdx.x);
      const int route = row < tile.last_row ? route_of(product.rows.routes, row) : -1;
      const auto* weights = static_cast<const float*>(product.rows.routes.weights);
      of_rows[threadIdx.x] = {route < 0 ? 0 : load(weights + route), route >= 0};
    }
    Lines<T, N::kM> left(product.depth, [&](int i) {
      const int row = min(tile.first_row + i, tile.last_row - 1);
      return product.rows.at<T>(product.rows.gathers ? max(product.rows.find(row), 0) : row, 0);
    });
    auto right = right_of(tile);
    typename N::Sums sums = {};
    const int slices = static_cast<int>(divide_up(product.depth, kSliceDepth<T>));
    add_slices<N>(sums, ring, product.ring_slices, slices, left, right);

    const int first_column = (tile.column * N::kN + N::first_column()) / (pair ? 2 : 1);
    WarpSums<N>(ring).visit(sums, pair > 0, [&](int row, int column, const auto& read) {
      const OfRow of_row = epilogue.needs_weights() ? of_rows[row] : OfRow{1, true};
      const Spot spot{tile.group,
                      tile.first_row + row,
                      first_column + column,
                      tile.first_row + row < tile.last_row && first_column + column < columns,
                      of_row.weight,
                      of_row.has_route};
      epilogue.template store_vector<WarpSums<N>::kSize>(spot, read, column);
    });
    __syncthreads();  // until all have read their sums and weights
  }
  epilogue.zero_rows(product.groups);
}

template <typename N, bool kTransposed>
using RightOf =
    std::conditional_t<kTransposed, Columns<typename N::T, N::kN>, Lines<typename N::T, N::kN>>;

template <typename N, bool kTransposed, typename Epilogue>
KERNEL(kProductThreads, 2)
void grouped_mm_kernel(Product product, Epilogue epilogue) {
  using Left = Lines<typename N::T, N::kM>;
  SharedMemory shared;
  uint4* ring =
      shared.take<uint4>(product.ring_slices * slice_vectors<Left, RightOf<N, kTransposed>>);
  OfRow* of_rows = shared.take<OfRow>(N::kM);
  multiply_tiles<N>(product, epilogue, ring, of_rows, [&](const Tile& tile) {
    return weights_of<N, kTransposed>(product, epilogue.pair(), tile);
  });
}

// As many blocks of so much shared memory as stay, for so many tiles of columns.
template <typename N>
int64_t num_blocks(const Product& product, int64_t columns, std::size_t bytes) {
  const int64_t tiles = (product.groups.num_rows / N::kM + product.groups.num_groups) * columns;
  const int of_multiprocessor = 2 * (bytes + kReservedBytes) <= shared_per_multiprocessor() ? 2 : 1;
  return std::min<int64_t>(tiles, num_multiprocessors() * of_multiprocessor);
}

template <typename N, bool kTransposed, typename Epilogue>
void launch_grouped_mm(const char* name, Product product, const Epilogue& epilogue,
                       CUstream_st* stream) {
  const auto kernel = grouped_mm_kernel<N, kTransposed, Epilogue>;
  require_tensor_cores(name, kernel);
  const Ring ring =
      ring_for<Lines<typename N::T, N::kM>, RightOf<N, kTransposed>>(shared_bytes<OfRow>(N::kM));
  product.ring_slices = ring.slices;
  const int pair = epilogue.pair();
  const int64_t columns = divide_up(pair ? pair : product.width, tile_columns<N>(pair > 0));
  launch(name, kernel, num_blocks<N>(product, columns, ring.bytes), kProductThreads, ring.bytes,
         stream, product, epilogue);
}

template <typename T, int kTerms, typename Epilogue>
void grouped_mm_of(const char* name, const Product& product, bool transposed,
                   const Epilogue& epilogue, CUstream_st* stream) {
  // By the mean of a group's rows, which the shapes tell.
  const bool many = product.groups.num_rows >= int64_t{96} * product.groups.num_groups;
  visit_constant<true, false>(many, [&](auto is_many) {
    visit_constant<true, false>(transposed, [&](auto is_transposed) {
      using N = Numbers<T, kTerms, is_many ? kMostRows<T> : kFewRows>;
      launch_grouped_mm<N, is_transposed>(name, product, epilogue, stream);
    });
  });
}

}  // namespace moe_ext::cuda
