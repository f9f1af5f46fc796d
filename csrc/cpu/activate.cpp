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
Tensor activate_kernel(const ActivateArgs& a) {
  const Routes<scalar_t> routes(a.routes);
  Tensor out = fresh(a.pre_activation, {routes.num_rows, a.width}, a.pre_activation.scalar_type());
  const auto* pre_activation = const_data<scalar_t>(a.pre_activation);  // [R, inner_width]
  auto* active = data<scalar_t>(out);                                   // [R, width]
  Found found;
  const auto run = [&](int64_t begin, int64_t end) {
    on_widest([&](auto bytes) __attribute__((always_inline)) {
      for (int64_t route = begin; route < end; ++route) {
        if (!routes.has_row(route, found)) continue;
        const int64_t row = routes.slots[route];
        activate_row<bytes>(a.activation,
                            inner_row(a.activation, pre_activation + row * a.inner_width, a.width),
                            routes.weights ? routes.weights[route] : accumulate_t<scalar_t>{1},
                            active + row * a.width, a.width);
      }
    });
  };
  parallel_for(0, routes.size(), grain((a.inner_width + a.width) * sizeof(scalar_t)), run);
  routes.zero_empty_rows(active, a.width, found);
  routes.check("activate", found);
  return out;
}

template <typename scalar_t>
std::tuple<Tensor, Tensor, Tensor> activate_backward_kernel(const ActivateBackwardArgs& args) {
  const ActivateArgs& a = args.forward;
  const int64_t width = a.width, inner_width = a.inner_width;
  const Routes<scalar_t> routes(a.routes);
  const ScalarType dtype = a.pre_activation.scalar_type();
  Tensor grad_pre_activation = fresh(a.pre_activation, {routes.num_rows, inner_width}, dtype);
  Tensor out = fresh(a.pre_activation, {routes.num_rows, width}, dtype);
  Tensor grad_weights = empty_route_sums(a.pre_activation, a.routes);
  const auto* grad = const_data<scalar_t>(args.grad);             // [R, width]
  const auto* inner = const_data<scalar_t>(a.pre_activation);     // [R, inner_width]
  auto* grad_inner = data<scalar_t>(grad_pre_activation);         // [R, inner_width]
  auto* active = data<scalar_t>(out);                             // [R, width]
  auto* of_weights = data<accumulate_t<scalar_t>>(grad_weights);  // [T, K]
  Found found;
  const auto run = [&](int64_t begin, int64_t end) {
    on_widest([&](auto bytes) __attribute__((always_inline)) {
      for (int64_t route = begin; route < end; ++route) {
        of_weights[route] = 0;
        if (!routes.has_row(route, found)) continue;
        const int64_t row = routes.slots[route];
        const RowBackward<scalar_t> backward{
            grad + row * width, inner_row(a.activation, inner + row * inner_width, width),
            routes.weights[route], inner_row(a.activation, grad_inner + row * inner_width, width),
            active + row * width};
        of_weights[route] = backward.template run<bytes>(a.activation, width);
      }
    });
  };
  parallel_for(0, routes.size(), grain(2 * (inner_width + width) * sizeof(scalar_t)), run);
  routes.zero_empty_rows(grad_inner, inner_width, found);
  routes.zero_empty_rows(active, width, found);
  routes.check("activate_backward", found);
  return {grad_pre_activation, out, grad_weights};
}

Tensor activate_cpu(const ActivateArgs& a) {
  return visit_float(a.pre_activation.scalar_type(),
                     [&](auto zero) { return activate_kernel<decltype(zero)>(a); });
}

std::tuple<Tensor, Tensor, Tensor> activate_backward_cpu(const ActivateBackwardArgs& a) {
  return visit_float(a.forward.pre_activation.scalar_type(),
                     [&](auto zero) { return activate_backward_kernel<decltype(zero)>(a); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("activate", boxed<activate_args, activate_cpu>);
  m.impl("activate_backward", boxed<activate_backward_args, activate_backward_cpu>);
}

}  // namespace moe_ext
