// Activate: the activation between an expert's two products, on the rows that routes own.
//
//   out[r, f] = w * fn(pre_activation[r, f])                                 without a gate
//   out[r, f] = w * fn(pre_activation[r, f]) * pre_activation[r, F + f]      with a gate
//
// w is the weight of the row's route, weights[t, k], or 1. The gradient computes the same values
// again: a layer saves `pre_activation` alone. Rows without a route are not read and come out zero.
// A thread takes whole rows, in pieces that stay in its first cache.

#include <tuple>

#include "../activation.h"
#include "rows.h"
#include "vector.h"

namespace moe_ext {
namespace {

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

  MOE_EXT_INLINE const T* read(const scalar_t* from, int64_t size) {
    if constexpr (!kCopies)
      return from;
    else {
      for (int64_t i = 0; i < size; ++i) values_[i] = static_cast<T>(from[i]);
      return values_;
    }
  }
  MOE_EXT_INLINE T* target(scalar_t* to) {
    if constexpr (!kCopies)
      return to;
    else
      return values_;
  }
  MOE_EXT_INLINE void write(scalar_t* to, int64_t size) const {
    if constexpr (kCopies) {
      for (int64_t i = 0; i < size; ++i) to[i] = static_cast<scalar_t>(values_[i]);
    }
  }

 private:
  T values_[kCopies ? kPiece : 1];
};

template <typename scalar_t>
struct ActivateRoutes {
  using T = accumulate_t<scalar_t>;
  const scalar_t* pre_activation;  // [R, inner_width]
  Routes<scalar_t> routes;
  scalar_t* active;  // [R, width]
  Activation activation;
  int64_t inner_width, width;

  template <int bytes>
  MOE_EXT_INLINE void run(int64_t begin, int64_t end, Fault& bad_slot) const {
    const bool gated = is_gated(activation);
    Piece<scalar_t> gate, up, result;
    for (int64_t route = begin; route < end; ++route) {
      if (!routes.has_row(route, bad_slot)) continue;
      const scalar_t* row = pre_activation + routes.slots[route] * inner_width;
      scalar_t* to = active + routes.slots[route] * width;
      const T weight = routes.weights ? routes.weights[route] : T{1};
      for (int64_t f = 0; f < width; f += kPiece) {
        const int64_t size = std::min(kPiece, width - f);
        const Forward<T> piece{gate.read(row + f, size),
                               gated ? up.read(row + width + f, size) : nullptr,
                               result.target(to + f), weight};
        activate_piece<bytes>(activation, piece, size);
        result.write(to + f, size);
      }
    }
  }
};

template <typename scalar_t>
void activate_kernel(const ActivateArgs& a, const Tensor& out) {
  const Routes<scalar_t> routes(a.routes);
  scalar_t* active = data<scalar_t>(out);
  const ActivateRoutes<scalar_t> activate_routes{
      const_data<scalar_t>(a.pre_activation), routes, active, a.activation, a.inner_width, a.width};
  Fault bad_slot, bad_source;
  parallel_for(
      0, routes.size(), grain((a.inner_width + a.width) * sizeof(scalar_t)),
      [&](int64_t begin, int64_t end) { on_widest(activate_routes, begin, end, bad_slot); });
  routes.zero_empty_rows(active, a.width, bad_source);
  routes.check("activate", bad_slot, bad_source);
}

template <typename scalar_t>
struct ActivateBackwardRoutes {
  using T = accumulate_t<scalar_t>;
  const scalar_t* pre_activation;  // [R, inner_width]
  const scalar_t* grad;            // [R, width]
  Routes<scalar_t> routes;
  scalar_t* grad_pre_activation;  // [R, inner_width]
  scalar_t* active;               // [R, width]
  T* grad_weights;                // [T, K]
  Activation activation;
  int64_t inner_width, width;

  template <int bytes>
  MOE_EXT_INLINE void run(int64_t begin, int64_t end, Fault& bad_slot) const {
    const bool gated = is_gated(activation);
    Piece<scalar_t> upstream, gate, up, grad_gate, grad_up, result;
    T unweighed[kPiece];
    for (int64_t route = begin; route < end; ++route) {
      grad_weights[route] = 0;
      if (!routes.has_row(route, bad_slot)) continue;
      const int64_t row = routes.slots[route];
      const T weight = routes.weights[route];
      T sum = 0;
      for (int64_t f = 0; f < width; f += kPiece) {
        const int64_t size = std::min(kPiece, width - f);
        const scalar_t* from = pre_activation + row * inner_width + f;
        scalar_t* to = grad_pre_activation + row * inner_width + f;
        const Backward<T> piece{upstream.read(grad + row * width + f, size),
                                gate.read(from, size),
                                gated ? up.read(from + width, size) : nullptr,
                                grad_gate.target(to),
                                gated ? grad_up.target(to + width) : nullptr,
                                unweighed,
                                weight};
        activate_piece<bytes>(activation, piece, size);
        grad_gate.write(to, size);
        if (gated) grad_up.write(to + width, size);
        sum += dot<bytes>(piece.grad, unweighed, size);
        scalar_t* to_active = active + row * width + f;
        T* weighed = result.target(to_active);
        for (int64_t i = 0; i < size; ++i) weighed[i] = weight * unweighed[i];
        result.write(to_active, size);
      }
      grad_weights[route] = sum;
    }
  }
};

template <typename scalar_t>
void activate_backward_kernel(const ActivateBackwardArgs& args, const Tensor& grad_pre_activation,
                              const Tensor& out, const Tensor& grad_weights) {
  using T = accumulate_t<scalar_t>;
  const ActivateArgs& a = args.forward;
  const Routes<scalar_t> routes(a.routes);
  scalar_t* grad_rows = data<scalar_t>(grad_pre_activation);
  scalar_t* active = data<scalar_t>(out);
  const ActivateBackwardRoutes<scalar_t> activate_routes{const_data<scalar_t>(a.pre_activation),
                                                         const_data<scalar_t>(args.grad),
                                                         routes,
                                                         grad_rows,
                                                         active,
                                                         data<T>(grad_weights),
                                                         a.activation,
                                                         a.inner_width,
                                                         a.width};
  Fault bad_slot, bad_source;
  parallel_for(
      0, routes.size(), grain(2 * (a.inner_width + a.width) * sizeof(scalar_t)),
      [&](int64_t begin, int64_t end) { on_widest(activate_routes, begin, end, bad_slot); });
  routes.zero_empty_rows(grad_rows, a.inner_width, bad_source);
  routes.zero_empty_rows(active, a.width, bad_source);
  routes.check("activate_backward", bad_slot, bad_source);
}

Tensor activate_cpu(const Tensor& pre_activation, const Tensor& slots, const Tensor& sources,
                    const OptionalTensor& weights, const std::string& activation) {
  const ActivateArgs a = activate_args(pre_activation, slots, sources, weights, activation);
  const ScalarType dtype = a.pre_activation.scalar_type();
  const Tensor out = fresh(a.pre_activation, {a.routes.num_rows, a.width}, dtype);
  visit_float(dtype, [&](auto zero) { activate_kernel<decltype(zero)>(a, out); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> activate_backward_cpu(const Tensor& grad,
                                                         const Tensor& pre_activation,
                                                         const Tensor& slots, const Tensor& sources,
                                                         const Tensor& weights,
                                                         const std::string& activation) {
  const ActivateBackwardArgs a =
      activate_backward_args(grad, pre_activation, slots, sources, weights, activation);
  const ActivateArgs& f = a.forward;
  const ScalarType dtype = f.pre_activation.scalar_type();
  const RouteArgs& r = f.routes;
  const Tensor grad_pre_activation = fresh(f.pre_activation, {r.num_rows, f.inner_width}, dtype);
  const Tensor active = fresh(f.pre_activation, {r.num_rows, f.width}, dtype);
  const Tensor grad_weights =
      empty(f.pre_activation, {r.num_tokens, r.top_k}, r.weights->scalar_type());
  visit_float(dtype, [&](auto zero) {
    activate_backward_kernel<decltype(zero)>(a, grad_pre_activation, active, grad_weights);
  });
  return {grad_pre_activation, active, grad_weights};
}

}  // namespace
}  // namespace moe_ext

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("activate", TORCH_BOX(&moe_ext::activate_cpu));
  m.impl("activate_backward", TORCH_BOX(&moe_ext::activate_backward_cpu));
}
