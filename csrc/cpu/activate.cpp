// Activate: the activation between an expert's two products, on the rows that routes own.
//
//   out[r, f] = w * fn(pre_activation[r, f])                                 without a gate
//   out[r, f] = w * fn(pre_activation[r, f]) * pre_activation[r, F + f]      with a gate
//   out[r, f] = w * fn(pre_activation[r, 2f]) * factor(pre_activation[r, 2f + 1])    interleaved
//
// w is the weight of the row's route, weights[t, k], or 1. The gradient computes the same values
// again: a layer saves `pre_activation` alone. Rows without a route are not read and come out zero.
// A thread takes whole rows, in pieces that stay in its first cache.

#include <tuple>

#include "activate_rows.h"

namespace moe_ext {
namespace {

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
    for (int64_t route = begin; route < end; ++route) {
      if (!routes.has_row(route, bad_slot)) continue;
      const scalar_t* row = pre_activation + routes.slots[route] * inner_width;
      activate_row<bytes>(activation, inner_row(activation, row, width),
                          routes.weights ? routes.weights[route] : T{1},
                          active + routes.slots[route] * width, width);
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
    for (int64_t route = begin; route < end; ++route) {
      grad_weights[route] = 0;
      if (!routes.has_row(route, bad_slot)) continue;
      const int64_t row = routes.slots[route];
      const RowBackward<scalar_t> backward{
          grad + row * width, inner_row(activation, pre_activation + row * inner_width, width),
          routes.weights[route],
          inner_row(activation, grad_pre_activation + row * inner_width, width),
          active + row * width};
      grad_weights[route] = backward.template run<bytes>(activation, width);
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
