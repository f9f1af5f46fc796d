// The products on tensor cores, as their kernels take them.

#pragma once

#include "epilogues.cuh"

namespace moe_ext::cuda {

struct Product {
  RowSource rows;       // [R, M]
  const void* weights;  // [E, N, M], or [E, M, N] transposed
  Groups groups;
  int depth, width;  // M, N
  int ring_slices;
};

struct Outer {
  RowSource left, right;  // [R, N], [R, M]
  Groups groups;
  void* out;  // [E, N, M]
  int ring_slices;
};

// The launches for one kind of numbers, kTerms as in main_loop.cuh. A .cu file compiles each kind.
template <typename T, int kTerms>
struct ProductsOf {
  static void to_rows(const Product& product, bool transposed, const ToRows<T>& epilogue,
                      CUstream_st* stream);
  static void to_activation(const Product& product, bool transposed,
                            const ToActivation<T>& epilogue, CUstream_st* stream);
  static void to_activation_gradient(const Product& product, bool transposed,
                                     const ToActivationGradient<T>& epilogue, CUstream_st* stream);
  static void outer(const Outer& outer, CUstream_st* stream);
};

}  // namespace moe_ext::cuda
