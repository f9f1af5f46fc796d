// Shared by dispatch, combine and route_dot: which row a route has, and rows that no route has.

#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "vec.cuh"

namespace moe_ext::cuda {

constexpr int kRowThreads = 256;
// Blocks that a multiprocessor is to hold: 64 registers for a thread, which none has to spill from.
constexpr int kRowBlocks = 4;
// Choices of a token that a block looks up at a time, and rows of it that a thread reads at a time:
// with four 16-byte reads each, as many threads fit a multiprocessor as it takes to hide its
// memory.
constexpr int kChoices = 8;
constexpr int kInFlight = 4;
static_assert(kChoices % kInFlight == 0);
// Rows that one block looks through for empty ones: a ballot's worth.
constexpr int kRowsPerSweep = kWarp;

// A route has a row where its slot is in range and sources gives that row back to it. Then every
// row has at most one route, whatever slots and sources hold. -1: none.
__device__ inline int32_t row_of(const Routes& routes, int64_t route) {
  const int32_t slot = load(routes.slots + route);
  if (slot < 0 || slot >= routes.num_rows) return -1;
  return load(routes.sources + slot) == route ? slot : -1;
}

// The other way round: the route that has a row. -1: none.
__device__ inline int32_t route_of(const Routes& routes, int64_t row) {
  const int32_t route = load(routes.sources + row);
  if (route < 0 || route >= routes.num_tokens * routes.top_k) return -1;
  return load(routes.slots + route) == row ? route : -1;
}

// A column of vectors in a matrix of rows: that of a row is one multiplication away.
template <typename Vector>
class Column {
 public:
  __device__ Column(Vector* rows, int columns, int column)
      : top_(reinterpret_cast<Bytes*>(rows + column)),
        stride_(static_cast<unsigned>(columns) * unsigned{sizeof(Vector)}) {}

  __device__ Vector* of(int32_t row) const {
    return reinterpret_cast<Vector*>(top_ + uint64_t{static_cast<unsigned>(row)} * stride_);
  }

 private:
  using Bytes = std::conditional_t<std::is_const_v<Vector>, const char, char>;
  Bytes* top_;
  unsigned stride_;  // bytes
};

// Block `sweep` of those that zero the empty rows, of `columns` vectors each. They come first:
// their reads, each after another, then overlap with what the other blocks move. A warp looks for
// the rows, and the block zeroes them; it has 16 bytes of shared memory or more.
template <typename Vector>
__device__ void zero_empty_rows(const Routes& routes, int64_t sweep, int columns, Vector* rows) {
  const int64_t first = sweep * kRowsPerSweep, mine = first + threadIdx.x;
  SharedMemory shared;
  unsigned* found = shared.take<unsigned>(1);
  if (threadIdx.x < kWarp) {
    const bool is_empty = mine < routes.num_rows && route_of(routes, mine) < 0;
    const unsigned lanes = __ballot_sync(kAllLanes, is_empty);
    if (threadIdx.x == 0) *found = lanes;
  }
  __syncthreads();
  for (unsigned empty = *found; empty; empty &= empty - 1) {
    Vector* row = rows + (first + __ffs(empty) - 1) * columns;
    for (int column = threadIdx.x; column < columns; column += blockDim.x) {
      store(row + column, Vector{});
    }
  }
}

__host__ __device__ inline unsigned num_sweeps(const Routes& routes) {
  return static_cast<unsigned>(divide_up(routes.num_rows, kRowsPerSweep));
}

// The vectors of a row.
inline int num_columns(int64_t hidden, int pack) {
  constexpr int64_t kMaxColumns = (1 << 27) - kRowThreads;  // 2 GiB
  if (hidden / pack <= kMaxColumns) return static_cast<int>(hidden / pack);
  throw std::runtime_error("rows of more than " + std::to_string(kMaxColumns) + " vectors on cuda");
}

// How blocks share a matrix of rows: a thread takes a cell, a block one part of a row's columns, or
// all columns of several rows where these are short.
//
//      0 .. width - 1   width .. 2 * width - 1   ..                   0 .. width - 1
//   r      block                block                 r, r + 1, ..         block
//   r+1    block                block
struct Tiling {
  int64_t num_rows, blocks;
  int columns, width, parts, rows_per_block;
  unsigned inverse_width;  // 2^16 / width, rounded up

  // columns: at least 1
  Tiling(int64_t num_rows, int columns) : num_rows(num_rows), columns(columns) {
    parts = static_cast<int>(divide_up(columns, kRowThreads));
    // Whole warps, so that a warp reads whole lines.
    width = parts == 1 ? columns : static_cast<int>(divide_up(columns, parts * kWarp)) * kWarp;
    rows_per_block = parts == 1 ? kRowThreads / columns : 1;
    blocks = divide_up(num_rows, rows_per_block) * parts;
    inverse_width = static_cast<unsigned>(divide_up(1 << 16, width));
  }

  int threads() const { return static_cast<int>(divide_up(rows_per_block * width, kWarp)) * kWarp; }
};

// Where a thread is in the tiling.
struct Cell {
  int64_t first_row, row;  // of the block, of the thread
  int local;               // row - first_row
  int column;
  bool exists;  // else the thread is past the end

  __device__ Cell(const Tiling& tiling, unsigned block) {
    const unsigned group = tiling.parts == 1 ? block : block / tiling.parts;
    const unsigned part = tiling.parts == 1 ? 0 : block - group * tiling.parts;
    static_assert(kRowThreads <= 256, "else the product below is not exact");
    local = static_cast<int>(threadIdx.x * tiling.inverse_width >> 16);  // threadIdx.x / width
    const int within = static_cast<int>(threadIdx.x) - local * tiling.width;
    first_row = int64_t{group} * tiling.rows_per_block;
    row = first_row + local;
    column = static_cast<int>(part) * tiling.width + within;
    exists = local < tiling.rows_per_block && row < tiling.num_rows && column < tiling.columns;
  }
};

// A block's tile, and of its tokens' routes kChoices at a time: their rows and weights, read once,
// in shared memory.
template <typename Weight>
class RouteTile {
 public:
  __device__ RouteTile(const Routes& routes, const Tiling& tiling, unsigned block)
      : cell(tiling, block), routes_(routes), num_routes_(tiling.rows_per_block * kChoices) {
    SharedMemory shared;
    rows_ = shared.take<int32_t>(num_routes_);
    weights_ = shared.take<Weight>(num_routes_);
  }

  static std::size_t bytes(const Tiling& tiling) {
    const int64_t num_routes = int64_t{tiling.rows_per_block} * kChoices;
    return shared_bytes<int32_t>(num_routes) + shared_bytes<Weight>(num_routes);
  }

  // The next choices first_choice .. first_choice + kChoices - 1 of all the block's tokens. All its
  // threads call this together.
  __device__ void read(int64_t first_choice) {
    if (first_choice > 0) __syncthreads();  // until all have used the choices before
    count = static_cast<int>(min(routes_.top_k - first_choice, int64_t{kChoices}));
    for (int i = threadIdx.x; i < num_routes_; i += blockDim.x) {
      const int64_t t = cell.first_row + i / kChoices, k = first_choice + i % kChoices;
      const int64_t route = t * routes_.top_k + k;
      int32_t row = -1;
      Weight weight = 1;
      if (t < routes_.num_tokens && k < routes_.top_k) {
        if (routes_.weights) weight = load(static_cast<const Weight*>(routes_.weights) + route);
        row = row_of(routes_, route);
      }
      rows_[i] = row;
      weights_[i] = row >= 0 ? weight : 0;
    }
    __syncthreads();
  }

  // The i-th choice, among those read, of this thread's token: its row or -1, and its weight, 0
  // without a row.
  __device__ int32_t row(int i) const { return rows_[cell.local * kChoices + i]; }
  __device__ Weight weight(int i) const { return weights_[cell.local * kChoices + i]; }

  const Cell cell;  // its row is a token
  int count;        // choices that were read

 private:
  const Routes& routes_;
  int num_routes_;
  int32_t* rows_;
  Weight* weights_;
};

// Calls body(T{}, std::integral_constant<int, elements>{}) with the widest pack that `hidden` and
// the addresses allow: 16 bytes or one element.
template <typename Body>
void visit_packs(Dtype dtype, int64_t hidden, std::initializer_list<const void*> addresses,
                 const Body& body) {
  visit_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    bool full = hidden % kFullPack<T> == 0;
    for (const void* address : addresses) full = full && aligned(address);
    if (full) {
      body(zero, std::integral_constant<int, kFullPack<T>>{});
    } else {
      body(zero, std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace moe_ext::cuda
