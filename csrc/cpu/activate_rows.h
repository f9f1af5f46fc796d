// The activation of rows of pre-activations, and its gradient, in pieces that stay in the first
// cache.
//
//   active[f] = w * fn(gate[f]) * up[f]        up: null, and no factor, without a gate

#pragma once

#include "../activation.h"
#include "rows.h"
#include "vector.h"

namespace moe_ext {

constexpr int64_t kPiece = 512;

// A piece of a row, whose gate is activated and multiplied by `up`.
template <typename T>
struct Forward {
  const T* gate;
  const T* up;  // null without a gate
  T* out;
  T weight;
};

template <typename T>
struct Backward {
  const T *grad, *gate, *up;
  T *grad_gate, *grad_up, *active;  // active: fn(gate) * up, not weighed
  T weight;
};

// fn(x) and fn'(x) of as many floats as V holds, by the formulas of `activated`.
struct Silu {
  template <typename V>
  MOE_EXT_INLINE static void run(const V& x, V& value, V& slope) {
    V divisor = -x;
    exponential(divisor);
    divisor += 1.0f;
    const V sigmoid = 1.0f / divisor;
    value = x * sigmoid;
    slope = sigmoid + value * (1.0f - sigmoid);
  }
};

struct Gelu {
  template <typename V>
  MOE_EXT_INLINE static void run(const V& x, V& value, V& slope) {
    const V size = x < 0 ? -x : x;
    V bell = x * x * -0.5f;
    exponential(bell);
    // P(N(0, 1) <= -u) * e^(u * u / 2) = t * a polynomial in t = 1 / (1 + 0.3 u): least squares on
    // Chebyshev points of u in [0, 14], weighted until the largest relative error was
    // least, 3.4e-9. Beyond, `bell` is zero.
    constexpr float kPowers[] = {-0.0206128303f, 0.112375781f,  -0.228067517f, 0.191581681f,
                                 -0.0792473257f, 0.0960578173f, 0.0784255862f, 0.110227324f,
                                 0.119572841f,   0.119686633f};
    const V t = 1.0f / (1.0f + 0.3f * size);
    V sum = V{};
    for (const float power : kPowers) sum = sum * t + power;
    const V tail = bell * (t * sum);
    const V below = x > 0 ? 1.0f - tail : tail;
    constexpr float kInverseSqrt2Pi = 0.398942280f;
    value = x * below;
    slope = below + x * kInverseSqrt2Pi * bell;
  }
};

template <typename V, typename Function>
MOE_EXT_INLINE void activate_some(const Forward<float>& p, int64_t i) {
  V gate, value, slope;
  load_as(gate, p.gate + i);
  Function::run(gate, value, slope);
  if (p.up) {
    V up;
    load_as(up, p.up + i);
    value *= up;
  }
  store_as(p.weight * value, p.out + i);
}

template <typename V, typename Function>
MOE_EXT_INLINE void activate_some(const Backward<float>& p, int64_t i) {
  V grad, gate, value, slope;
  load_as(grad, p.grad + i);
  load_as(gate, p.gate + i);
  Function::run(gate, value, slope);
  const V weighed = p.weight * grad;
  if (p.up) {
    V up;
    load_as(up, p.up + i);
    store_as(weighed * value, p.grad_up + i);
    value *= up;
    slope *= up;
  }
  store_as(value, p.active + i);
  store_as(weighed * slope, p.grad_gate + i);
}

template <int bytes, typename Function, typename Piece>
MOE_EXT_INLINE void activate_all(const Piece& p, int64_t size) {
  constexpr int64_t kWidth = bytes / sizeof(float);
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) activate_some<Vector<float, bytes>, Function>(p, i);
  for (; i < size; ++i) activate_some<float, Function>(p, i);
}

// Activates floats by vector code that the compiler does not write by itself; false where it does.
template <int bytes, typename Piece>
MOE_EXT_INLINE bool activate_as_vectors(Activation activation, const Piece& p, int64_t size) {
  if (activation == Activation::kRelu) return false;
  if (activation == Activation::kSwiglu) {
    activate_all<bytes, Silu>(p, size);
  } else {
    activate_all<bytes, Gelu>(p, size);
  }
  return true;
}

template <int bytes, typename T>
MOE_EXT_INLINE void activate_piece(Activation activation, const Forward<T>& p, int64_t size) {
  if constexpr (std::is_same_v<T, float>) {
    if (activate_as_vectors<bytes>(activation, p, size)) return;
  }
  for (int64_t i = 0; i < size; ++i) {
    const T value = activated(activation, p.gate[i]).value;
    p.out[i] = p.weight * (p.up ? value * p.up[i] : value);
  }
}

template <int bytes, typename T>
MOE_EXT_INLINE void activate_piece(Activation activation, const Backward<T>& p, int64_t size) {
  if constexpr (std::is_same_v<T, float>) {
    if (activate_as_vectors<bytes>(activation, p, size)) return;
  }
  for (int64_t i = 0; i < size; ++i) {
    const auto [value, slope] = activated(activation, p.gate[i]);
    const T weighed = p.weight * p.grad[i];
    p.active[i] = p.up ? value * p.up[i] : value;
    p.grad_gate[i] = weighed * slope * (p.up ? p.up[i] : T{1});
    if (p.up) p.grad_up[i] = weighed * value;
  }
}

// Pieces of rows in the type that is computed in: the rows themselves, or copies of 16-bit ones.
template <typename scalar_t>
class Piece {
 public:
  using T = accumulate_t<scalar_t>;
  static constexpr bool kCopies = !std::is_same_v<T, scalar_t>;

  template <int bytes>
  MOE_EXT_INLINE const T* read(const scalar_t* from, int64_t size) {
    if constexpr (!kCopies)
      return from;
    else {
      convert<bytes>(from, size, values_);
      return values_;
    }
  }
  MOE_EXT_INLINE T* target(scalar_t* to) {
    if constexpr (!kCopies)
      return to;
    else
      return values_;
  }
  template <int bytes>
  MOE_EXT_INLINE void write(scalar_t* to, int64_t size) const {
    if constexpr (kCopies) convert<bytes>(values_, size, to);
  }

 private:
  T values_[kCopies ? kPiece : 1];
};

// One row, or a part of it. w: the weight of its route, or 1.
template <int bytes, typename scalar_t>
MOE_EXT_INLINE void activate_row(Activation activation, const scalar_t* gate, const scalar_t* up,
                                 accumulate_t<scalar_t> weight, scalar_t* active, int64_t width) {
  Piece<scalar_t> gates, ups, result;
  for (int64_t f = 0; f < width; f += kPiece) {
    const int64_t size = std::min(kPiece, width - f);
    const Forward<accumulate_t<scalar_t>> piece{
        gates.template read<bytes>(gate + f, size),
        up ? ups.template read<bytes>(up + f, size) : nullptr, result.target(active + f), weight};
    activate_piece<bytes>(activation, piece, size);
    result.template write<bytes>(active + f, size);
  }
}

// The gradients of one row, or of a part of it; `active` once more; and grad_weight, the sum over f
// of grad[f] * fn(gate[f]) * up[f].
template <typename scalar_t>
struct RowBackward {
  using T = accumulate_t<scalar_t>;
  const scalar_t *grad, *gate, *up;
  T weight;
  scalar_t *grad_gate, *grad_up, *active;

  template <int bytes>
  MOE_EXT_INLINE T run(Activation activation, int64_t width) const {
    Piece<scalar_t> upstream, gates, ups, grad_gates, grad_ups, result;
    T unweighed[kPiece], grad_weight = 0;
    for (int64_t f = 0; f < width; f += kPiece) {
      const int64_t size = std::min(kPiece, width - f);
      const Backward<T> piece{upstream.template read<bytes>(grad + f, size),
                              gates.template read<bytes>(gate + f, size),
                              up ? ups.template read<bytes>(up + f, size) : nullptr,
                              grad_gates.target(grad_gate + f),
                              up ? grad_ups.target(grad_up + f) : nullptr,
                              unweighed,
                              weight};
      activate_piece<bytes>(activation, piece, size);
      grad_gates.template write<bytes>(grad_gate + f, size);
      if (up) grad_ups.template write<bytes>(grad_up + f, size);
      grad_weight += dot<bytes>(piece.grad, unweighed, size);
      T* weighed = result.target(active + f);
      for (int64_t i = 0; i < size; ++i) weighed[i] = weight * unweighed[i];
      result.template write<bytes>(active + f, size);
    }
    return grad_weight;
  }
};

}  // namespace moe_ext
