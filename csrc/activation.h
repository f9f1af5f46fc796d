// The activations of experts: the formulas that the CPU and the CUDA kernels share.

#pragma once

#include <cmath>

#include "scoring.h"

namespace moe_ext {

enum class Activation { kSwiglu, kGeglu, kGelu, kRelu };

// With a gate the first half of a row is activated and multiplied by the second.
MOE_EXT_HOST_DEVICE constexpr bool is_gated(Activation activation) {
  return activation == Activation::kSwiglu || activation == Activation::kGeglu;
}

// silu(x) = x * sigmoid(x), gelu(x) = x * P(N(0, 1) <= x), relu(x) = max(x, 0).
template <typename T>
struct ValueAndSlope {
  T value, slope;
};

template <typename T>
MOE_EXT_HOST_DEVICE ValueAndSlope<T> activated(Activation activation, T x) {
  if (activation == Activation::kRelu) {
    // A NaN stays, with slope 1, as in torch.
    return {x < 0 ? T{0} : x, x <= 0 ? T{0} : T{1}};
  }
  if (activation == Activation::kSwiglu) {
    const T sigmoid = 1 / (1 + std::exp(-x));
    return {x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))};
  }
  constexpr T kInverseSqrt2 = static_cast<T>(0.70710678118654752440);
  constexpr T kInverseSqrt2Pi = static_cast<T>(0.39894228040143267794);
  const T below = std::erfc(-x * kInverseSqrt2) / 2;
  return {x * below, below + x * kInverseSqrt2Pi * std::exp(-x * x / 2)};
}

}  // namespace moe_ext
