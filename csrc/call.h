// The tensors of one call, checked by the operator's contract.

#pragma once

#include <algorithm>
#include <optional>

#include "check.h"
#include "contracts.h"

namespace moe_ext {

using OptionalTensor = std::optional<Tensor>;

// An argument of a call; null where an optional one was not given.
struct Given {
  Given(const Tensor& tensor) : tensor(&tensor) {}
  Given(const OptionalTensor& tensor) : tensor(tensor ? &*tensor : nullptr) {}
  const Tensor* tensor;
};

// Sizes by their letters.
class Sizes {
 public:
  static constexpr int64_t kUnknown = -1;

  Sizes() { std::fill(std::begin(sizes_), std::end(sizes_), kUnknown); }
  int64_t operator[](char letter) const { return sizes_[letter - 'A']; }
  void set(char letter, int64_t size) { sizes_[letter - 'A'] = size; }
  // A dimension of a contract: a letter, or E+1.
  int64_t of(std::string_view dim) const {
    const int64_t size = (*this)[dim[0]];
    return dim.size() > 1 ? size + 1 : size;
  }

 private:
  int64_t sizes_[26];
};

class Call : public Check {
 public:
  Call(const Contract& contract, const Given* tensors)
      : Check(contract.name), contract_(contract), given_(tensors) {}

  // rule(*this) checks what the contract's line cannot say, and sets the sizes that follow from
  // numbers and names.
  template <typename Rule>
  void check(const Rule& rule) {
    for (int i = 0; i < contract_.count_alone; ++i) check_tensor(contract_.order[i]);
    rule(*this);
    for (int i = contract_.count_alone; i < contract_.count; ++i) check_tensor(contract_.order[i]);
    if (sizes['T'] >= 0) int32_size("T * K", sizes['T'] * sizes['K']);
    if (sizes['R'] >= 0) int32_size("rows", sizes['R']);
  }

  Sizes sizes;

 private:
  const Tensor& tensor(int index) const { return *given_[index].tensor; }

  void check_tensor(int index) {
    if (!given_[index].tensor) return;
    const TensorArgument& argument = contract_.tensors[index];
    const Tensor& value = tensor(index);
    if (!fits(argument, value)) wrong_shape(argument, value);
    for (int i = 0; i < argument.rank; ++i) {
      const char letter = argument.dims[i][0];
      if (sizes[letter] == Sizes::kUnknown) sizes.set(letter, value.size(i));
    }
    check_dtype(argument, value);
    if (index != contract_.first) {
      same_device(argument.name, value, contract_.tensors[contract_.first].name,
                  tensor(contract_.first));
    }
  }

  bool fits(const TensorArgument& argument, const Tensor& value) const {
    if (value.dim() != argument.rank) return false;
    for (int i = 0; i < argument.rank; ++i) {
      if (!fits(argument.dims[i], value.size(i))) return false;
    }
    return true;
  }

  bool fits(std::string_view dim, int64_t size) const {
    return sizes[dim[0]] == Sizes::kUnknown || sizes.of(dim) == size;
  }

  void check_dtype(const TensorArgument& argument, const Tensor& value) const {
    const auto is = [&](std::initializer_list<ScalarType> expected) {
      dtype(argument.name, value, expected);
    };
    using T = ScalarType;
    switch (argument.kind) {
      case Kind::kInt32: return is({T::Int});
      case Kind::kFloat32: return is({T::Float});
      case Kind::kUint8: return is({T::Byte});
      case Kind::kScale: return is({T::Float, T::BFloat16, T::Byte});
      case Kind::kFloating: return is({T::Float, T::Double, T::BFloat16, T::Half});
      case Kind::kLike:
        return same_dtype(argument.name, value, contract_.tensors[argument.like].name,
                          tensor(argument.like));
      case Kind::kAcc:
        if (contract_.operand < 0) return is({T::Float, T::Double});
        return is({accumulate_type(tensor(contract_.operand).scalar_type())});
    }
  }

  [[noreturn]] void wrong_shape(const TensorArgument& argument, const Tensor& value) const {
    std::string letters, known, like;
    for (int i = 0; i < argument.rank; ++i) {
      const std::string dim(argument.dims[i]);
      letters += (i ? ", " : "") + dim;
      if (sizes[dim[0]] == Sizes::kUnknown) continue;
      known += (known.empty() ? " with " : ", ") + dim + " = " + std::to_string(sizes.of(dim));
      const bool is_wrong = value.dim() != argument.rank || !fits(dim, value.size(i));
      if (is_wrong && like.empty()) like = giver(dim[0]);
    }
    fail(argument.name, " must be [", letters, "]", known, like, ", got ", shape_text(value));
  }

  // The plan's tensor that a letter's size is from; "" where it is not from one.
  std::string giver(char letter) const {
    for (const int index : contract_.order) {
      const TensorArgument& argument = contract_.tensors[index];
      if (!argument.has(letter)) continue;
      if (!argument.is_of_plan()) break;
      return " like the plan's " + std::string(argument.name) + " " + shape_text(tensor(index));
    }
    return "";
  }

  const Contract& contract_;
  const Given* given_;  // in the order of the contract
};

inline void no_rule(Call&) {}

// Raises an error that names the argument which breaks the contract; returns all sizes.
template <int kContract, int kCount, typename Rule = void(Call&)>
Sizes check(const Given (&tensors)[kCount], const Rule& rule = no_rule) {
  static_assert(kCount == kContracts[kContract].count, "the contract has other tensors");
  Call call(kContracts[kContract], tensors);
  call.check(rule);
  return call.sizes;
}

}  // namespace moe_ext
