// Activate: what experts do between their two products, on the rows that routes own.
//
//   out[r, f] = w * fn(inner[r, f])                        w = weights[t, k] of the row's route, or
//   1 out[r, f] = w * fn(inner[r, f]) * inner[r, F + f]      with a gate
//
// and its gradient with the same values again: a layer saves `inner` alone. All other rows are not
// read and come out zero. A thread takes whole rows, in pieces that stay in its first cache.

#include <tuple>

#include "../activation.h"
#include "rows.h"
#include "vector.h"

namespace moe_ext {
namespace {

constexpr int64_t kPiece = 512;

// Of a piece of a row: where its gate is activated and multiplied by `up`, which is null without
// one.
template <typename T>
struct Forward {
  const T *gate, *up;
  T* out;
  T weight;
};

template <typename T>
struct Backward {
  const T *grad, *gate, *up;
  T *grad_gate, *grad_up, *active;  // active: fn(gate) * up, not weighed
  T weight;
};

struct Swiglu {
  template <int bytes>
  MOE_EXT_INLINE void run(const Forward<float>& p, int64_t size) const {
    const float* __restrict gate = p.gate, * __restrict up = p.up;
    float* __restrict out = p.out;
    for (int64_t i = 0; i < size; ++i) {
      out[i] = p.weight * (gate[i] / (1 + exponential(-gate[i])) * up[i]);
    }
  }

  template <int bytes>
  MOE_EXT_INLINE void run(const Backward<float>& p, int64_t size) const {
    const float* __restrict grad = p.grad, * __restrict gate = p.gate, * __restrict up = p.up;
    float* __restrict grad_gate = p.grad_gate, * __restrict grad_up = p.grad_up;
    float* __restrict active = p.active;
    for (int64_t i = 0; i < size; ++i) {
      const float sigmoid = 1 / (1 + exponential(-gate[i]));
      const float value = gate[i] * sigmoid;
      const float weighed = p.weight * grad[i];
      active[i] = value * up[i];
      grad_up[i] = weighed * value;
      grad_gate[i] = weighed * up[i] * (sigmoid + value * (1 - sigmoid));
    }
  }
};

template <typename T>
void run(Activation activation, const Forward<T>& p, int64_t size) {
  if constexpr (std::is_same_v<T, float>) {
    if (activation == Activation::kSwiglu) return on_widest(Swiglu{}, p, size);
  }
  for (int64_t i = 0; i < size; ++i) {
    const T value = activated(activation, p.gate[i]).value;
    p.out[i] = p.weight * (p.up ? value * p.up[i] : value);
  }
}

template <typename T>
void run(Activation activation, const Backward<T>& p, int64_t size) {
  if constexpr (std::is_same_v<T, float>) {
    if (activation == Activation::kSwiglu) return on_widest(Swiglu{}, p, size);
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

  const T* read(const scalar_t* from, int64_t size) {
    if constexpr (!kCopies)
      return from;
    else {
      for (int64_t i = 0; i < size; ++i) values_[i] = static_cast<T>(from[i]);
      return values_;
    }
  }
  T* target(scalar_t* to) {
    if constexpr (!kCopies)
      return to;
    else
      return values_;
  }
  void write(scalar_t* to, int64_t size) const {
    if constexpr (kCopies) {
      for (int64_t i = 0; i < size; ++i) to[i] = static_cast<scalar_t>(values_[i]);
    }
  }

 private:
  T values_[kCopies ? kPiece : 1];
};

template <typename scalar_t>
void activate_kernel(const ActivateArgs& a, const Tensor& out) {
  using T = accumulate_t<scalar_t>;
  const int64_t K = a.top_k, G = a.inner_width, F = a.width, R = a.num_rows;
  const auto* inner = const_data<scalar_t>(a.inner);
  const auto* weights = data_or_null<T>(a.weights);
  const int32_t* slots = const_data<int32_t>(a.slots);
  const int32_t* sources = const_data<int32_t>(a.sources);
  scalar_t* active = data<scalar_t>(out);
  const bool gated = is_gated(a.activation);
  Fault bad_slot, bad_source;

  parallel_for(0, a.num_tokens * K, grain((G + F) * sizeof(T)), [&](int64_t begin, int64_t end) {
    Piece<scalar_t> gate, up, result;
    for (int64_t route = begin; route < end; ++route) {
      if (!has_row(slots, sources, route, R, bad_slot)) continue;
      const scalar_t* row = inner + slots[route] * G;
      scalar_t* to = active + slots[route] * F;
      for (int64_t f = 0; f < F; f += kPiece) {
        const int64_t size = std::min(kPiece, F - f);
        const Forward<T> piece{gate.read(row + f, size),
                               gated ? up.read(row + F + f, size) : nullptr, result.target(to + f),
                               weights ? weights[route] : T{1}};
        run(a.activation, piece, size);
        result.write(to + f, size);
      }
    }
  });
  zero_empty_rows(slots, sources, a.num_tokens * K, R, active, F, bad_source);
  const Check check("activate");
  check_routes_agree(check, bad_slot, slots, K, R);
  check_sources_agree(check, bad_source, sources, a.num_tokens * K);
}

template <typename scalar_t>
void activate_backward_kernel(const ActivateBackwardArgs& args, const Tensor& grad_inner,
                              const Tensor& out, const Tensor& grad_weights) {
  using T = accumulate_t<scalar_t>;
  const ActivateArgs& a = args.forward;
  const int64_t K = a.top_k, G = a.inner_width, F = a.width, R = a.num_rows;
  const auto* inner = const_data<scalar_t>(a.inner);
  const auto* grad = const_data<scalar_t>(args.grad);
  const T* weights = const_data<T>(*a.weights);
  const int32_t* slots = const_data<int32_t>(a.slots);
  const int32_t* sources = const_data<int32_t>(a.sources);
  scalar_t* grad_rows = data<scalar_t>(grad_inner);
  scalar_t* active_rows = data<scalar_t>(out);
  T* dots = data<T>(grad_weights);
  const bool gated = is_gated(a.activation);
  Fault bad_slot, bad_source;

  parallel_for(0, a.num_tokens * K, grain(2 * (G + F) * sizeof(T)),
               [&](int64_t begin, int64_t end) {
                 Piece<scalar_t> upstream, gate, up, grad_gate, grad_up, result;
                 T active[kPiece];
                 for (int64_t route = begin; route < end; ++route) {
                   dots[route] = 0;
                   if (!has_row(slots, sources, route, R, bad_slot)) continue;
                   const int64_t r = slots[route];
                   const T weight = weights[route];
                   for (int64_t f = 0; f < F; f += kPiece) {
                     const int64_t size = std::min(kPiece, F - f);
                     scalar_t* to_gate = grad_rows + r * G + f;
                     scalar_t* to_up = to_gate + F;
                     const Backward<T> piece{upstream.read(grad + r * F + f, size),
                                             gate.read(inner + r * G + f, size),
                                             gated ? up.read(inner + r * G + F + f, size) : nullptr,
                                             grad_gate.target(to_gate),
                                             gated ? grad_up.target(to_up) : nullptr,
                                             active,
                                             weight};
                     run(a.activation, piece, size);
                     grad_gate.write(to_gate, size);
                     if (gated) grad_up.write(to_up, size);
                     dots[route] += dot(piece.grad, active, size);
                     scalar_t* to_active = active_rows + r * F + f;
                     T* weighed = result.target(to_active);
                     for (int64_t i = 0; i < size; ++i) weighed[i] = weight * active[i];
                     result.write(to_active, size);
                   }
                 }
               });
  zero_empty_rows(slots, sources, a.num_tokens * K, R, grad_rows, G, bad_source);
  zero_empty_rows(slots, sources, a.num_tokens * K, R, active_rows, F, bad_source);
  const Check check("activate_backward");
  check_routes_agree(check, bad_slot, slots, K, R);
  check_sources_agree(check, bad_source, sources, a.num_tokens * K);
}

Tensor activate_cpu(const Tensor& inner, const Tensor& slots, const Tensor& sources,
                    const OptionalTensor& weights, const std::string& activation) {
  const ActivateArgs a = activate_args(inner, slots, sources, weights, activation);
  const ScalarType dtype = a.inner.scalar_type();
  const Tensor out = fresh(a.inner, {a.num_rows, a.width}, dtype);
  visit_float(dtype, [&](auto zero) { activate_kernel<decltype(zero)>(a, out); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> activate_backward_cpu(const Tensor& grad, const Tensor& inner,
                                                         const Tensor& slots, const Tensor& sources,
                                                         const Tensor& weights,
                                                         const std::string& activation) {
  const ActivateBackwardArgs a =
      activate_backward_args(grad, inner, slots, sources, weights, activation);
  const ActivateArgs& f = a.forward;
  const ScalarType dtype = f.inner.scalar_type();
  const Tensor grad_inner = fresh(f.inner, {f.num_rows, f.inner_width}, dtype);
  const Tensor active = fresh(f.inner, {f.num_rows, f.width}, dtype);
  const Tensor grad_weights = empty(f.inner, {f.num_tokens, f.top_k}, f.weights->scalar_type());
  visit_float(dtype, [&](auto zero) {
    activate_backward_kernel<decltype(zero)>(a, grad_inner, active, grad_weights);
  });
  return {grad_inner, active, grad_weights};
}

}  // namespace
}  // namespace moe_ext

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("activate", TORCH_BOX(&moe_ext::activate_cpu));
  m.impl("activate_backward", TORCH_BOX(&moe_ext::activate_backward_cpu));
}
