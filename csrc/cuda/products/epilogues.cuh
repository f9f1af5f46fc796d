// Epilogues turn the sums of a tile into results. A warp calls one for each vector of its sums, all
// lanes together; some vectors may be behind the last row or column.

#pragma once

#include "../activation.cuh"
#include "operand.cuh"
#include "tiles.cuh"

namespace moe_ext::cuda {

// Columns of a warp. In pairs the first half are gates, and the second what they multiply.
constexpr int kWarpColumns = 64, kPairColumns = kWarpColumns / 2;

// Where a vector of sums goes.
struct Spot {
  int group;
  int64_t row;
  int column;    // of the result
  bool exists;   // is not behind the last row or column
  float weight;  // of the row's route, or 1
  bool has_route;
};

__host__ __device__ inline int64_t dots_of(int64_t width) { return divide_up(width, kWarpColumns); }

template <typename T, int kSize>
__device__ Pack<T, kSize>* vector_at(void* matrix, int64_t row, int width, int column) {
  return reinterpret_cast<Pack<T, kSize>*>(static_cast<T*>(matrix) + row * width + column);
}

template <typename T, int kSize>
__device__ Pack<float, kSize> read_vector(const void* matrix, int64_t row, int width, int column) {
  return widened(load(vector_at<T, kSize>(const_cast<void*>(matrix), row, width, column)));
}

template <int kSize>
__device__ void add(Pack<float, kSize>& sums, const Pack<float, kSize>& more, float factor) {
#pragma unroll
  for (int j = 0; j < kSize; ++j) sums.at[j] += factor * more.at[j];
}

// out[r] = sums + bias[e], or the route's weight times the bias
template <typename T>
struct ToRows {
  const void* bias;  // [E, N] or null
  bool weighs;       // the bias
  int width;         // N
  bool zeroes;       // rows that no group owns
  void* out;         // [R, N]

  __device__ int pair() const { return 0; }
  __device__ bool needs_weights() const { return weighs; }
  __device__ void zero_rows(const Groups& groups) const {
    if (zeroes) zero_unowned_rows(groups, static_cast<uint4*>(out), width / kFullPack<T>);
  }

  template <int kSize, typename Read>
  __device__ void store_vector(const Spot& spot, const Read& read, int column) const {
    if (!spot.exists) return;
    Pack<float, kSize> sums = read(column);
    if (bias) {
      const auto more = read_vector<T, kSize>(bias, spot.group, width, spot.column);
      add(sums, more, spot.weight);
    }
    store(vector_at<T, kSize>(out, spot.row, width, spot.column), narrowed<T>(sums));
  }
};

// pre_activation[r] = sums + bias[e], active[r] = fn of it, times the route's weight
template <typename T>
struct ToActivation {
  const void* bias;  // [E, G] or null
  bool weighs;
  Activation activation;
  int width;             // F
  void* pre_activation;  // [R, G] or null
  void* active;          // [R, F]

  // A factor's column is so many behind its gate's, or 0.
  __device__ int pair() const {
    return is_gated(activation) && !is_interleaved(activation) ? width : 0;
  }
  __device__ bool needs_weights() const { return weighs; }
  // Callers see the pre-activation.
  __device__ void zero_rows(const Groups& groups) const {
    if (!pre_activation) return;
    const int inner_width = is_gated(activation) ? 2 * width : width;
    zero_unowned_rows(groups, static_cast<uint4*>(pre_activation), inner_width / kFullPack<T>);
  }

  template <int kSize, typename Read>
  __device__ void store_vector(const Spot& spot, const Read& read, int column) const {
    if (!spot.exists) return;
    const bool gated = is_gated(activation);
    const int inner_width = gated ? 2 * width : width;
    const auto rounded = [&](int sums_column, int to) {
      Pack<float, kSize> sums = read(sums_column);
      if (bias) add(sums, read_vector<T, kSize>(bias, spot.group, inner_width, to), 1);
      const Pack<T, kSize> out = narrowed<T>(sums);
      if (pre_activation)
        store(vector_at<T, kSize>(pre_activation, spot.row, inner_width, to), out);
      return widened(out);
    };
    const Pack<float, kSize> gate = rounded(column, spot.column);
    if (is_interleaved(activation)) {
      Pack<float, kSize / 2> gates, ups;
#pragma unroll
      for (int j = 0; j < kSize / 2; ++j) {
        gates.at[j] = gate.at[2 * j], ups.at[j] = gate.at[2 * j + 1];
      }
      store(vector_at<T, kSize / 2>(active, spot.row, width, spot.column / 2),
            activated_pack<T, Activation::kSwigluOai>(gates, ups, spot.weight));
      return;
    }
    const Pack<float, kSize> up =
        gated ? rounded(column + kPairColumns, spot.column + width) : Pack<float, kSize>{};
    with_activation(activation, [&](auto which) {
      store(vector_at<T, kSize>(active, spot.row, width, spot.column),
            activated_pack<T, which>(gate, up, spot.weight));
    });
  }
};

// The sums are the gradient of active[r]: that of its pre-activation, of the route's weight by
// parts of 64 columns, and active[r] again.
template <typename T>
struct ToActivationGradient {
  Activation activation;
  int width;                   // F
  const void* pre_activation;  // [R, G]
  void* grad_pre_activation;   // [R, G]
  void* active;                // [R, F]
  float* dots;                 // [R, num_dots(F)]

  __device__ int pair() const { return 0; }
  __device__ bool needs_weights() const { return true; }
  __device__ void zero_rows(const Groups&) const {}

  template <int kSize, typename Read>
  __device__ void store_vector(const Spot& spot, const Read& read, int column) const {
    float dot = 0;
    if (spot.exists) {
      const auto grad = read(column);
      const int columns = width / kSize, at = spot.column / kSize;
      with_activation(activation, [&](auto which) {
        using In = Inner<which, T, kSize>;
        const int inner_width = In::of_row(width);
        const auto row_of = [&](void* rows) {
          return vector_at<T, kSize>(rows, spot.row, inner_width, 0);
        };
        const In in = In::read(row_of(const_cast<void*>(pre_activation)), columns, at);
        auto found = activation_gradient(in, grad, spot.weight);
        if (!spot.has_route) found = {};
        dot = found.dot;
        store(vector_at<T, kSize>(active, spot.row, width, spot.column), found.active);
        found.inner.write(row_of(grad_pre_activation), columns, at);
      });
    }
    constexpr int kLanes = kWarpColumns / kSize;  // that have a row
    dot = lanes_sum<kLanes>(dot);
    if (spot.exists && column == 0) {
      store(dots + spot.row * dots_of(width) + spot.column / kWarpColumns, dot);
    }
  }
};

}  // namespace moe_ext::cuda
