// Activate: the activation between an expert's two products, on the rows that routes own, and its
// gradient with the same values again.
//
//   out[r, f] = w * fn(pre_activation[r, f])                                 without a gate
//   out[r, f] = w * fn(pre_activation[r, f]) * pre_activation[r, F + f]      with a gate
//
// w is the weight of the row's route, weights[t, k], or 1. A row without a route is not read, and
// its out is 0.
//
// Forward a thread takes one vector of one row. Backward a block takes a row, for the product that
// is the gradient of its weight: a thread adds its vectors in their order, then lanes and warps are
// added in a fixed order. The blocks before those give 0 to the weights of routes without a row.

#include <algorithm>

#include "../activation.h"
#include "rows.cuh"

namespace moe_ext::cuda {
namespace {

constexpr int kMaxWarps = 8, kMaxThreads = kMaxWarps * kWarp;

// The vectors of one row at one column: the gate's, and its factor.
template <typename Vector>
struct Inner {
  Vector gate, up;

  __device__ Inner(const Vector* pre_activation, int64_t row, int columns, int column, bool gated) {
    const Vector* at = pre_activation + row * columns * (gated ? 2 : 1) + column;
    gate = load(at);
    if (gated) up = load(at + columns);
  }
};

template <typename T, int kSize>
KERNEL(kRowThreads)
void activate_kernel(const Pack<T, kSize>* __restrict__ pre_activation,  // [R, columns or twice]
                     Routes routes, int columns, Activation activation,
                     Pack<T, kSize>* __restrict__ out) {  // [R, columns]
  using Sum = accumulate_t<T>;
  const int64_t cell = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, row = cell / columns;
  if (row >= routes.num_rows) return;
  Pack<T, kSize> result{};
  if (const int32_t route = route_of(routes, row); route >= 0) {
    const bool gated = is_gated(activation);
    const Inner in(pre_activation, row, columns, static_cast<int>(cell - row * columns), gated);
    const Sum weight = routes.weights ? load(static_cast<const Sum*>(routes.weights) + route) : 1;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const Sum value = activated(activation, widen(in.gate.at[j])).value;
      result.at[j] = narrow<T>(weight * (gated ? value * widen(in.up.at[j]) : value));
    }
  }
  store(out + cell, result);
}

template <typename T, int kSize>
struct Backward {
  const Pack<T, kSize>* grad;            // [R, columns]
  const Pack<T, kSize>* pre_activation;  // [R, columns], twice as many with a gate
  Pack<T, kSize>* grad_pre_activation;   // the same
  Pack<T, kSize>* active;                // [R, columns]
  accumulate_t<T>* grad_weights;         // [T, K]
};

// Writes both results of one vector, and returns its part of the weight's gradient.
template <typename T, int kSize>
__device__ accumulate_t<T> backward_vector(const Backward<T, kSize>& at, int64_t row, int columns,
                                           int column, Activation activation,
                                           accumulate_t<T> weight) {
  using Sum = accumulate_t<T>;
  const bool gated = is_gated(activation);
  const Inner in(at.pre_activation, row, columns, column, gated);
  const Pack<T, kSize> upstream = load(at.grad + row * columns + column);
  Pack<T, kSize> grad_gate, grad_up, active;
  Sum dot = 0;
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const ValueAndSlope<Sum> of_gate = activated(activation, widen(in.gate.at[j]));
    const Sum up = gated ? widen(in.up.at[j]) : Sum{1}, grad = widen(upstream.at[j]);
    const Sum result = gated ? of_gate.value * up : of_gate.value;
    dot += grad * result;
    active.at[j] = narrow<T>(weight * result);
    grad_gate.at[j] = narrow<T>(weight * grad * of_gate.slope * up);
    if (gated) grad_up.at[j] = narrow<T>(weight * grad * of_gate.value);
  }
  Pack<T, kSize>* grad_pre_activation =
      at.grad_pre_activation + row * columns * (gated ? 2 : 1) + column;
  store(at.active + row * columns + column, active);
  store(grad_pre_activation, grad_gate);
  if (gated) store(grad_pre_activation + columns, grad_up);
  return dot;
}

template <typename T, int kSize>
KERNEL(kMaxThreads)
void activate_backward_kernel(Backward<T, kSize> at, Routes routes, int columns,
                              Activation activation) {
  using Sum = accumulate_t<T>;
  const int64_t num_routes = routes.num_tokens * routes.top_k;
  const auto sweeps = static_cast<unsigned>(divide_up(num_routes, blockDim.x));
  if (blockIdx.x < sweeps) {
    const int64_t route = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (route < num_routes && row_of(routes, route) < 0) store(at.grad_weights + route, Sum{0});
    return;
  }
  const int64_t row = blockIdx.x - sweeps;
  const int32_t route = route_of(routes, row);
  if (route < 0) {
    const int inner_columns = columns * (is_gated(activation) ? 2 : 1);
    for (int column = threadIdx.x; column < inner_columns; column += blockDim.x) {
      store(at.grad_pre_activation + row * inner_columns + column, Pack<T, kSize>{});
      if (column < columns) store(at.active + row * columns + column, Pack<T, kSize>{});
    }
    return;
  }
  const Sum weight = load(static_cast<const Sum*>(routes.weights) + route);
  Sum sum = 0;
  for (int column = threadIdx.x; column < columns; column += blockDim.x) {
    sum += backward_vector(at, row, columns, column, activation, weight);
  }
  SharedMemory shared;
  Sum* partial = shared.take<Sum>(kMaxWarps);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  sum = lanes_sum<kWarp>(sum);
  if (lane == 0) partial[warp] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  Sum total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) total += partial[w];
  store(at.grad_weights + route, total);
}

}  // namespace

void activate(Dtype dtype, const void* pre_activation, const Routes& routes, int64_t width,
              Activation activation, void* out, CUstream_st* stream) {
  if (width == 0) return;
  visit_packs(dtype, width, {pre_activation, out}, [&](auto zero, auto size) {
    using T = decltype(zero);
    using Vector = Pack<T, size>;
    const int columns = num_columns(width, size);
    launch("activate", activate_kernel<T, size>, divide_up(routes.num_rows * columns, kRowThreads),
           kRowThreads, 0, stream, static_cast<const Vector*>(pre_activation), routes, columns,
           activation, static_cast<Vector*>(out));
  });
}

void activate_backward(const ActivateBackward& call, const Routes& routes, CUstream_st* stream) {
  visit_packs(
      call.dtype, call.width,
      {call.grad, call.pre_activation, call.grad_pre_activation, call.active},
      [&](auto zero, auto size) {
        using T = decltype(zero);
        using Vector = Pack<T, size>;
        using Sum = accumulate_t<T>;
        const int columns = num_columns(call.width, size);
        const int warps = std::clamp(static_cast<int>(divide_up(columns, kWarp)), 1, kMaxWarps);
        const Backward<T, size> at{
            static_cast<const Vector*>(call.grad), static_cast<const Vector*>(call.pre_activation),
            static_cast<Vector*>(call.grad_pre_activation), static_cast<Vector*>(call.active),
            static_cast<Sum*>(call.grad_weights)};
        const int64_t sweeps = divide_up(routes.num_tokens * routes.top_k, warps * kWarp);
        launch("activate_backward", activate_backward_kernel<T, size>, sweeps + routes.num_rows,
               warps * kWarp, shared_bytes<Sum>(kMaxWarps), stream, at, routes, columns,
               call.activation);
      });
}

}  // namespace moe_ext::cuda
