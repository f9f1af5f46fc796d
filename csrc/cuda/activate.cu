// Activate: the activation between an expert's two products, on the rows that routes own, and its
// gradient with the same values again.
//
//   out[r, f] = w * fn(pre_activation[r, f])                                 without a gate
//   out[r, f] = w * fn(pre_activation[r, f]) * pre_activation[r, F + f]      with a gate
//   out[r, f] = w * fn(pre_activation[r, 2f]) * factor(pre_activation[r, 2f + 1])    interleaved
//
// w is the weight of the row's route, weights[t, k], or 1. A row without a route is not read, and
// its out is 0.
//
// Forward a thread takes one vector of one row. Backward a block takes a row, for the product that
// is the gradient of its weight: a thread adds its vectors in their order, then lanes and warps are
// added in a fixed order. The blocks before those give 0 to the weights of routes without a row.

#include <algorithm>

#include "activation.cuh"
#include "rows.cuh"

namespace moe_ext::cuda {
namespace {

constexpr int kMaxWarps = 8, kMaxThreads = kMaxWarps * kWarp;

template <typename T, int kSize, Activation kActivation>
KERNEL(kRowThreads)
void activate_kernel(const Pack<T, kSize>* __restrict__ pre_activation,  // [R, columns or twice]
                     Routes routes, Tiling tiling,
                     Pack<T, kSize>* __restrict__ out) {  // [R, columns]
  using Sum = accumulate_t<T>;
  using In = Inner<kActivation, T, kSize>;
  const Cell cell(tiling, blockIdx.x);
  SharedMemory shared;
  int32_t* all_routes = shared.take<int32_t>(tiling.rows_per_block);
  Sum* weights = shared.take<Sum>(tiling.rows_per_block);
  for (int i = threadIdx.x; i < tiling.rows_per_block; i += blockDim.x) {
    const int64_t row = cell.first_row + i;
    const int32_t route = row < routes.num_rows ? route_of(routes, row) : -1;
    const bool weighted = route >= 0 && routes.weights;
    all_routes[i] = route;
    weights[i] = weighted ? load(static_cast<const Sum*>(routes.weights) + route) : 1;
  }
  __syncthreads();
  if (!cell.exists) return;
  Pack<T, kSize> result{};
  if (all_routes[cell.local] >= 0) {
    const In in = In::read(pre_activation + cell.row * In::of_row(tiling.columns), tiling.columns,
                           cell.column);
    const Sum weight = weights[cell.local];
    result = activated_pack<T, kActivation>(widened(in.gate), widened(in.up), weight);
  }
  store(out + cell.row * tiling.columns + cell.column, result);
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
template <Activation kActivation, typename T, int kSize>
__device__ accumulate_t<T> backward_vector(const Backward<T, kSize>& at, int64_t row, int columns,
                                           int column, accumulate_t<T> weight) {
  using In = Inner<kActivation, T, kSize>;
  const int64_t first = row * In::of_row(columns);
  const auto gradient =
      activation_gradient(In::read(at.pre_activation + first, columns, column),
                          widened(load(at.grad + row * columns + column)), weight);
  store(at.active + row * columns + column, gradient.active);
  gradient.inner.write(at.grad_pre_activation + first, columns, column);
  return gradient.dot;
}

template <typename T, int kSize, Activation kActivation>
KERNEL(kMaxThreads, 2)  // without the second number nvcc spills float64; at 64 registers, others
void activate_backward_kernel(Backward<T, kSize> at, Routes routes, int columns) {
  using Sum = accumulate_t<T>;
  const int64_t num_routes = routes.num_tokens * routes.top_k;
  const auto sweeps = static_cast<unsigned>(divide_up(num_routes, blockDim.x));
  if (blockIdx.x < sweeps) {
    const int64_t route = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (route < num_routes && row_of(routes, route) < 0) store(at.grad_weights + route, Sum{0});
    return;
  }
  const int64_t row = blockIdx.x - sweeps;
  SharedMemory shared;
  int32_t* found = shared.take<int32_t>(1);
  Sum* partial = shared.take<Sum>(kMaxWarps);
  Sum* found_weight = shared.take<Sum>(1);
  if (threadIdx.x == 0) {
    *found = route_of(routes, row);
    if (*found >= 0) *found_weight = load(static_cast<const Sum*>(routes.weights) + *found);
  }
  __syncthreads();
  const int32_t route = *found;
  if (route < 0) {
    const int inner_columns = Inner<kActivation, T, kSize>::of_row(columns);
    for (int column = threadIdx.x; column < inner_columns; column += blockDim.x) {
      store(at.grad_pre_activation + row * inner_columns + column, Pack<T, kSize>{});
      if (column < columns) store(at.active + row * columns + column, Pack<T, kSize>{});
    }
    return;
  }
  const Sum weight = *found_weight;
  Sum sum = 0;
  for (int column = threadIdx.x; column < columns; column += blockDim.x) {
    sum += backward_vector<kActivation>(at, row, columns, column, weight);
  }
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  sum = lanes_sum<kWarp>(sum);
  if (lane == 0) partial[warp] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  Sum total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) total += partial[w];
  store(at.grad_weights + route, total);
}

template <typename Body>
void visit_activation(Activation activation, const Body& body) {
  using A = Activation;
  visit_constant<A::kSwiglu, A::kGeglu, A::kSwigluOai, A::kGelu, A::kRelu, A::kRelu2>(activation,
                                                                                      body);
}

}  // namespace

void activate(Dtype dtype, const void* pre_activation, const Routes& routes, int64_t width,
              Activation activation, void* out, CUstream_st* stream) {
  if (width == 0) return;
  visit_packs(dtype, width, {pre_activation, out}, [&](auto zero, auto size) {
    using T = decltype(zero);
    using Vector = Pack<T, size>;
    const Tiling tiling(routes.num_rows, num_columns(width, size));
    visit_activation(activation, [&](auto which) {
      launch("activate", activate_kernel<T, size, which>, tiling.blocks, tiling.threads(),
             shared_bytes<int32_t>(tiling.rows_per_block) +
                 shared_bytes<accumulate_t<T>>(tiling.rows_per_block),
             stream, static_cast<const Vector*>(pre_activation), routes, tiling,
             static_cast<Vector*>(out));
    });
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
        visit_activation(call.activation, [&](auto which) {
          launch("activate_backward", activate_backward_kernel<T, size, which>,
                 sweeps + routes.num_rows, warps * kWarp,
                 shared_bytes<int32_t>(1) + shared_bytes<Sum>(kMaxWarps) + shared_bytes<Sum>(1),
                 stream, at, routes, columns);
        });
      });
}

}  // namespace moe_ext::cuda
