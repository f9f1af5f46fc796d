// Dispatch: copy every token into the rows that its choices were given.
//
//   rows[slots[t, k], :] = weights[t, k] * tokens[t, :]    where the route has a row
//   rows[r, :]           = 0                               where the row has no route
//
// A thread takes one vector of one token: it is read once and written K times. The blocks after
// those zero the empty rows.

#include "rows.cuh"

namespace moe_ext::cuda {
namespace {

template <typename T, int kSize>
__global__ __launch_bounds__(kRowThreads) void dispatch_kernel(
    const Pack<T, kSize>* __restrict__ tokens, Routes routes, int columns, int64_t tiles,
    Pack<T, kSize>* __restrict__ rows) {
  if (blockIdx.x >= tiles) return zero_empty_rows(routes, blockIdx.x - tiles, columns, rows);

  RouteTile<accumulate_t<T>> tile(routes, columns);
  Pack<T, kSize> token{};
  if (tile.has_cell()) token = load(tokens + tile.token * columns + tile.column);
  for (int64_t k = 0; k < routes.top_k; k += kChoices) {
    tile.read(k);
#pragma unroll
    for (int i = 0; i < kChoices; ++i) {
      if (!tile.has_cell() || tile.row(i) < 0) continue;
      Pack<T, kSize> out = token;
      if (tile.weighted()) {
        const accumulate_t<T> weight = tile.weight(i);
#pragma unroll
        for (T& x : out.at) x = narrow<T>(weight * widen(x));
      }
      store(rows + int64_t{tile.row(i)} * columns + tile.column, out);
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
    const int columns = num_columns(hidden, size);
    const int64_t tiles = num_tiles(routes, columns);
    launch("dispatch", dispatch_kernel<T, size>, tiles + num_sweeps(routes), kRowThreads,
           RouteTile<accumulate_t<T>>::bytes(routes, columns), stream,
           static_cast<const Vector*>(tokens), routes, columns, tiles, static_cast<Vector*>(rows));
  });
}

}  // namespace moe_ext::cuda
