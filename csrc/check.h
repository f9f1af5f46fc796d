// Errors that name the operator, the argument, the contract and what came:
//
//   dispatch: slots must be [T, K] with T = 33, got [32, 2]
//
// moe_ext/ops/checks.py says the same in the same words for the reference and the fakes.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace moe_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// scalar_type() of any tensor: torch's own throws for dtypes that its stable ABI does not name,
// such as those of less than 8 bits. Saved files hold the number of a dtype, so it does not change.
inline ScalarType scalar_type_of(const Tensor& tensor) {
  try {
    return tensor.scalar_type();
  } catch (const std::exception&) {
    int32_t number = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &number));
    return static_cast<ScalarType>(number);
  }
}

// A dtype's name in Python.
inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: break;
  }
  // The other names differ in capitals alone.
  std::string name = torch::headeronly::toString(dtype);
  for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return name;
}

inline std::string dtype_name(const Tensor& tensor) { return dtype_name(scalar_type_of(tensor)); }

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

inline std::string device_name(const torch::stable::Device& device) {
  using torch::headeronly::DeviceType;
  if (device.type() == DeviceType::CPU) return "cpu";
  if (device.type() == DeviceType::CUDA) return "cuda:" + std::to_string(device.index());
  return "device type " + std::to_string(static_cast<int>(device.type()));
}

// The type that weights, probabilities and sums have beside a tensor of this type.
inline ScalarType accumulate_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

class Check {
 public:
  explicit Check(std::string_view op) : op_(op) {}

  template <typename... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    std::ostringstream text;
    text << op_ << ": ";
    (text << ... << parts);
    throw std::runtime_error(text.str());
  }

  void dtype(std::string_view name, const Tensor& tensor,
             std::initializer_list<ScalarType> expected) const {
    const ScalarType dtype = scalar_type_of(tensor);
    if (std::find(expected.begin(), expected.end(), dtype) != expected.end()) return;
    std::string names;
    for (const ScalarType& one : expected) {
      const bool is_last = &one + 1 == expected.end();
      names += (names.empty() ? "" : is_last ? " or " : ", ") + dtype_name(one);
    }
    fail(name, " must be ", names, ", got ", dtype_name(dtype));
  }

  void same_dtype(std::string_view name, const Tensor& tensor, std::string_view other_name,
                  const Tensor& other) const {
    if (scalar_type_of(tensor) == scalar_type_of(other)) return;
    fail(name, " must be ", dtype_name(other), " like ", other_name, ", got ", dtype_name(tensor));
  }

  void same_device(std::string_view name, const Tensor& tensor, std::string_view other_name,
                   const Tensor& other) const {
    if (tensor.device() == other.device()) return;
    fail(name, " must be on ", device_name(other.device()), " like ", other_name, ", got ",
         device_name(tensor.device()));
  }

  void finite(std::string_view name, double value) const {
    if (std::isfinite(value)) return;
    fail(name, " must be finite, got ", std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf");
  }

  // Routes and rows are numbered in int32.
  void int32_size(std::string_view what, int64_t size) const {
    if (size <= std::numeric_limits<int32_t>::max()) return;
    fail(what, " must be below 2147483648, got ", size);
  }

 private:
  std::string_view op_;
};

}  // namespace moe_ext
