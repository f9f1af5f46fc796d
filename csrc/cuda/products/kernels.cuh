// Each .cu file that includes this compiles all products of one kind of numbers.

#pragma once

#include "grouped_mm.cuh"
#include "grouped_outer.cuh"

namespace moe_ext::cuda {

template <typename T, int kTerms>
void ProductsOf<T, kTerms>::to_rows(const Product& product, bool transposed,
                                    const ToRows<T>& epilogue, CUstream_st* stream) {
  grouped_mm_of<T, kTerms>("grouped_mm", product, transposed, epilogue, stream);
}

template <typename T, int kTerms>
void ProductsOf<T, kTerms>::to_activation(const Product& product, bool transposed,
                                          const ToActivation<T>& epilogue, CUstream_st* stream) {
  grouped_mm_of<T, kTerms>("grouped_mm_activate", product, transposed, epilogue, stream);
}

template <typename T, int kTerms>
void ProductsOf<T, kTerms>::to_activation_gradient(const Product& product, bool transposed,
                                                   const ToActivationGradient<T>& epilogue,
                                                   CUstream_st* stream) {
  grouped_mm_of<T, kTerms>("grouped_mm_activate_backward", product, transposed, epilogue, stream);
}

template <typename T, int kTerms>
void ProductsOf<T, kTerms>::outer(const Outer& outer, CUstream_st* stream) {
  grouped_outer_of<T, kTerms>(outer, stream);
}

}  // namespace moe_ext::cuda
