#include "kernels.cuh"

namespace moe_ext::cuda {

template struct ProductsOf<float, 3>;

}  // namespace moe_ext::cuda
