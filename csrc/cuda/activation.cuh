// Activations and their gradients on vectors of a row.

#pragma once

#include "../activation.h"
#include "vec.cuh"

namespace moe_ext::cuda {

// P(N(0, 1) <= x), and the density there, however small.
//
// Below 0 it is density(x) times a ratio that falls from 1.25 like 1 / |x|: a polynomial without a
// constant in t = 1 / (1 + 0.3 |x|), fitted to a relative error of 2^-22 up to |x| = 13.5, where
// the density is below all normal numbers. The factors are the ratio's times 1 / sqrt(2 pi).
__device__ inline ValueAndSlope<float> approximate_normal(float x) {
  constexpr float kHalfLog2e = 0.72134752f, kInverseSqrt2Pi = 0.39894228f;
  const float bell = approximate_exp2(-kHalfLog2e * x * x);
  const float t = approximate_reciprocal(1 + 0.3f * std::fabs(x));
  float ratio = 0.0359327933f;
  ratio = ratio * t - 0.158280526f;
  ratio = ratio * t + 0.208214586f;
  ratio = ratio * t - 0.0554013436f;
  ratio = ratio * t + 0.129473238f;
  ratio = ratio * t + 0.0996362502f;
  ratio = ratio * t + 0.12079856f;
  ratio = ratio * t + 0.119626376f;
  const float tail = ratio * t * bell;
  return {x < 0 ? tail : 1 - tail, kInverseSqrt2Pi * bell};
}

// x * sigmoid(scale * x)
__device__ inline ValueAndSlope<float> approximate_silu(float x, float scale) {
  constexpr float kLog2e = 1.44269504f;
  const float inverse = approximate_exp2(-kLog2e * scale * x);  // exp(-scale * x)
  const float sigmoid = approximate_reciprocal(1 + inverse);
  // 1 - sigmoid by a product: x may be large, and a reciprocal of 1 a little less than 1.
  return {x * sigmoid, sigmoid * (1 + scale * (x * (std::fmin(inverse, FLT_MAX) * sigmoid)))};
}

// As `activated`, for rows of type T. Those of 16 bits round away all but a sigmoid below 2^-126,
// which counts as 0.
template <typename T, Activation kActivation>
__device__ ValueAndSlope<accumulate_t<T>> activated_for(accumulate_t<T> x) {
  if constexpr (sizeof(T) > 2 || kActivation == Activation::kRelu ||
                kActivation == Activation::kRelu2) {
    return activated(kActivation, x);
  } else if constexpr (kActivation == Activation::kSwiglu) {
    return approximate_silu(x, 1);
  } else if constexpr (kActivation == Activation::kSwigluOai) {
    constexpr float kScale = kSwigluOaiScale, kLimit = kSwigluOaiLimit;
    const auto [value, slope] = approximate_silu(x > kLimit ? kLimit : x, kScale);
    return {value, x <= kLimit ? slope : 0};
  } else {
    const auto [below, density] = approximate_normal(x);
    return {x * below, below + x * density};
  }
}

// The vectors of a row of pre-activations at a column of its activations, in vectors. Where gates
// and what they multiply alternate, a vector has half of both.
template <Activation kActivation, typename T, int kSize>
struct Inner {
  using Vector = Pack<T, kSize>;
  static constexpr bool kGated = is_gated(kActivation);
  static constexpr bool kInterleaved = is_interleaved(kActivation);
  Vector gate, up{};

  // Vectors of a row; columns: those of its activations.
  __host__ __device__ static int of_row(int columns) { return kGated ? 2 * columns : columns; }

  __device__ static Inner read(const Vector* row, int columns, int column) {
    if constexpr (!kGated) return {load(row + column)};
    if constexpr (!kInterleaved) return {load(row + column), load(row + columns + column)};
    const Vector vectors[] = {load(row + 2 * column), load(row + 2 * column + 1)};
    Inner inner;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      inner.gate.at[j] = vectors[2 * j / kSize].at[2 * j % kSize];
      inner.up.at[j] = vectors[(2 * j + 1) / kSize].at[(2 * j + 1) % kSize];
    }
    return inner;
  }

  __device__ void write(Vector* row, int columns, int column) const {
    if constexpr (!kInterleaved) {
      store(row + column, gate);
      if constexpr (kGated) store(row + columns + column, up);
      return;
    }
    Vector vectors[2];
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      vectors[2 * j / kSize].at[2 * j % kSize] = gate.at[j];
      vectors[(2 * j + 1) / kSize].at[(2 * j + 1) % kSize] = up.at[j];
    }
    store(row + 2 * column, vectors[0]), store(row + 2 * column + 1, vectors[1]);
  }
};

// weight * fn(gate) * factor(up); without a gate `up` does not count.
template <typename T, Activation kActivation, typename Sum, int kSize>
__device__ Pack<T, kSize> activated_pack(const Pack<Sum, kSize>& gate, const Pack<Sum, kSize>& up,
                                         Sum weight) {
  Pack<Sum, kSize> active;
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const Sum value = activated_for<T, kActivation>(gate.at[j]).value;
    active.at[j] =
        weight * (is_gated(kActivation) ? value * factor(kActivation, up.at[j]).value : value);
  }
  return narrowed<T>(active);
}

// The same with its gradient: `dot` is that of the weight.
template <Activation kActivation, typename T, int kSize>
struct ActivationGradient {
  Inner<kActivation, T, kSize> inner;
  Pack<T, kSize> active;
  accumulate_t<T> dot = 0;
};
template <Activation kActivation, typename T, int kSize, typename Sum>
__device__ ActivationGradient<kActivation, T, kSize> activation_gradient(
    const Inner<kActivation, T, kSize>& inner, const Pack<Sum, kSize>& grad, Sum weight) {
  constexpr bool kGated = is_gated(kActivation);
  const Pack<Sum, kSize> gate = widened(inner.gate), up = widened(inner.up);
  Pack<Sum, kSize> grad_gate, grad_up, active;
  ActivationGradient<kActivation, T, kSize> out;
#pragma unroll
  for (int j = 0; j < kSize; ++j) {
    const ValueAndSlope<Sum> of_gate = activated_for<T, kActivation>(gate.at[j]);
    const ValueAndSlope<Sum> of_up =
        kGated ? factor(kActivation, up.at[j]) : ValueAndSlope<Sum>{1, 0};
    const Sum result = of_gate.value * of_up.value;
    const Sum weighted = weight * grad.at[j];
    out.dot += grad.at[j] * result;
    active.at[j] = weight * result;
    grad_gate.at[j] = weighted * of_gate.slope * of_up.value;
    grad_up.at[j] = weighted * of_gate.value * of_up.slope;
  }
  out.active = narrowed<T>(active);
  out.inner = {narrowed<T>(grad_gate), narrowed<T>(grad_up)};
  return out;
}

// Calls body with the activation as a constant, in a kernel.
template <typename Body>
__device__ void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kSwiglu:
      return body(std::integral_constant<Activation, Activation::kSwiglu>{});
    case Activation::kGeglu: return body(std::integral_constant<Activation, Activation::kGeglu>{});
    case Activation::kSwigluOai:
      return body(std::integral_constant<Activation, Activation::kSwigluOai>{});
    case Activation::kGelu: return body(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kRelu: return body(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kRelu2: return body(std::integral_constant<Activation, Activation::kRelu2>{});
  }
}

}  // namespace moe_ext::cuda
