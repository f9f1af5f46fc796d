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

template <typename T, int kSize>
KERNEL(kRowThreads, kRowBlocks)
void dispatch_kernel(const Pack<T, kSize>* __restrict__ tokens,  // [T, columns]
                     Routes routes, Tiling tiling,
                     Pack<T, kSize>* __restrict__ rows) {  // [R, columns]
  const int columns = tiling.columns;
  const unsigned sweeps = num_sweeps(routes);
  if (blockIdx.x < sweeps) return zero_empty_rows(routes, blockIdx.x, columns, rows);
  RouteTile<accumulate_t<T>> tile(routes, tiling, blockIdx.x - sweeps);
  Pack<T, kSize> token{};
  if (tile.has_cell) token = load(tokens + tile.token * columns + tile.column);
  for (int64_t k = 0; k < routes.top_k; k += kChoices) {
    tile.read(k);
    if (!tile.has_cell) continue;
#pragma unroll
    for (int i = 0; i < kChoices; ++i) {
      if (tile.row(i) < 0) continue;
      store(rows + int64_t{tile.row(i)} * columns + tile.column,
            tile.weighted() ? scaled(token, tile.weight(i)) : token);
    }
  }
}

}  // namespace

void dispatch(Dtype dtype, const void* tokens, const Routes& routes, int64_t hidden, void* rows,
              CUstream_st* stream) {
  if (hidden == 0) return;
  visit_packs(dtype, hidden, {tokens, rows}, [&](auto zero, auto size) {
    using T = decltype(zero);
    using Vector = Pack<T, size>;
    const Tiling tiling(routes, num_columns(hidden, size));
    launch("dispatch", dispatch_kernel<T, size>, tiling.blocks + num_sweeps(routes),
           tiling.threads(), RouteTile<accumulate_t<T>>::bytes(routes, tiling), stream,
           static_cast<const Vector*>(tokens), routes, tiling, static_cast<Vector*>(rows));
  });
}

}  // namespace moe_ext::cuda
