#include "kernels.cuh"

namespace moe_ext::cuda {

template struct ProductsOf<__nv_bfloat16, 1>;

}  // namespace moe_ext::cuda
