// One matrix product on one thread, by torch's GEMM, whatever the dtype.
//
// Without instructions for a 16-bit type torch multiplies it ten to a hundred times slower than
// float32: there operands are widened, a block that fits the cache at a time, and sums stay float32
// to the last. With them, torch's library compiles code for every size it meets, milliseconds each:
// the number of rows, which changes with every routing, is padded to one of few.

#pragma once

#include <array>
#include <cstring>
#include <memory>
#include <new>

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

// A matrix somewhere in memory. Threads make tensors of their part of it by themselves: what a
// tensor carries of its caller's thread (gradients, inference mode) stays there.
struct Matrix {
  char* data;
  ScalarType dtype;
  int64_t rows, columns, row_stride, column_stride;  // strides in elements

  int64_t width() const { return dtype == ScalarType::Double ? 8 : is_16bit() ? 2 : 4; }
  bool is_16bit() const { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }
  Matrix transposed() const { return {data, dtype, columns, rows, column_stride, row_stride}; }
  Matrix row_range(int64_t begin, int64_t end) const {
    return {data + begin * row_stride * width(),
            dtype,
            end - begin,
            columns,
            row_stride,
            column_stride};
  }
  Matrix column_range(int64_t begin, int64_t end) const {
    return transposed().row_range(begin, end).transposed();
  }
  Tensor tensor() const {
    const std::array<int64_t, 2> size{rows, columns}, stride{row_stride, column_stride};
    return torch::stable::from_blob(data, {size.data(), 2}, {stride.data(), 2},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                    dtype);
  }
};

inline Matrix matrix_of(const Tensor& tensor) {
  return {static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())),
          tensor.scalar_type(),
          tensor.size(0),
          tensor.size(1),
          tensor.stride(0),
          tensor.stride(1)};
}

// The e-th of a stack [E, rows, columns].
inline Matrix matrix_of(const Tensor& stack, int64_t e) {
  Matrix first{static_cast<char*>(const_cast<void*>(stack.const_data_ptr())),
               stack.scalar_type(),
               stack.size(1),
               stack.size(2),
               stack.stride(1),
               stack.stride(2)};
  first.data += e * stack.stride(0) * first.width();
  return first;
}

// out = left @ right^T + first; `first` is one row for all of out's, or out itself, or nothing.
inline void multiply(const Matrix& out, const Matrix& left, const Matrix& right,
                     const std::optional<Matrix>& first) {
  using torch::stable::detail::from;
  const Tensor target = out.tensor();
  OptionalTensor added;
  if (first) added = first->data == out.data ? target : first->tensor();
  std::array<StableIValue, 4> stack{from(left.tensor()), from(right.tensor()), from(added),
                                    from(target)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

inline void copy(const Matrix& to, const Matrix& from) {
  Tensor target = to.tensor();
  torch::stable::copy_(target, from.tensor());
}

// Memory of one thread for a block of a matrix.
class Panel {
 public:
  // Holds what an earlier block left there.
  Matrix get(ScalarType dtype, int64_t rows, int64_t columns) {
    Matrix panel{nullptr, dtype, rows, columns, columns, 1};
    const auto bytes = static_cast<std::size_t>(rows * columns * panel.width());
    if (bytes > size_) {
      memory_.reset(static_cast<char*>(::operator new(bytes, kAlignment)));
      size_ = bytes;
    }
    panel.data = memory_.get();
    return panel;
  }

  // A copy of a matrix, with rows of zero after it.
  Matrix copy_of(const Matrix& matrix, ScalarType dtype, int64_t rows) {
    const Matrix panel = get(dtype, rows, matrix.columns);
    copy(panel.row_range(0, matrix.rows), matrix);
    const Matrix rest = panel.row_range(matrix.rows, rows);
    std::memset(rest.data, 0, rest.rows * rest.columns * rest.width());
    return panel;
  }

  // The same of a matrix whose columns may be dense in memory, without transposing it.
  Matrix copy_as_it_lies(const Matrix& matrix, ScalarType dtype) {
    if (matrix.column_stride == 1) return copy_of(matrix, dtype, matrix.rows);
    return copy_of(matrix.transposed(), dtype, matrix.columns).transposed();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(char* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<char, Delete> memory_;
  std::size_t size_ = 0;
};

// The products of one thread.
class Gemm {
 public:
  explicit Gemm(ScalarType dtype) {
    if (dtype == ScalarType::Float || dtype == ScalarType::Double) return;
    multiplies_natively(dtype) ? pads_ = true : widens_ = true;
  }

  // out [n, N] = rows [n, M] @ weight [N, M]^T + bias [1, N]
  void rows_by_weight(const Matrix& out, const Matrix& rows, const Matrix& weight,
                      const std::optional<Matrix>& bias) {
    const int64_t padded = pads_ ? padded_size(rows.rows) : rows.rows;
    if (!widens_ && padded == rows.rows) return multiply(out, rows, weight, bias);
    const ScalarType dtype = widens_ ? ScalarType::Float : rows.dtype;
    const Matrix result = out_.get(dtype, padded, out.columns);
    const Matrix left = left_.copy_of(rows, dtype, padded);
    if (widens_) {
      multiply(result, left, right_.copy_as_it_lies(weight, dtype),
               bias ? std::optional(bias_.copy_of(*bias, dtype, 1)) : std::nullopt);
    } else {
      multiply(result, left, weight, bias);
    }
    copy(out, result.row_range(0, rows.rows));
  }

  // out [N, M] = left [n, N]^T @ right [n, M]
  void outer(const Matrix& out, const Matrix& left, const Matrix& right) {
    const int64_t padded = pads_ ? padded_size(left.rows) : left.rows;
    if (widens_) return widened_outer(out, left, right);
    if (padded == left.rows) {
      return multiply(out, left.transposed(), right.transposed(), std::nullopt);
    }
    multiply(out, left_.copy_of(left, left.dtype, padded).transposed(),
             right_.copy_of(right, right.dtype, padded).transposed(), std::nullopt);
  }

 private:
  static constexpr int64_t kRows = 256;

  // The next of eight sizes for every doubling.
  static int64_t padded_size(int64_t n) {
    int64_t step = 32;
    while (step * 16 <= n) step *= 2;
    return (n + step - 1) / step * step;
  }

  void widened_outer(const Matrix& out, const Matrix& left, const Matrix& right) {
    const ScalarType dtype = ScalarType::Float;
    const Matrix sum = out_.get(dtype, out.rows, out.columns);
    for (int64_t begin = 0; begin < left.rows; begin += kRows) {
      const int64_t end = std::min(begin + kRows, left.rows);
      multiply(sum, left_.copy_of(left.row_range(begin, end), dtype, end - begin).transposed(),
               right_.copy_of(right.row_range(begin, end), dtype, end - begin).transposed(),
               begin == 0 ? std::nullopt : std::optional(sum));
    }
    copy(out, sum);
  }

  bool widens_ = false, pads_ = false;
  Panel left_, right_, out_, bias_;
};

}  // namespace moe_ext
