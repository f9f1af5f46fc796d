// The sum of every group's rows, the gradient of a bias:
//
//   out[e, :] = sum over the rows r of group e of w[r] * rows[r, :]
//
// w is the weight of the row's route, or 1. A block takes 32 vectors of a group. Each of its warps
// adds every eighth row in their order; then the warps are added in theirs.

#include "operand.cuh"
#include "tiles.cuh"

namespace moe_ext::cuda {
namespace {

constexpr int kWarps = 8;

template <typename T>
KERNEL(kWarps* kWarp)
void sum_rows_kernel(RowSource source, bool weighs, Groups groups, T* __restrict__ out) {
  constexpr int kSize = kFullPack<T>;
  const int lane = threadIdx.x % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int parts = static_cast<int>(divide_up(source.width, kWarp * kSize));
  const int group = static_cast<int>(blockIdx.x) / parts;
  const int column = (static_cast<int>(blockIdx.x) % parts * kWarp + lane) * kSize;
  const GroupRows rows = rows_of(groups, group);
  Pack<float, kSize> sum{};
  for (int row = rows.first + warp; row < rows.last && column < source.width; row += kWarps) {
    const int found = source.gathers ? source.find(row) : row;
    if (found < 0) continue;
    float weight = 1;
    if (weighs) {
      const int route = route_of(source.routes, row);
      weight = route < 0 ? 0 : load(static_cast<const float*>(source.routes.weights) + route);
    }
    const auto* from = reinterpret_cast<const Pack<T, kSize>*>(source.at<T>(found, column));
    const Pack<float, kSize> numbers = widened(load(from));
#pragma unroll
    for (int j = 0; j < kSize; ++j) sum.at[j] += weight * numbers.at[j];
  }
  SharedMemory shared;
  float* partial = shared.take<float>(kWarps * kSize * kWarp);  // [warp, number, lane]
#pragma unroll
  for (int j = 0; j < kSize; ++j) partial[(warp * kSize + j) * kWarp + lane] = sum.at[j];
  __syncthreads();
  if (warp > 0 || column >= source.width) return;
  for (int w = 1; w < kWarps; ++w) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) sum.at[j] += partial[(w * kSize + j) * kWarp + lane];
  }
  store(reinterpret_cast<Pack<T, kSize>*>(out + int64_t{group} * source.width + column),
        narrowed<T>(sum));
}

}  // namespace

void sum_rows(const SumRows& call, void* out, CUstream_st* stream) {
  visit_dtype(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= 4) {
      const RowSource source = source_of(call.rows, call.width, call.gathers, call.routes);
      const int64_t parts = divide_up(call.width, kWarp * kFullPack<T>);
      launch("sum_rows", sum_rows_kernel<T>, call.groups.num_groups * parts, kWarps * kWarp,
             shared_bytes<float>(kWarps * kFullPack<T> * kWarp), stream, source, call.weighs,
             call.groups, static_cast<T*>(out));
    }
  });
}

}  // namespace moe_ext::cuda
