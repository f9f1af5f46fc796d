// Matrices somewhere in memory, and a thread's memory for parts of them.

#pragma once

#include <array>
#include <cstring>
#include <memory>
#include <new>

#include "../common.h"

namespace moe_ext {

// A matrix somewhere in memory. Threads make tensors of their part of it by themselves: what a
// tensor carries of its caller's thread (gradients, inference mode) stays there.
struct Matrix {
  char* data;
  ScalarType dtype;
  int64_t rows, columns, row_stride, column_stride;  // strides in elements

  int64_t width() const { return dtype == ScalarType::Double ? 8 : is_16bit() ? 2 : 4; }
  bool is_16bit() const { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }
  // Whether its rows or its columns are dense.
  bool is_dense() const { return row_stride == 1 || column_stride == 1; }
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

template <typename scalar_t>
scalar_t* row_of(const Matrix& matrix, int64_t row) {
  return reinterpret_cast<scalar_t*>(matrix.row_range(row, row).data);
}

// A matrix whose rows or columns an index may pick from a larger one: what is multiplied, or its
// transposed. It does not become a Matrix by itself, which would lose the index. (With two members
// more in every Matrix GCC makes the loops of few_rows.h for one row of floats a third slower.)
struct Indexed : private Matrix {
  using Matrix::columns, Matrix::column_stride, Matrix::data, Matrix::dtype, Matrix::is_dense,
      Matrix::row_stride, Matrix::rows, Matrix::width;
  // Row or column i is at index[i] times the stride; null: at i times.
  const int32_t *row_index = nullptr, *column_index = nullptr;

  Indexed(const Matrix& matrix) : Matrix(matrix) {}  // NOLINT(google-explicit-constructor)

  // Only where there is no index.
  const Matrix& matrix() const { return *this; }
  // Picked columns are not side by side, even if column_stride is 1.
  bool has_dense_rows() const { return column_stride == 1 && !column_index; }
  // Whether rows are dense, and a stride apart.
  bool has_rows_in_place() const { return has_dense_rows() && !row_index; }

  char* row(int64_t i) const {
    return data + (row_index ? row_index[i] : i) * row_stride * width();
  }
  Indexed transposed() const {
    Indexed turned = Matrix::transposed();
    turned.row_index = column_index;
    turned.column_index = row_index;
    return turned;
  }
  Indexed row_range(int64_t begin, int64_t end) const {
    Indexed some = *this;
    some.rows = end - begin;
    if (row_index) {
      some.row_index += begin;
    } else {
      some.data += begin * row_stride * width();
    }
    return some;
  }
  Indexed column_range(int64_t begin, int64_t end) const {
    return transposed().row_range(begin, end).transposed();
  }
};

// A copy of dense rows, one after the other.
inline Matrix gather(const Indexed& rows, char* to) {
  const int64_t bytes = rows.columns * rows.width();
  for (int64_t i = 0; i < rows.rows; ++i) std::memcpy(to + i * bytes, rows.row(i), bytes);
  return {to, rows.dtype, rows.rows, rows.columns, rows.columns, 1};
}

template <typename scalar_t>
scalar_t* row_of(const Indexed& matrix, int64_t row) {
  return reinterpret_cast<scalar_t*>(matrix.row(row));
}

// The one column of a matrix is dense, whatever its stride.
inline int64_t column_stride_of(const Tensor& tensor, int64_t dim) {
  return tensor.size(dim) == 1 ? 1 : tensor.stride(dim);
}

inline Matrix matrix_of(const Tensor& tensor) {
  return {static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())),
          tensor.scalar_type(),
          tensor.size(0),
          tensor.size(1),
          tensor.stride(0),
          column_stride_of(tensor, 1)};
}

// The e-th of a stack [E, rows, columns].
inline Matrix matrix_of(const Tensor& stack, int64_t e) {
  Matrix first{static_cast<char*>(const_cast<void*>(stack.const_data_ptr())),
               stack.scalar_type(),
               stack.size(1),
               stack.size(2),
               stack.stride(1),
               column_stride_of(stack, 2)};
  first.data += e * stack.stride(0) * first.width();
  return first;
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

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(char* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<char, Delete> memory_;
  std::size_t size_ = 0;
};

}  // namespace moe_ext
