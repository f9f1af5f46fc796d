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

// Block `sweep` of those that zero the empty rows, of `columns` vectors each. They come first:
// their reads, each after another, then overlap with what the other blocks move. Blocks are whole
// warps.
template <typename Vector>
__device__ void zero_empty_rows(const Routes& routes, int64_t sweep, int columns, Vector* rows) {
  const int64_t first = sweep * kRowsPerSweep, mine = first + threadIdx.x % kWarp;
  // Every warp of the block asks the same, and then zeroes its part of each row.
  unsigned empty = __ballot_sync(kAllLanes, mine < routes.num_rows && route_of(routes, mine) < 0);
  for (; empty; empty &= empty - 1) {
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
  constexpr int64_t kMaxColumns = INT32_MAX - kRowThreads;
  if (hidden / pack <= kMaxColumns) return static_cast<int>(hidden / pack);
  throw std::runtime_error("rows of more than " + std::to_string(kMaxColumns) + " vectors on cuda");
}

// How blocks share a [T, columns] matrix: a thread takes a cell, a block one part of a token's
// columns, or all columns of several tokens where rows are short.
//
//      0 .. width - 1   width .. 2 * width - 1   ..                   0 .. width - 1
//   t      block                block                 t, t + 1, ..         block
//   t+1    block                block
struct Tiling {
  int columns, width, parts, tokens_per_block;
  int64_t blocks;

  // columns: at least 1
  Tiling(const Routes& routes, int columns) : columns(columns) {
    parts = static_cast<int>(divide_up(columns, kRowThreads));
    // Whole warps, so that a warp reads whole lines.
    width = parts == 1 ? columns : static_cast<int>(divide_up(columns, parts * kWarp)) * kWarp;
    tokens_per_block = parts == 1 ? kRowThreads / columns : 1;
    blocks = divide_up(routes.num_tokens, tokens_per_block) * parts;
  }

  int threads() const {
    return static_cast<int>(divide_up(tokens_per_block * width, kWarp)) * kWarp;
  }
};

// A block's tile, and of its tokens' routes kChoices at a time: their rows and weights, read once,
// in shared memory.
template <typename Weight>
class RouteTile {
 public:
  __device__ RouteTile(const Routes& routes, const Tiling& tiling, unsigned block)
      : routes_(routes), num_routes_(tiling.tokens_per_block * kChoices) {
    const unsigned parts = tiling.parts, width = tiling.width;
    local_ = tiling.tokens_per_block == 1 ? 0 : threadIdx.x / width;
    first_token_ = int64_t{block / parts} * tiling.tokens_per_block;
    token = first_token_ + local_;
    const int within = threadIdx.x - local_ * width;
    column = block % parts * width + within;
    has_cell = local_ < tiling.tokens_per_block && within < tiling.width &&
               token < routes.num_tokens && column < tiling.columns;
    SharedMemory shared;
    rows_ = shared.take<int32_t>(num_routes_);
    if (routes_.weights) weights_ = shared.take<Weight>(num_routes_);
  }

  static std::size_t bytes(const Routes& routes, const Tiling& tiling) {
    const int64_t num_routes = int64_t{tiling.tokens_per_block} * kChoices;
    return shared_bytes<int32_t>(num_routes) +
           (routes.weights ? shared_bytes<Weight>(num_routes) : 0);
  }

  // The next choices first_choice .. first_choice + kChoices - 1 of all the block's tokens. All its
  // threads call this together.
  __device__ void read(int64_t first_choice) {
    if (first_choice > 0) __syncthreads();  // until all have used the choices before
    for (int i = threadIdx.x; i < num_routes_; i += blockDim.x) {
      const int64_t t = first_token_ + i / kChoices, k = first_choice + i % kChoices;
      const int64_t route = t * routes_.top_k + k;
      int32_t row = -1;
      Weight weight = 0;
      if (t < routes_.num_tokens && k < routes_.top_k) {
        if (weights_) weight = load(static_cast<const Weight*>(routes_.weights) + route);
        row = row_of(routes_, route);
      }
      rows_[i] = row;
      if (weights_) weights_[i] = row >= 0 ? weight : 0;
    }
    __syncthreads();
  }

  // The i-th choice, among those read, of this thread's token: its row or -1, and its weight, 0
  // without a row.
  __device__ int32_t row(int i) const { return rows_[local_ * kChoices + i]; }
  __device__ Weight weight(int i) const { return weights_ ? weights_[local_ * kChoices + i] : 1; }
  __device__ bool weighted() const { return weights_ != nullptr; }

  int64_t token;
  int column;
  bool has_cell;  // else this thread is past the end

 private:
  const Routes& routes_;
  int64_t first_token_;
  int local_, num_routes_;
  int32_t* rows_;
  Weight* weights_ = nullptr;
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
