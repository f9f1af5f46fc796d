#include "kernels.cuh"

namespace moe_ext::cuda {

template struct ProductsOf<float, 1>;

}  // namespace moe_ext::cuda
