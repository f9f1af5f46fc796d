// Combine: sum every token's rows.
//
//   tokens[t, :] = sum over k of weights[t, k] * rows[slots[t, k], :]    (without a row: nothing)
//
// A thread takes one vector of one token: it reads that of kInFlight rows at once, adds them in the
// order of k, and rounds and writes the sum once.

#include "rows.cuh"

namespace moe_ext::cuda {
namespace {

template <typename T, int kSize>
KERNEL(kRowThreads, kRowBlocks)
void combine_kernel(const Pack<T, kSize>* __restrict__ rows,  // [R, columns]
                    Routes routes, Tiling tiling,
                    Pack<T, kSize>* __restrict__ tokens) {  // [T, columns]
  RouteTile<accumulate_t<T>> tile(routes, tiling, blockIdx.x);
  const Column<const Pack<T, kSize>> column(rows, tiling.columns, tile.cell.column);
  Pack<accumulate_t<T>, kSize> sum{};
  for (int64_t k = 0; k < routes.top_k; k += kChoices) {
    tile.read(k);
    if (!tile.cell.exists) continue;
#pragma unroll 1
    for (int first = 0; first < tile.count; first += kInFlight) {
      Pack<T, kSize> in[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        in[i] = {};
        if (const int32_t row = tile.row(first + i); row >= 0) in[i] = load(column.of(row));
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const accumulate_t<T> weight = tile.weight(first + i);
        const Pack<accumulate_t<T>, kSize> wide = widened(in[i]);
#pragma unroll
        for (int j = 0; j < kSize; ++j) sum.at[j] += weight * wide.at[j];
      }
    }
  }
  if (!tile.cell.exists) return;
  store(tokens + tile.cell.row * tiling.columns + tile.cell.column, narrowed<T>(sum));
}

}  // namespace

void combine(Dtype dtype, const void* rows, const Routes& routes, int64_t hidden, void* tokens,
             CUstream_st* stream) {
  if (hidden == 0) return;
  visit_packs(dtype, hidden, {rows, tokens}, [&](auto zero, auto size) {
    using T = decltype(zero);
    using Vector = Pack<T, size>;
    const Tiling tiling(routes.num_tokens, num_columns(hidden, size));
    launch("combine", combine_kernel<T, size>, tiling.blocks, tiling.threads(),
           RouteTile<accumulate_t<T>>::bytes(tiling), stream, static_cast<const Vector*>(rows),
           routes, tiling, static_cast<Vector*>(tokens));
  });
}

}  // namespace moe_ext::cuda
