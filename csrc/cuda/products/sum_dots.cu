// The gradients of routes' weights from the parts that grouped_mm_activate_backward leaves:
//
//   grad_weights[t, k] = sum of dots[slots[t, k], :] + <grad[t, :], bias[e, :]>    (no row: 0)
//
// A warp takes a route. Its lanes add in their order, and are then added in a fixed order.

#include "operand.cuh"
#include "tiles.cuh"

namespace moe_ext::cuda {
namespace {

template <typename T>
KERNEL(kRowThreads, kRowBlocks)
void sum_dots_kernel(const float* __restrict__ dots,                    // [R, count]
                     int64_t count, const Pack<T, kFullPack<T>>* grad,  // [T, columns]
                     const Pack<T, kFullPack<T>>* bias,                 // [E, columns] or null
                     int64_t columns, Routes routes, Divisor top_k, Groups groups,
                     float* __restrict__ grad_weights) {  // [T, K]
  const int lane = threadIdx.x % kWarp;
  const int64_t route = (int64_t{blockIdx.x} * kRowThreads + threadIdx.x) / kWarp;
  if (route >= routes.num_tokens * routes.top_k) return;
  const int row = row_of(routes, route);
  float sum = 0;
  if (row >= 0) {
#pragma unroll 1
    for (int64_t i = lane; i < count; i += kWarp) sum += load(dots + row * count + i);
    if (bias) {
      const auto* of_token = grad + top_k.divide(static_cast<int>(route)) * columns;
      const auto* of_group = bias + group_of(groups, row) * columns;
#pragma unroll 2
      for (int64_t i = lane; i < columns; i += kWarp) {
        const auto left = widened(load(of_token + i)), right = widened(load(of_group + i));
#pragma unroll
        for (int j = 0; j < kFullPack<T>; ++j) sum += left.at[j] * right.at[j];
      }
    }
  }
  sum = lanes_sum<kWarp>(sum);
  if (lane == 0) store(grad_weights + route, sum);
}

}  // namespace

void sum_dots(const SumDots& call, CUstream_st* stream) {
  const int64_t blocks = divide_up(call.routes.num_tokens * call.routes.top_k, kRowThreads / kWarp);
  visit_dtype(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= 4) {
      using Vector = Pack<T, kFullPack<T>>;
      launch("sum_dots", sum_dots_kernel<T>, blocks, kRowThreads, 0, stream, call.dots,
             num_dots(call.width), static_cast<const Vector*>(call.grad),
             static_cast<const Vector*>(call.bias), call.hidden / kFullPack<T>, call.routes,
             Divisor(std::max<int64_t>(call.routes.top_k, 1)), call.groups, call.grad_weights);
    }
  });
}

}  // namespace moe_ext::cuda
