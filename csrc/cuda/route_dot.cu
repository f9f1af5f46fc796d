// Route dot: the product of every token with each of its rows; and combine_backward, which
// dispatches the tokens in the same pass. The gradients of a combine are a dispatch and a route dot
// of the same incoming gradient: together they read it from memory once.
//
//   dots[t, k]                 = sum over h of tokens[t, h] * rows[slots[t, k], h]    (no row: 0)
//   dispatched[slots[t, k], :] = weights[t, k] * tokens[t, :]                         (no route: 0)
//
// A block takes a token. A thread adds its vectors in their order, then lanes and warps are added
// in a fixed order. The blocks before those zero the empty rows.

#include <algorithm>

#include "rows.cuh"

namespace moe_ext::cuda {
namespace {

constexpr int kMaxWarps = 8, kMaxThreads = kMaxWarps * kWarp;

template <typename T, int kSize>
__device__ T dot(const Pack<T, kSize>& a, const Pack<T, kSize>& b) {
  T sum = 0;
#pragma unroll
  for (int j = 0; j < kSize; ++j) sum += a.at[j] * b.at[j];
  return sum;
}

template <typename T, int kSize, bool kDispatches>
KERNEL(kMaxThreads)
void route_dot_kernel(const Pack<T, kSize>* __restrict__ tokens,  // [T, columns]
                      const Pack<T, kSize>* __restrict__ rows,    // [R, columns]
                      Routes routes, int columns,
                      Pack<T, kSize>* __restrict__ dispatched,  // [R, columns] or null
                      accumulate_t<T>* __restrict__ dots) {     // [T, K]
  using Sum = accumulate_t<T>;
  const unsigned sweeps = kDispatches ? num_sweeps(routes) : 0;
  if (blockIdx.x < sweeps) return zero_empty_rows(routes, blockIdx.x, columns, dispatched);
  const int64_t token = blockIdx.x - sweeps;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  SharedMemory shared;
  int32_t* row = shared.take<int32_t>(kInFlight);
  Sum* weight = shared.take<Sum>(kInFlight);
  Sum* partial = shared.take<Sum>(kMaxWarps * kInFlight);

  for (int64_t k0 = 0; k0 < routes.top_k; k0 += kInFlight) {
    const int64_t mine = k0 + threadIdx.x, route = token * routes.top_k + mine;
    const bool has_route = threadIdx.x < kInFlight && mine < routes.top_k;
    if (threadIdx.x < kInFlight) row[threadIdx.x] = has_route ? row_of(routes, route) : -1;
    if (kDispatches && has_route) {
      weight[threadIdx.x] = load(static_cast<const Sum*>(routes.weights) + route);
    }
    __syncthreads();

    Sum sum[kInFlight] = {};
    for (int column = threadIdx.x; column < columns; column += blockDim.x) {
      const Column from(rows, columns, column);
      const Pack<Sum, kSize> x = widened(load(tokens + token * columns + column));
      Pack<T, kSize> in[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        in[i] = {};
        if (row[i] >= 0) in[i] = load(from.of(row[i]));
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (row[i] < 0) continue;
        sum[i] += dot(x, widened(in[i]));
        if constexpr (kDispatches) {
          store(Column(dispatched, columns, column).of(row[i]), scaled<T>(x, weight[i]));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const Sum total = lanes_sum<kWarp>(sum[i]);
      if (lane == 0) partial[warp * kInFlight + i] = total;
    }
    __syncthreads();
    if (has_route) {
      Sum total = 0;
      for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
        total += partial[w * kInFlight + threadIdx.x];
      }
      store(dots + route, total);
    }
  }
}

template <bool kDispatches>
void launch_route_dot(const char* name, Dtype dtype, const void* tokens, const void* rows,
                      const Routes& routes, int64_t hidden, void* dispatched, void* dots,
                      CUstream_st* stream) {
  visit_packs(dtype, hidden, {tokens, rows, dispatched}, [&](auto zero, auto size) {
    using T = decltype(zero);
    using Vector = Pack<T, size>;
    using Sum = accumulate_t<T>;
    const int columns = num_columns(hidden, size);
    // A thread takes two vectors or more, and no round of the block is half idle.
    const int64_t rounds = std::max<int64_t>(2, divide_up(columns, kMaxThreads));
    const int warps = std::max(1, static_cast<int>(divide_up(columns, rounds * kWarp)));
    const std::size_t shared = shared_bytes<int32_t>(kInFlight) + shared_bytes<Sum>(kInFlight) +
                               shared_bytes<Sum>(kMaxWarps * kInFlight);
    launch(name, route_dot_kernel<T, size, kDispatches>,
           routes.num_tokens + (kDispatches ? num_sweeps(routes) : 0), warps * kWarp, shared,
           stream, static_cast<const Vector*>(tokens), static_cast<const Vector*>(rows), routes,
           columns, static_cast<Vector*>(dispatched), static_cast<Sum*>(dots));
  });
}

}  // namespace

void route_dot(Dtype dtype, const void* tokens, const void* rows, const Routes& routes,
               int64_t hidden, void* dots, CUstream_st* stream) {
  launch_route_dot<false>("route_dot", dtype, tokens, rows, routes, hidden, nullptr, dots, stream);
}

void combine_backward(Dtype dtype, const void* tokens, const void* rows, const Routes& routes,
                      int64_t hidden, void* dispatched, void* dots, CUstream_st* stream) {
  launch_route_dot<true>("combine_backward", dtype, tokens, rows, routes, hidden, dispatched, dots,
                         stream);
}

}  // namespace moe_ext::cuda
