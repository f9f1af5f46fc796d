// Shared by the CPU operators: types, how much work a thread takes, and how bad ids are reported.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "../expert_args.h"
#include "memory_pool.h"

namespace moe_ext {

using torch::stable::parallel_for;

// Sums, weights and probabilities of a scalar_t are kept in this type.
template <typename scalar_t>
using accumulate_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// Returns body(scalar_t{}), with the C++ type of a floating dtype; args.h has refused all others.
template <typename Body>
auto visit_float(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Double: return body(double{});
    case ScalarType::BFloat16: return body(torch::headeronly::BFloat16{});
    case ScalarType::Half: return body(torch::headeronly::Half{});
    default: return body(float{});
  }
}

// The same for a dtype of sums.
template <typename Body>
auto visit_sums(ScalarType dtype, const Body& body) {
  return dtype == ScalarType::Double ? body(double{}) : body(float{});
}

// Bytes of a dense tensor; INT64_MAX if the number overflows, which no allocator grants.
inline int64_t bytes_of(std::initializer_list<int64_t> size, ScalarType dtype) {
  int64_t bytes = visit_float(dtype, [](auto zero) { return int64_t{sizeof zero}; });
  for (const int64_t length : size) {
    if (length > 0 && bytes > INT64_MAX / length) return INT64_MAX;
    bytes *= length;
  }
  return bytes;
}

// Memory for a result.
inline Tensor fresh(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  const int64_t bytes = bytes_of(size, dtype);
  if (const auto tensor = in_pool(bytes, size, dtype)) return *tensor;
  const Tensor tensor = empty(like, size, dtype);
  ask_for_pages(data<char>(tensor), bytes);
  return tensor;
}

// How many parts there are of all, the last of which may be smaller.
inline int64_t parts(int64_t all, int64_t part) { return (all + part - 1) / part; }

// Items a thread takes at a time, so that a task moves about 32 KiB.
inline int64_t grain(int64_t bytes_per_item) {
  return std::max<int64_t>(1, (int64_t{1} << 15) / std::max<int64_t>(1, bytes_per_item));
}

// The first item found at fault. An exception may not leave a parallel_for, so threads note it
// here.
class Fault {
 public:
  void note(int64_t item) {
    int64_t seen = first_.load(std::memory_order_relaxed);
    while (item < seen && !first_.compare_exchange_weak(seen, item, std::memory_order_relaxed)) {
    }
  }
  bool found() const { return first_.load(std::memory_order_relaxed) != kNone; }
  int64_t first() const { return first_.load(std::memory_order_relaxed); }

 private:
  static constexpr int64_t kNone = INT64_MAX;
  std::atomic<int64_t> first_{kNone};
};

inline bool in_range(int64_t value, int64_t size) { return value >= 0 && value < size; }

// Ids [T, K] must be in lowest..E-1.
inline void check_ids(const Check& check, const int32_t* expert_ids, int64_t num_routes,
                      int64_t top_k, int64_t lowest, int64_t num_experts) {
  for (int64_t route = 0; route < num_routes; ++route) {
    const int64_t e = expert_ids[route];
    if (e >= lowest && e < num_experts) continue;
    check.fail("expert_ids must be in ", lowest, "..E-1 with E = ", num_experts, ", got ", e,
               " at [", route / top_k, ", ", route % top_k, "]");
  }
}

}  // namespace moe_ext
