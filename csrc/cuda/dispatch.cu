// Dispatch: copy every token into the rows that its choices were given.
//
//   rows[slots[t, k], :] = weights[t, k] * tokens[t, :]    where the route has a row
//   rows[r, :]           = 0                               where the row has no route
//
// A thread takes one vector of one token: it is read once and written K times. The blocks before
// those zero the empty rows.

#include "rows.cuh"

namespace moe_ext::cuda {
namespace {

template <typename T, int kSize, bool kWeighted>
KERNEL(kRowThreads, kRowBlocks)
void dispatch_kernel(const Pack<T, kSize>* __restrict__ tokens,  // [T, columns]
                     Routes routes, Tiling tiling,
                     Pack<T, kSize>* __restrict__ rows) {  // [R, columns]
  const unsigned sweeps = num_sweeps(routes);
  if (blockIdx.x < sweeps) return zero_empty_rows(routes, blockIdx.x, tiling.columns, rows);
  RouteTile<accumulate_t<T>> tile(routes, tiling, blockIdx.x - sweeps);
  const Column<Pack<T, kSize>> column(rows, tiling.columns, tile.cell.column);
  Pack<T, kSize> token{};
  if (tile.cell.exists) token = load(tokens + tile.cell.row * tiling.columns + tile.cell.column);
  for (int64_t k = 0; k < routes.top_k; k += kChoices) {
    tile.read(k);
    if (!tile.cell.exists) continue;
    const Pack<accumulate_t<T>, kSize> wide = widened(token);
#pragma unroll 1
    for (int first = 0; first < tile.count; first += kInFlight) {
#pragma unroll
      for (int i = first; i < first + kInFlight; ++i) {
        const int32_t row = tile.row(i);
        if (row < 0) continue;
        store(column.of(row), kWeighted ? scaled<T>(wide, tile.weight(i)) : token);
      }
    }
  }
}

template <bool kWeighted>
void launch_dispatch(Dtype dtype, const void* tokens, const Routes& routes, int64_t hidden,
                     void* rows, CUstream_st* stream) {
  visit_packs(dtype, hidden, {tokens, rows}, [&](auto zero, auto size) {
    using T = decltype(zero);
    using Vector = Pack<T, size>;
    const Tiling tiling(routes.num_tokens, num_columns(hidden, size));
    launch("dispatch", dispatch_kernel<T, size, kWeighted>, tiling.blocks + num_sweeps(routes),
           tiling.threads(), RouteTile<accumulate_t<T>>::bytes(tiling), stream,
           static_cast<const Vector*>(tokens), routes, tiling, static_cast<Vector*>(rows));
  });
}

}  // namespace

void dispatch(Dtype dtype, const void* tokens, const Routes& routes, int64_t hidden, void* rows,
              CUstream_st* stream) {
  if (hidden == 0) return;
  const auto launch = routes.weights ? launch_dispatch<true> : launch_dispatch<false>;
  launch(dtype, tokens, routes, hidden, rows, stream);
}

}  // namespace moe_ext::cuda
