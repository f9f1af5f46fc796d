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

// The smallest normal number.
template <typename T>
MOE_EXT_HOST_DEVICE constexpr T tiny() {
  return sizeof(T) == sizeof(float) ? static_cast<T>(FLT_MIN) : static_cast<T>(DBL_MIN);
}

// The divisor of a normalized token: the sum of its chosen probabilities, kept off zero. A NaN
// stays NaN.
template <typename T>
MOE_EXT_HOST_DEVICE T clamped(T sum, T eps = tiny<T>()) {
  return sum < eps ? eps : sum;
}

// The gradient of shares that sum to 1, a softmax or normalized weights, subtracts a mean:
//
//   g[i] - sum over j of share[j] * g[j]
//
// Where one share is near 1 the mean is nearly its g, and the difference would be mostly rounding.
// The g of that share is subtracted from every g first: the result stays, and the mean is small.

// Whether a share may be near 1: at most one of a row.
template <typename T>
MOE_EXT_HOST_DEVICE bool is_most(T share) {
  return share > T{0.5};
}

// The gradient of p[k] / sum, the weights of a token, with respect to p: from the weights'
// gradients g it is centred(g[k]) / divisor. The share of the largest p may be near 1.
template <typename T>
struct Normalized {
  T sum = 0, largest = -INFINITY, shift = 0, mean = 0, divisor = 1;

  MOE_EXT_HOST_DEVICE void add(T p, T g) {
    if (p > largest) {
      mean += sum * (shift - g);
      shift = g;
      largest = p;
    } else {
      mean += p * (g - shift);
    }
    sum += p;
  }

  // After the last choice. A divisor above the sum is a constant, which has no gradient.
  MOE_EXT_HOST_DEVICE void divide(T eps = tiny<T>()) {
    divisor = clamped(sum, eps);
    mean /= divisor;
    if (sum < eps) mean = shift = 0;
  }

  MOE_EXT_HOST_DEVICE T centred(T g) const { return g - shift - mean; }
};

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
