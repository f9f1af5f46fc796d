#include "kernels.cuh"

namespace moe_ext::cuda {

template struct ProductsOf<__half, 1>;

}  // namespace moe_ext::cuda
