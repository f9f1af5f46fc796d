// The sum of outer products of every group's rows:
//
//   out[e, n, m] = sum over the rows r of group e of left[r, n] * right[r, m]
//
// A tile adds all rows of its group, so no sum is split; a group without rows has zeros.

#pragma once

#include "main_loop.cuh"
#include "products.cuh"

namespace moe_ext::cuda {

// One side of a tile: the group's rows from a column on. Behind the last column, another.
template <typename T, int kRows, bool kGathers>
__device__ auto side_of(const RowSource& source, const GroupRows& rows, int first_column) {
  using Of = std::conditional_t<kGathers, GatheredColumns<T, kRows>, Columns<T, kRows>>;
  const int own = first_column + Of::Of::vector() * kFullPack<T>;
  const int column = own < source.width ? own : 0;
  if constexpr (kGathers) {
    return Of(source, rows.first, rows.last, column);
  } else {
    return Of(source.at<T>(rows.first, 0), rows.last - rows.first, source.width, column);
  }
}

template <typename N, bool kGathersLeft, bool kGathersRight>
KERNEL(kProductThreads, 2)
void grouped_outer_kernel(Outer outer) {
  using T = typename N::T;
  SharedMemory shared;
  using Left = Columns<T, N::kM>;
  using Right = Columns<T, N::kN>;
  uint4* ring = shared.take<uint4>(outer.ring_slices * slice_vectors<Left, Right>);
  const int height = outer.left.width, width = outer.right.width;
  const auto down = static_cast<int>(divide_up(height, N::kM));
  const auto across = static_cast<int>(divide_up(width, N::kN));
  const int64_t tiles = int64_t{outer.groups.num_groups} * down * across;
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const int group = static_cast<int>(index / (down * across));
    const int within = static_cast<int>(index - int64_t{group} * down * across);
    const int first_n = within % down * N::kM, first_m = within / down * N::kN;
    const GroupRows rows = rows_of(outer.groups, group);
    auto left = side_of<T, N::kM, kGathersLeft>(outer.left, rows, first_n);
    auto right = side_of<T, N::kN, kGathersRight>(outer.right, rows, first_m);
    typename N::Sums sums = {};
    const int slices = static_cast<int>(divide_up(rows.last - rows.first, kSliceDepth<T>));
    add_slices<N>(sums, ring, outer.ring_slices, slices, left, right);
    WarpSums<N>(ring).visit(sums, false, [&](int row, int column, const auto& read) {
      const int n = first_n + row, m = first_m + N::first_column() + column;
      if (n >= height || m >= width) return;
      T* to = static_cast<T*>(outer.out) + (int64_t{group} * height + n) * width + m;
      store(reinterpret_cast<Pack<T, WarpSums<N>::kSize>*>(to), narrowed<T>(read(column)));
    });
    __syncthreads();  // until all have read their sums
  }
}

template <typename T, int kTerms>
void grouped_outer_of(Outer outer, CUstream_st* stream) {
  using N = Numbers<T, kTerms, kMostRows<T>>;
  const Ring ring = ring_for<Columns<T, N::kM>, Columns<T, N::kN>>(0);
  outer.ring_slices = ring.slices;
  const int64_t tiles = outer.groups.num_groups * divide_up(outer.left.width, N::kM) *
                        divide_up(outer.right.width, N::kN);
  const int64_t blocks = std::min<int64_t>(tiles, num_multiprocessors() * 2);
  const auto start = [&](auto kernel) {
    require_tensor_cores("grouped_outer", kernel);
    launch("grouped_outer", kernel, blocks, kProductThreads, ring.bytes, stream, outer);
  };
  if (outer.left.gathers) {
    start(grouped_outer_kernel<N, true, false>);
  } else if (outer.right.gathers) {
    start(grouped_outer_kernel<N, false, true>);
  } else {
    start(grouped_outer_kernel<N, false, false>);
  }
}

}  // namespace moe_ext::cuda
