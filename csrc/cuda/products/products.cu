// Chooses the kernels of a product by its numbers.

#include "products.cuh"

namespace moe_ext::cuda {
namespace {

// Calls body(T{}, ProductsOf<T, kTerms>{}).
template <typename Body>
void visit_numbers(Dtype dtype, bool allow_tf32, const Body& body) {
  visit_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) {
      body(zero, ProductsOf<T, 1>{});
    } else if constexpr (sizeof(T) == 4) {
      allow_tf32 ? body(zero, ProductsOf<T, 1>{}) : body(zero, ProductsOf<T, 3>{});
    } else {
      throw std::runtime_error("products of float64 are not computed on tensor cores");
    }
  });
}

Product product_of(const GroupedMM& call) {
  return {source_of(call.rows, call.depth, call.gathers, call.routes),
          call.weights,
          call.groups,
          narrowed_size(call.depth),
          narrowed_size(call.width),
          0};
}

}  // namespace

int64_t num_dots(int64_t width) { return dots_of(width); }

void grouped_mm(const GroupedMM& call, const void* bias, bool weighs, bool zeroes, void* out,
                CUstream_st* stream) {
  visit_numbers(call.dtype, call.allow_tf32, [&](auto zero, auto products) {
    const ToRows<decltype(zero)> epilogue{bias, weighs, static_cast<int>(call.width), zeroes, out};
    products.to_rows(product_of(call), call.transposed, epilogue, stream);
  });
}

void grouped_mm_activate(const GroupedMM& call, const void* bias, bool weighs,
                         Activation activation, void* pre_activation, void* active,
                         CUstream_st* stream) {
  visit_numbers(call.dtype, call.allow_tf32, [&](auto zero, auto products) {
    const int width = static_cast<int>(is_gated(activation) ? call.width / 2 : call.width);
    const ToActivation<decltype(zero)> epilogue{bias,  weighs,         activation,
                                                width, pre_activation, active};
    products.to_activation(product_of(call), call.transposed, epilogue, stream);
  });
}

void grouped_mm_activate_backward(const GroupedMM& call, Activation activation,
                                  const void* pre_activation, void* grad_pre_activation,
                                  void* active, float* dots, CUstream_st* stream) {
  visit_numbers(call.dtype, call.allow_tf32, [&](auto zero, auto products) {
    const ToActivationGradient<decltype(zero)> epilogue{
        activation, static_cast<int>(call.width), pre_activation, grad_pre_activation, active,
        dots};
    products.to_activation_gradient(product_of(call), call.transposed, epilogue, stream);
  });
}

void grouped_outer(const GroupedOuter& call, void* out, CUstream_st* stream) {
  visit_numbers(call.dtype, call.allow_tf32, [&](auto, auto products) {
    products.outer({source_of(call.left, call.left_width, call.gathers_left, call.routes),
                    source_of(call.right, call.right_width, call.gathers_right, call.routes),
                    call.groups, out, 0},
                   stream);
  });
}

}  // namespace moe_ext::cuda
