// Shared by the operators' CUDA sides: a tensor's device and stream, and kernels' arguments.
//
// With MOE_EXT_EMULATED the kernels are those that tests/cusim runs on the CPU, and they replace
// the CPU operators: the same key, registered later.

#pragma once

#if !defined(MOE_EXT_EMULATED) && !defined(USE_CUDA)
#define USE_CUDA  // torch's headers declare the current stream under it
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "cuda/launchers.h"
#include "expert_args.h"

namespace moe_ext {

// Makes a tensor's device the current one, and gives its current stream.
class OnDevice {
 public:
#ifdef MOE_EXT_EMULATED
  explicit OnDevice(const Tensor&) {}
  CUstream_st* stream() const { return nullptr; }
#else
  explicit OnDevice(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}
  CUstream_st* stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<CUstream_st*>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline cuda::Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return cuda::Dtype::kFloat64;
    case ScalarType::BFloat16: return cuda::Dtype::kBFloat16;
    case ScalarType::Half: return cuda::Dtype::kFloat16;
    default: return cuda::Dtype::kFloat32;
  }
}

inline cuda::Routes routes_of(const RouteArgs& a) {
  return {const_data<int32_t>(a.slots),
          const_data<int32_t>(a.sources),
          data_or_null<void>(a.weights),
          a.num_tokens,
          a.top_k,
          a.num_rows};
}

}  // namespace moe_ext

#ifdef MOE_EXT_EMULATED
#define MOE_EXT_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m)
#else
#define MOE_EXT_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(moe_ext, CUDA, m)
#endif
