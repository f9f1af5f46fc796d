// The activation of rows of pre-activations, and its gradient, in pieces that stay in the first
// cache.
//
//   active[f] = w * fn(gate[f]) * factor(up[f])        up: null, and no factor, without a gate
//
// Outputs must not overlap inputs: the last register of a row repeats numbers of the one before.

#pragma once

#include "../activation.h"
#include "machine/vector.h"
#include "rows.h"

namespace moe_ext {

constexpr int64_t kPiece = 512;

// A piece of a row, whose gate is activated and multiplied by `up`.
template <typename scalar_t>
struct Forward {
  const scalar_t* gate;
  const scalar_t* up;  // null without a gate
  scalar_t* out;
  accumulate_t<scalar_t> weight;
};

template <typename scalar_t>
struct Backward {
  const scalar_t *grad, *gate, *up;
  scalar_t *grad_gate, *grad_up;
  accumulate_t<scalar_t>* active;  // fn(gate) * up, not weighed
  accumulate_t<scalar_t> weight;
};

// fn(x) and fn'(x) of as many floats as V holds, and the factor of a gate, by the formulas of
// activation.h.
struct PlainFactor {
  template <typename V>
  MOE_EXT_INLINE static void factor(V&, V& slope) {
    slope = V{} + 1.0f;
  }
};

template <typename V>
MOE_EXT_INLINE void scaled_silu(const V& x, float scale, V& value, V& slope) {
  V divisor = -scale * x;
  exponential(divisor);
  divisor += 1.0f;
  const V sigmoid = 1.0f / divisor;
  value = x * sigmoid;
  slope = sigmoid + scale * value * (1.0f - sigmoid);
}

struct Silu : PlainFactor {
  template <typename V>
  MOE_EXT_INLINE static void run(const V& x, V& value, V& slope) {
    scaled_silu(x, 1.0f, value, slope);
  }
};

struct SwigluOai {
  static constexpr float kScale = kSwigluOaiScale, kLimit = kSwigluOaiLimit;

  template <typename V>
  MOE_EXT_INLINE static void run(const V& x, V& value, V& slope) {
    const V limit = V{} + kLimit;
    scaled_silu<V>(x > limit ? limit : x, kScale, value, slope);
    slope = x <= limit ? slope : V{};
  }
  template <typename V>
  MOE_EXT_INLINE static void factor(V& up, V& slope) {
    const V limit = V{} + kLimit, one = V{} + 1.0f;
    const V above = up < -limit ? -limit : up;
    const V clamped = above > limit ? limit : above;
    slope = clamped == up ? one : V{};
    up = one + clamped;
  }
};

struct Relu : PlainFactor {
  template <typename V>
  MOE_EXT_INLINE static void run(const V& x, V& value, V& slope) {
    value = x < 0 ? V{} : x;
    slope = x <= 0 ? V{} : V{} + 1.0f;
  }
};

struct Relu2 : PlainFactor {
  template <typename V>
  MOE_EXT_INLINE static void run(const V& x, V& value, V& slope) {
    const V above = x < 0 ? V{} : x;
    value = above * above;
    slope = 2.0f * above;
  }
};

struct Gelu : PlainFactor {
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

template <typename V, typename Function, typename scalar_t>
MOE_EXT_INLINE void activate_some(const Forward<scalar_t>& p, int64_t i) {
  V gate, value, slope;
  load_as(gate, p.gate + i);
  Function::run(gate, value, slope);
  if (p.up) {
    V up, up_slope;
    load_as(up, p.up + i);
    Function::factor(up, up_slope);
    value *= up;
  }
  store_as<V>(p.weight * value, p.out + i);
}

template <typename V, typename Function, typename scalar_t>
MOE_EXT_INLINE void activate_some(const Backward<scalar_t>& p, int64_t i) {
  V grad, gate, value, slope;
  load_as(grad, p.grad + i);
  load_as(gate, p.gate + i);
  Function::run(gate, value, slope);
  const V weighed = p.weight * grad;
  if (p.up) {
    V up, up_slope;
    load_as(up, p.up + i);
    Function::factor(up, up_slope);
    store_as<V>(weighed * value * up_slope, p.grad_up + i);
    value *= up;
    slope *= up;
  }
  store_as(value, p.active + i);
  store_as<V>(weighed * slope, p.grad_gate + i);
}

template <int bytes, typename Function, typename Piece>
MOE_EXT_INLINE void activate_all(const Piece& p, int64_t size) {
  for_registers<bytes, float>(0, size, [&](auto& v, int64_t i) __attribute__((always_inline)) {
    activate_some<std::decay_t<decltype(v)>, Function>(p, i);
  });
}

template <int bytes, typename Piece>
MOE_EXT_INLINE void activate_piece(Activation activation, const Piece& p, int64_t size) {
  switch (activation) {
    case Activation::kSwiglu: return activate_all<bytes, Silu>(p, size);
    case Activation::kSwigluOai: return activate_all<bytes, SwigluOai>(p, size);
    case Activation::kGeglu:
    case Activation::kGelu: return activate_all<bytes, Gelu>(p, size);
    case Activation::kRelu: return activate_all<bytes, Relu>(p, size);
    case Activation::kRelu2: return activate_all<bytes, Relu2>(p, size);
  }
}

template <int bytes>
MOE_EXT_INLINE void activate_piece(Activation activation, const Forward<double>& p, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const double value = activated(activation, p.gate[i]).value;
    p.out[i] = p.weight * (p.up ? value * factor(activation, p.up[i]).value : value);
  }
}

template <int bytes>
MOE_EXT_INLINE void activate_piece(Activation activation, const Backward<double>& p, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const auto [value, slope] = activated(activation, p.gate[i]);
    const auto [up, up_slope] = p.up ? factor(activation, p.up[i]) : ValueAndSlope<double>{1, 0};
    const double weighed = p.weight * p.grad[i];
    p.active[i] = value * up;
    p.grad_gate[i] = weighed * slope * up;
    if (p.up) p.grad_up[i] = weighed * value * up_slope;
  }
}

// Pieces of rows: the rows themselves, or copies of every second column (`step` 2).
template <typename scalar_t>
class Piece {
 public:
  MOE_EXT_INLINE explicit Piece(int64_t step) : step_(step) {}

  MOE_EXT_INLINE const scalar_t* read(const scalar_t* from, int64_t size) {
    if (step_ == 1) return from;
    for (int64_t i = 0; i < size; ++i) values_[i] = from[2 * i];
    return values_;
  }
  MOE_EXT_INLINE scalar_t* target(scalar_t* to) { return step_ == 1 ? to : values_; }
  MOE_EXT_INLINE void write(scalar_t* to, int64_t size) const {
    if (step_ == 1) return;
    for (int64_t i = 0; i < size; ++i) to[2 * i] = values_[i];
  }

 private:
  int64_t step_;
  scalar_t values_[kPiece];
};

// A row of pre-activations from a column of its activations on.
template <typename scalar_t>
struct Inner {
  scalar_t *gate, *up;  // up: null without a gate
  int64_t step;         // from a number to the next, of both

  Inner from(int64_t f) const { return {gate + f * step, up ? up + f * step : nullptr, step}; }

  // Prefetches the same columns of the next row; apart: numbers from row to row.
  MOE_EXT_INLINE void ask_next(int64_t apart, int64_t width) const {
    prefetch(gate + apart, width * step);
    if (up && step == 1) prefetch(up + apart, width);
  }
};

// width: of the row's activations.
template <typename scalar_t>
Inner<scalar_t> inner_row(Activation activation, scalar_t* row, int64_t width) {
  if (is_interleaved(activation)) return {row, row + 1, 2};
  return {row, is_gated(activation) ? row + width : nullptr, 1};
}

// One row, or a part of it. w: the weight of its route, or 1.
template <int bytes, typename scalar_t>
MOE_EXT_INLINE void activate_row(Activation activation, const Inner<const scalar_t>& inner,
                                 accumulate_t<scalar_t> weight, scalar_t* active, int64_t width) {
  Piece<scalar_t> gates(inner.step), ups(inner.step);
  for (int64_t f = 0; f < width; f += kPiece) {
    const int64_t size = std::min(kPiece, width - f);
    const auto [gate, up, step] = inner.from(f);
    const Forward<scalar_t> piece{gates.read(gate, size), up ? ups.read(up, size) : nullptr,
                                  active + f, weight};
    activate_piece<bytes>(activation, piece, size);
  }
}

// The gradients of one row, or of a part of it; `active` once more; and grad_weight, the sum over f
// of grad[f] * fn(gate[f]) * up[f].
template <typename scalar_t>
struct RowBackward {
  using T = accumulate_t<scalar_t>;
  const scalar_t* grad;
  Inner<const scalar_t> inner;
  T weight;
  Inner<scalar_t> grad_inner;
  scalar_t* active;

  template <int bytes>
  MOE_EXT_INLINE T run(Activation activation, int64_t width) const {
    const int64_t step = inner.step;
    Piece<scalar_t> gates(step), ups(step), grad_gates(step), grad_ups(step);
    T unweighed[kPiece], grad_weight = 0;
    for (int64_t f = 0; f < width; f += kPiece) {
      const int64_t size = std::min(kPiece, width - f);
      const Inner<const scalar_t> in = inner.from(f);
      const Inner<scalar_t> out = grad_inner.from(f);
      const Backward<scalar_t> piece{grad + f,
                                     gates.read(in.gate, size),
                                     in.up ? ups.read(in.up, size) : nullptr,
                                     grad_gates.target(out.gate),
                                     out.up ? grad_ups.target(out.up) : nullptr,
                                     unweighed,
                                     weight};
      activate_piece<bytes>(activation, piece, size);
      grad_gates.write(out.gate, size);
      if (out.up) grad_ups.write(out.up, size);
      grad_weight += dot<bytes>(piece.grad, unweighed, size);
      for_registers<bytes, T>(0, size, [&](auto& v, int64_t i) __attribute__((always_inline)) {
        load_as(v, unweighed + i);
        v *= weight;
        store_as(v, active + f + i);
      });
    }
    return grad_weight;
  }
};

}  // namespace moe_ext
