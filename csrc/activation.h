// The activations of experts: the formulas that the CPU and the CUDA kernels share.

#pragma once

#include <cmath>

#include "scoring.h"

namespace moe_ext {

enum class Activation { kSwiglu, kGeglu, kSwigluOai, kGelu, kRelu, kRelu2 };

// A gate is activated and multiplied by a factor. Gates are the first half of a row and factors the
// second, or they alternate.
MOE_EXT_HOST_DEVICE constexpr bool is_gated(Activation activation) {
  return activation == Activation::kSwiglu || activation == Activation::kGeglu ||
         activation == Activation::kSwigluOai;
}
MOE_EXT_HOST_DEVICE constexpr bool is_interleaved(Activation activation) {
  return activation == Activation::kSwigluOai;
}

// gpt-oss's: x * sigmoid(scale * x) with x at most the limit, times 1 + a number within the limit.
constexpr double kSwigluOaiScale = 1.702, kSwigluOaiLimit = 7;

// silu(x) = x * sigmoid(x), gelu(x) = x * P(N(0, 1) <= x), relu(x) = max(x, 0), relu2 its square.
template <typename T>
struct ValueAndSlope {
  T value, slope;
};

// x * sigmoid(scale * x)
template <typename T>
MOE_EXT_HOST_DEVICE ValueAndSlope<T> scaled_silu(T x, T scale) {
  const T sigmoid = 1 / (1 + std::exp(-scale * x)), value = x * sigmoid;
  return {value, sigmoid + scale * value * (1 - sigmoid)};
}

template <typename T>
MOE_EXT_HOST_DEVICE ValueAndSlope<T> activated(Activation activation, T x) {
  if (activation == Activation::kRelu) {
    // A NaN stays, with slope 1, as in torch.
    return {x < 0 ? T{0} : x, x <= 0 ? T{0} : T{1}};
  }
  if (activation == Activation::kRelu2) {
    const T value = x < 0 ? T{0} : x;
    return {value * value, 2 * value};
  }
  if (activation == Activation::kSwigluOai) {
    constexpr T kScale = static_cast<T>(kSwigluOaiScale), kLimit = static_cast<T>(kSwigluOaiLimit);
    const ValueAndSlope<T> silu = scaled_silu(x > kLimit ? kLimit : x, kScale);
    return {silu.value, x <= kLimit ? silu.slope : T{0}};
  }
  if (activation == Activation::kSwiglu) return scaled_silu(x, T{1});
  constexpr T kInverseSqrt2 = static_cast<T>(0.70710678118654752440);
  constexpr T kInverseSqrt2Pi = static_cast<T>(0.39894228040143267794);
  const T below = std::erfc(-x * kInverseSqrt2) / 2;
  return {x * below, below + x * kInverseSqrt2Pi * std::exp(-x * x / 2)};
}

// The factor of a gate: of the number beside it in the row.
template <typename T>
MOE_EXT_HOST_DEVICE ValueAndSlope<T> factor(Activation activation, T x) {
  if (activation != Activation::kSwigluOai) return {x, T{1}};
  constexpr T kLimit = static_cast<T>(kSwigluOaiLimit);
  const T clamped = x > kLimit ? kLimit : x < -kLimit ? -kLimit : x;
  return {1 + clamped, clamped == x ? T{1} : T{0}};
}

}  // namespace moe_ext
