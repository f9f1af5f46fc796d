// Shared by the kernel tests: checks, memory of exact size filled with NaN, random numbers, and the
// list of tests. A sanitizer sees a kernel's first access out of bounds, and a comparison whatever
// was not written.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "cusim.h"
#include "launchers.h"

namespace testing {

using namespace moe_ext;
using namespace moe_ext::cuda;

inline long checks = 0, failures = 0;
inline std::string context;

#define CHECK(condition)                                                                       \
  do {                                                                                         \
    ++checks;                                                                                  \
    if (!(condition) && ++failures < 20)                                                       \
      std::printf("FAILED %s:%d: %s (%s)\n", __FILE__, __LINE__, #condition, context.c_str()); \
  } while (0)

// The most threads that each launch may have: its kernel's __launch_bounds__, which the emulator
// does not see.
using LaunchBounds = std::map<std::string, std::size_t>;

struct Test {
  void (*run)();
  LaunchBounds launch_bounds;
};

inline std::map<std::string, Test>& tests() {
  static std::map<std::string, Test> tests;
  return tests;
}

struct Registration {
  Registration(const char* name, void (*run)(), const LaunchBounds& launch_bounds) {
    tests()[name] = {run, launch_bounds};
  }
};

template <typename T>
class Array {
 public:
  explicit Array(int64_t size)
      : size_(size), data_(static_cast<T*>(allocate(size * sizeof(T))), std::free) {
    // NaN, or a large number: -1 is what many an integer should be.
    const int poison = std::is_integral_v<T> ? 0x7f : 0xff;
    std::memset(static_cast<void*>(data_.get()), poison, size * sizeof(T));
  }
  T& operator[](int64_t i) { return data_.get()[i]; }
  T* data() { return data_.get(); }
  int64_t size() const { return size_; }

 private:
  // As aligned as CUDA's, and no larger than asked for.
  static void* allocate(std::size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, bytes)) throw std::bad_alloc();
    return memory;
  }

  int64_t size_;
  std::unique_ptr<T, void (*)(void*)> data_;
};

inline std::mt19937 generator;

inline double normal() { return std::normal_distribution<double>()(generator); }
inline int64_t below(int64_t n) {
  return std::uniform_int_distribution<int64_t>(0, n - 1)(generator);
}

template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
constexpr Dtype dtype_of = std::is_same_v<T, float>    ? Dtype::kFloat32
                           : std::is_same_v<T, double> ? Dtype::kFloat64
                           : std::is_same_v<T, __half> ? Dtype::kFloat16
                                                       : Dtype::kBFloat16;

template <typename T>
constexpr double epsilon = std::is_same_v<T, float>    ? 1.2e-7
                           : std::is_same_v<T, double> ? 2.3e-16
                           : std::is_same_v<T, __half> ? 9.8e-4
                                                       : 7.9e-3;

template <typename T>
double number(T x) {
  if constexpr (std::is_same_v<T, double>) return x;
  return static_cast<double>(static_cast<float>(x));
}

template <typename T>
T make(double x) {
  if constexpr (std::is_same_v<T, double>) return x;
  return T(static_cast<float>(x));
}

// The next number away from zero.
template <typename T>
T neighbour(T x) {
  return cusim::bits_as<T>(cusim::bits_as<std::uint64_t>(x) + 1);
}

template <typename T>
Array<T> filled(int64_t size) {
  Array<T> array(size);
  for (int64_t i = 0; i < size; ++i) array[i] = make<T>(normal());
  return array;
}

// Within `roundings` of the accumulation of terms of this size, and one of T.
template <typename T>
bool close(T actual, double expected, double terms, double roundings) {
  if (std::isnan(expected)) return std::isnan(number(actual));
  if (std::isinf(expected)) return number(actual) == expected;
  using Sum = accumulate_t<T>;
  const double error = std::abs(number(actual) - expected);
  const double subnormal = std::is_same_v<T, __half> ? 6e-8 : 0;
  return error <= subnormal + epsilon<T> * std::abs(expected) +
                      roundings * (epsilon<Sum> * terms + std::numeric_limits<Sum>::denorm_min());
}

// A sum, and that of its terms' sizes, which bounds how far it may be off.
struct ExactSum {
  double value = 0, terms = 0;

  void add(double term) { value += term, terms += std::abs(term); }
};
template <typename T>
bool close(T actual, const ExactSum& sum, double roundings) {
  return close(actual, sum.value, sum.terms, roundings);
}

// A weight's part of a sum, and its gradient.
struct Share {
  double share;
  ExactSum grad;
};
// The gradient of weight i through the shares, but for a factor: the mean is subtracted term by
// term, so that no term is larger than what it adds to a difference.
inline ExactSum centred(const std::vector<Share>& all, std::size_t i) {
  ExactSum sum;
  for (std::size_t j = 0; j < all.size(); ++j) {
    if (j == i) continue;
    sum.value += all[j].share * (all[i].grad.value - all[j].grad.value);
    sum.terms += all[j].share * (all[i].grad.terms + all[j].grad.terms);
  }
  return sum;
}

// Where a row of pre-activations has the gate and the factor of column f of F.
struct InnerColumns {
  Activation activation;
  int64_t F;

  int64_t gate(int64_t f) const { return is_interleaved(activation) ? 2 * f : f; }
  int64_t up(int64_t f) const { return is_interleaved(activation) ? 2 * f + 1 : F + f; }
};

}  // namespace testing
