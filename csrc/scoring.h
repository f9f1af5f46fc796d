// How the gate scores: the formulas that the CPU and the CUDA kernels share.

#pragma once

#include <cfloat>
#include <cmath>

#ifdef __CUDACC__
#define MOE_EXT_HOST_DEVICE __host__ __device__
#else
#define MOE_EXT_HOST_DEVICE
#endif

namespace moe_ext {

enum class Scoring { kSoftmax, kSigmoid, kSqrtSoftplus };

// The probability of a logit, for the scorings that look at one logit alone.
template <typename T>
MOE_EXT_HOST_DEVICE T elementwise_score(Scoring scoring, T x) {
  if (scoring == Scoring::kSigmoid) return 1 / (1 + std::exp(-x));
  return std::sqrt((x > 0 ? x : 0) + std::log1p(std::exp(-std::abs(x))));
}

// The divisor of a renormalised token: the sum of its chosen probabilities, kept off zero. A NaN
// stays NaN.
template <typename T>
MOE_EXT_HOST_DEVICE T clamped(T sum) {
  constexpr T tiny = sizeof(T) == sizeof(float) ? static_cast<T>(FLT_MIN) : static_cast<T>(DBL_MIN);
  return sum < tiny ? tiny : sum;
}

// d probs / d logits of an elementwise scoring, from the probability p alone: softplus(x) = p * p,
// so sigmoid(x) = 1 - exp(-p * p), and the slope sigmoid(x) / (2 * p).
template <typename T>
MOE_EXT_HOST_DEVICE T slope(Scoring scoring, T p) {
  if (scoring == Scoring::kSigmoid) return p * (1 - p);
  // Where the next term is lost in rounding; p * p may underflow.
  constexpr T small = sizeof(T) == sizeof(float) ? static_cast<T>(1e-4) : static_cast<T>(1e-8);
  return p < small ? p / 2 : -std::expm1(-p * p) / (2 * p);
}

}  // namespace moe_ext
