// One matrix product on one thread, by torch's GEMM, whatever the dtype.
//
// Without instructions for a 16-bit type torch multiplies it ten to a hundred times slower than
// float32: there operands are widened, a block that fits the cache at a time, and sums stay float32
// to the last. With them, torch's library compiles code for every size it meets, milliseconds each:
// the number of rows, which changes with every routing, is padded to one of few.

#pragma once

#include <array>

#include "common.h"

namespace moe_ext {

// MOE_EXT_WIDEN_16BIT says no always: for tests on a CPU that has the instructions.
inline bool multiplies_natively([[maybe_unused]] ScalarType dtype) {
#if defined(MOE_EXT_WIDEN_16BIT)
  return false;
#elif defined(__x86_64__) && defined(__GNUC__)
  const bool is_bfloat16 = dtype == ScalarType::BFloat16;
  __builtin_cpu_init();
  if (is_bfloat16 && !__builtin_cpu_supports("avx512bf16")) return false;
#if !defined(__clang__) && __GNUC__ >= 12
  if (!is_bfloat16 && !__builtin_cpu_supports("avx512fp16")) return false;
#else
  if (!is_bfloat16) return false;
#endif
  // The library may have been told to leave them alone (ONEDNN_MAX_CPU_ISA).
  std::array<StableIValue, 1> stack{};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(
      is_bfloat16 ? "mkldnn::_is_mkldnn_bf16_supported" : "mkldnn::_is_mkldnn_fp16_supported", "",
      stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
#else
  return true;
#endif
}

// Shares memory with a tensor, and never requires a gradient: threads of parallel_for do not know
// that they are below autograd.
inline Tensor plain(const Tensor& tensor) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor part(const Tensor& tensor, int64_t dim, int64_t begin, int64_t end) {
  if (begin == 0 && end == tensor.size(dim)) return tensor;
  Tensor base = tensor;
  return torch::stable::narrow(base, dim, begin, end - begin);
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// out = left @ right^T + first; `first` is a vector for every row, or out itself, or nothing.
inline void multiply(const Tensor& out, const Tensor& left, const Tensor& right,
                     const OptionalTensor& first) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(left), from(right), from(first), from(out)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// Memory of one thread for a block of a matrix.
class Panel {
 public:
  // [rows, width], with the values of an earlier block.
  Tensor get(const Tensor& like, ScalarType dtype, int64_t rows, int64_t width) {
    if (!memory_ || memory_->numel() < rows * width) memory_ = empty(like, {rows * width}, dtype);
    return torch::stable::view(part(*memory_, 0, 0, rows * width), {rows, width});
  }

  // A copy of a matrix, with rows of zero after it.
  Tensor copy(const Tensor& matrix, ScalarType dtype, int64_t rows) {
    const int64_t given = matrix.size(0);
    const Tensor panel = get(matrix, dtype, rows, matrix.size(1));
    Tensor values = part(panel, 0, 0, given), rest = part(panel, 0, given, rows);
    torch::stable::copy_(values, matrix);
    if (given < rows) torch::stable::zero_(rest);
    return panel;
  }

  // The same of a matrix whose columns may be dense in memory, without transposing it.
  Tensor copy_as_it_lies(const Tensor& matrix, ScalarType dtype) {
    if (matrix.stride(1) == 1) return copy(matrix, dtype, matrix.size(0));
    return transposed(copy(transposed(matrix), dtype, matrix.size(1)));
  }

 private:
  std::optional<Tensor> memory_;
};

// The products of one thread.
class Gemm {
 public:
  explicit Gemm(ScalarType dtype) {
    if (dtype == ScalarType::Float || dtype == ScalarType::Double) return;
    multiplies_natively(dtype) ? pads_ = true : widens_ = true;
  }

  // out [n, N] = rows [n, M] @ weight [N, M]^T + bias [N]
  void rows_by_weight(const Tensor& out, const Tensor& rows, const Tensor& weight,
                      const OptionalTensor& bias) {
    const int64_t n = rows.size(0), padded = pads_ ? padded_size(n) : n;
    if (!widens_ && padded == n) return multiply(out, rows, weight, bias);
    const ScalarType dtype = widens_ ? ScalarType::Float : rows.scalar_type();
    const Tensor result = out_.get(out, dtype, padded, out.size(1));
    multiply(result, left_.copy(rows, dtype, padded),
             widens_ ? right_.copy_as_it_lies(weight, dtype) : weight,
             widens_ && bias ? OptionalTensor(torch::stable::to(*bias, dtype)) : bias);
    Tensor target = out;
    torch::stable::copy_(target, part(result, 0, 0, n));
  }

  // out [N, M] = left [n, N]^T @ right [n, M]
  void outer(const Tensor& out, const Tensor& left, const Tensor& right) {
    const int64_t n = left.size(0), padded = pads_ ? padded_size(n) : n;
    if (widens_) return widened_outer(out, left, right);
    if (padded == n) return multiply(out, transposed(left), transposed(right), std::nullopt);
    multiply(out, transposed(left_.copy(left, left.scalar_type(), padded)),
             transposed(right_.copy(right, right.scalar_type(), padded)), std::nullopt);
  }

 private:
  static constexpr int64_t kRows = 256;

  // The next of eight sizes for every doubling.
  static int64_t padded_size(int64_t n) {
    int64_t step = 32;
    while (step * 16 <= n) step *= 2;
    return (n + step - 1) / step * step;
  }

  void widened_outer(const Tensor& out, const Tensor& left, const Tensor& right) {
    const ScalarType dtype = ScalarType::Float;
    const Tensor sum = out_.get(out, dtype, out.size(0), out.size(1));
    for (int64_t begin = 0; begin < left.size(0); begin += kRows) {
      const int64_t end = std::min(begin + kRows, left.size(0));
      multiply(sum, transposed(left_.copy(part(left, 0, begin, end), dtype, end - begin)),
               transposed(right_.copy(part(right, 0, begin, end), dtype, end - begin)),
               begin == 0 ? std::nullopt : OptionalTensor(sum));
    }
    Tensor target = out;
    torch::stable::copy_(target, sum);
  }

  bool widens_ = false, pads_ = false;
  Panel left_, right_, out_;
};

}  // namespace moe_ext
