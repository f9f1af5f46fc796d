// The CUDA kernels on the CPU, against plain C++, in several orders of threads and blocks. Memory
// is of exact size and filled with NaN, so that a sanitizer sees the first access out of bounds,
// and a comparison what was not written.
//
//   kernel_tests [op ...]: all operators where none is named

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include "cusim.h"
#include "launchers.h"

namespace {

using namespace moe_ext;
using namespace moe_ext::cuda;

long checks = 0, failures = 0;
std::string context;

#define CHECK(condition)                                                                       \
  do {                                                                                         \
    ++checks;                                                                                  \
    if (!(condition) && ++failures < 20)                                                       \
      std::printf("FAILED %s:%d: %s (%s)\n", __FILE__, __LINE__, #condition, context.c_str()); \
  } while (0)

template <typename T>
class Array {
 public:
  explicit Array(int64_t size)
      : size_(size), data_(static_cast<T*>(std::malloc(size * sizeof(T))), std::free) {
    // NaN, or a large number: -1 is what many an integer should be.
    const int poison = std::is_integral_v<T> ? 0x7f : 0xff;
    std::memset(static_cast<void*>(data_.get()), poison, size * sizeof(T));
  }
  T& operator[](int64_t i) { return data_.get()[i]; }
  T* data() { return data_.get(); }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  std::unique_ptr<T, void (*)(void*)> data_;
};

std::mt19937 generator;

double normal() { return std::normal_distribution<double>()(generator); }
int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(generator); }

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
  using Bits = std::conditional_t<sizeof(T) == 2, std::uint16_t,
                                  std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>>;
  Bits bits;
  std::memcpy(&bits, &x, sizeof x);
  ++bits;
  std::memcpy(static_cast<void*>(&x), &bits, sizeof x);
  return x;
}

template <typename T>
void fill(Array<T>& array) {
  for (int64_t i = 0; i < array.size(); ++i) array[i] = make<T>(normal());
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

// ---- Gate ---------------------------------------------------------------------------------------

double score_of(Scoring scoring, double x) {
  if (scoring == Scoring::kSigmoid) return 1 / (1 + std::exp(-x));
  return std::sqrt(std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))));
}

struct GateCase {
  int64_t T;
  int E, K;
  Scoring scoring;
  bool normalize, own_scores;
};

template <typename T>
void test_gate(const GateCase& c) {
  using Sum = accumulate_t<T>;
  Array<T> logits(c.T * c.E), scores(c.T * c.E + 1);
  // Few values, so that many are equal, or neighbours; in some rows so large that their exponential
  // is no float. And those that no order of numbers places, though not where they would make NaN of
  // every sum that is to be compared.
  const double special[] = {NAN, -NAN, INFINITY, -INFINITY, 0.0, -0.0};
  const auto values = [&](Array<T>& array, bool with_special) {
    for (int64_t i = 0; i < array.size(); ++i) {
      const int64_t row = i / c.E;
      const bool odd = with_special && row % 3 == 1;
      array[i] = make<T>(std::round(4 * normal()) / 4 + (row % 3 == 2 ? 128 : 0));
      if (below(4) > 0) continue;
      array[i] = odd ? make<T>(special[below(6)]) : neighbour(array[i]);
    }
  };
  values(logits, !c.own_scores && c.T < 1000), values(scores, true);
  Array<Sum> weights(c.T * c.K), probs(c.T * c.E), importance(c.E);
  Array<Sum> block_sums(gate_blocks(dtype_of<T>, c.T, c.E) * c.E);
  Array<int32_t> expert_ids(c.T * c.K);
  // Of 16-byte vectors only where the logits are theirs too.
  T* choice_scores = c.own_scores ? scores.data() + 1 : logits.data();
  const double scale = 1.5;
  gate({dtype_of<T>, logits.data(), choice_scores, c.T, c.E, c.K, c.scoring, c.normalize, scale,
        weights.data(), expert_ids.data(), probs.data(), importance.data(), block_sums.data()},
       nullptr);

  std::vector<double> sums(c.E);
  for (int64_t t = 0; t < c.T; ++t) {
    std::vector<int> order(c.E);
    std::vector<double> p(c.E);
    for (int e = 0; e < c.E; ++e) order[e] = e;
    const auto key = [&](int e) { return number(choice_scores[t * c.E + e]); };
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      return key(a) > key(b) || (std::isnan(key(a)) && !std::isnan(key(b)));
    });
    double largest = -INFINITY, sum = 0, chosen = 0;
    for (int e = 0; e < c.E; ++e) largest = std::fmax(largest, number(logits[t * c.E + e]));
    for (int e = 0; e < c.E; ++e) {
      const double x = number(logits[t * c.E + e]);
      p[e] = c.scoring == Scoring::kSoftmax ? std::exp(x - largest) : score_of(c.scoring, x);
      sum += p[e];
    }
    for (int e = 0; e < c.E; ++e) {
      if (c.scoring == Scoring::kSoftmax) p[e] /= sum;
      sums[e] += p[e];
      CHECK(close(probs[t * c.E + e], p[e], p[e], 20 + c.E));
    }
    for (int k = 0; k < c.K; ++k) chosen += p[order[k]];
    const double divisor = !c.normalize ? 1
                           : chosen < std::numeric_limits<Sum>::min()
                               ? std::numeric_limits<Sum>::min()
                               : chosen;
    for (int k = 0; k < c.K; ++k) {
      const double w = scale * p[order[k]] / divisor;
      CHECK(expert_ids[t * c.K + k] == order[k]);
      CHECK(close(weights[t * c.K + k], w, w, 40 + c.E));
    }
  }
  for (int e = 0; e < c.E; ++e) CHECK(close(importance[e], sums[e], sums[e], 40 + c.E));

  if constexpr (!std::is_same_v<T, Sum>) return;
  // Backward, at probabilities that are numbers: in a softmax from even ones to one that is nearly
  // all. In every fifth row those that are chosen have a tiny sum.
  const double tiny = std::numeric_limits<Sum>::min();
  const bool is_softmax = c.scoring == Scoring::kSoftmax;
  for (int64_t t = 0; t < c.T; ++t) {
    const auto is_tiny = [&](int e) {
      const int32_t* chosen = &expert_ids[t * c.K];
      return t % 5 == 4 && c.K < c.E && std::count(chosen, chosen + c.K, e) > 0;
    };
    std::vector<double> p(c.E);
    double total = 0;
    for (int e = 0; e < c.E; ++e) {
      p[e] = is_softmax ? std::exp(t % 7 * normal()) : 0.05 + below(100) / 110.0;
      if (!is_tiny(e)) total += p[e];
    }
    for (int e = 0; e < c.E; ++e) {
      const double value = is_tiny(e) ? tiny / c.E / 2 : p[e] / (is_softmax ? total : 1);
      probs[t * c.E + e] = make<Sum>(value);
    }
  }
  Array<Sum> grad_weights(c.T * c.K), grad_probs(c.T * c.E), grad_importance(c.E), grad(c.T * c.E);
  fill(grad_weights), fill(grad_probs), fill(grad_importance);
  for (int64_t route = 0; route < expert_ids.size(); ++route) {
    // Divided by a tiny sum they stay numbers.
    if (route / c.K % 5 == 4) grad_weights[route] = make<Sum>(number(grad_weights[route]) / 100);
  }
  // An id that is no expert's counts for nothing, whatever stands beside it.
  const int32_t strays[] = {-1, c.E, c.E + 1, INT32_MIN, INT32_MAX};
  const auto is_expert = [&](int32_t id) { return id >= 0 && id < c.E; };
  for (int64_t route = 0; route < expert_ids.size(); ++route) {
    if (route / c.K % 4 > 0 || below(3) > 0) continue;
    expert_ids[route] = strays[below(5)];
    grad_weights[route] = make<Sum>(INFINITY);
  }
  gate_backward({dtype_of<Sum>, grad_weights.data(), c.own_scores ? nullptr : grad_probs.data(),
                 grad_importance.data(), probs.data(), expert_ids.data(), c.T, c.E, c.K, c.scoring,
                 c.normalize, scale, grad.data()},
                nullptr);
  for (int64_t t = 0; t < c.T; ++t) {
    // sizes: of the terms that make g. A mean is subtracted term by term, so that no term is larger
    // than what it adds to a difference.
    std::vector<double> g(c.E), sizes(c.E);
    const auto p = [&](int e) { return number(probs[t * c.E + e]); };
    double sum = 0;
    for (int e = 0; e < c.E; ++e) {
      const double terms[] = {number(grad_importance[e]),
                              c.own_scores ? 0 : number(grad_probs[t * c.E + e])};
      g[e] = terms[0] + terms[1], sizes[e] = std::abs(terms[0]) + std::abs(terms[1]);
    }
    std::vector<std::pair<int, double>> chosen;  // with the gradient of the weight
    for (int k = 0; k < c.K; ++k) {
      const int e = expert_ids[t * c.K + k];
      if (!is_expert(e)) continue;
      chosen.emplace_back(e, number(grad_weights[t * c.K + k]));
      sum += p(e);
    }
    for (const auto& [e, of_weight] : chosen) {
      double value = of_weight, size = std::abs(of_weight);
      if (c.normalize && sum >= tiny) {
        value = size = 0;
        for (const auto& [other, of_other] : chosen) {
          if (other == e) continue;
          value += p(other) / sum * (of_weight - of_other);
          size += p(other) / sum * (std::abs(of_weight) + std::abs(of_other));
        }
      }
      const double factor = scale / (c.normalize ? std::max(sum, tiny) : 1);
      g[e] += factor * value, sizes[e] += factor * size;
    }
    for (int e = 0; e < c.E; ++e) {
      double value = 0, size = 0;
      for (int other = 0; other < c.E; ++other) {
        if (other == e) continue;
        value += p(other) * (g[e] - g[other]), size += p(other) * (sizes[e] + sizes[other]);
      }
      const double slope = c.scoring == Scoring::kSigmoid ? p(e) * (1 - p(e))
                           : p(e) < 1e-8                  ? p(e) / 2
                                                          : -std::expm1(-p(e) * p(e)) / (2 * p(e));
      const double expected = is_softmax ? p(e) * value : slope * g[e];
      CHECK(close(grad[t * c.E + e], expected, p(e) * (is_softmax ? size : sizes[e]), 40 + c.E));
    }
  }
}

void test_gates() {
  const GateCase cases[] = {{0, 4, 2, Scoring::kSoftmax, false, false},
                            {1, 1, 1, Scoring::kSigmoid, true, false},
                            {300, 8, 2, Scoring::kSoftmax, true, true},
                            {70, 13, 13, Scoring::kSqrtSoftplus, false, false},
                            {70, 64, 3, Scoring::kSigmoid, false, true},
                            {33, 100, 20, Scoring::kSoftmax, true, false},
                            {19, 256, 8, Scoring::kSigmoid, true, false},
                            {9, 250, 40, Scoring::kSoftmax, false, true},
                            {9, 512, 3, Scoring::kSqrtSoftplus, true, true},
                            {9, 1024, 5, Scoring::kSoftmax, true, false},
                            // More than a block's rows for each of its groups.
                            {4097, 256, 1, Scoring::kSoftmax, false, false},
                            // More blocks than importance_kernel has parts.
                            {2000, 8, 2, Scoring::kSoftmax, false, false}};
  for (const GateCase& c : cases) {
    const bool large = c.T > 1000;
    if (large && cusim::options().order != cusim::Order::kForward) continue;
    context = "gate T" + std::to_string(c.T) + " E" + std::to_string(c.E);
    test_gate<float>(c);
    if (large) continue;
    test_gate<double>(c);
    test_gate<__half>(c);
    test_gate<__nv_bfloat16>(c);
  }
}

// ---- Plan ---------------------------------------------------------------------------------------

struct PlanCase {
  int64_t T, K;
  int E;
  int64_t capacity;  // -1: dropless
  int64_t align;
  bool choice_major, priority, skewed;
};

struct MadePlan {
  Array<int32_t> slots, sources, offsets, load;
};

int64_t rows_of(const PlanCase& c) {
  if (c.capacity >= 0) return c.E * c.capacity;
  const int64_t N = c.T * c.K;
  return c.align * ((N + std::min<int64_t>(c.E, N) * (c.align - 1)) / c.align);
}

MadePlan make_plan(const PlanCase& c, Array<int32_t>& expert_ids, Array<float>& priority) {
  for (int64_t i = 0; i < expert_ids.size(); ++i) {
    // A few ids that are no expert's.
    expert_ids[i] = static_cast<int32_t>(c.skewed ? i % 2 : below(c.E + 2) - 1);
    const float special[] = {NAN, -NAN, INFINITY, -INFINITY, -0.0f};
    priority[i] = below(6) == 0 ? special[below(5)] : static_cast<float>(below(6) - 2);
  }
  MadePlan made{Array<int32_t>(c.T * c.K), Array<int32_t>(rows_of(c)), Array<int32_t>(c.E + 1),
                Array<int32_t>(c.E)};
  Array<int32_t> scratch(plan_scratch(c.T * c.K, c.E, c.priority));
  plan({expert_ids.data(), c.priority ? priority.data() : nullptr, c.T, c.K, c.E, c.capacity,
        c.choice_major, c.align, rows_of(c), made.slots.data(), made.sources.data(),
        made.offsets.data(), made.load.data(), scratch.data()},
       nullptr);
  return made;
}

void test_plan(const PlanCase& c) {
  Array<int32_t> expert_ids(c.T * c.K);
  Array<float> priority(c.T * c.K);
  MadePlan made = make_plan(c, expert_ids, priority);

  std::vector<std::vector<int64_t>> waiting(c.E);
  for (int64_t place = 0; place < c.T * c.K; ++place) {
    const int64_t route = c.choice_major ? place % c.T * c.K + place / c.T : place;
    const int32_t e = expert_ids[route];
    if (e >= 0 && e < c.E) waiting[e].push_back(route);
  }
  std::vector<int64_t> slots(c.T * c.K, -1), sources(rows_of(c), -1);
  int64_t row = 0;
  for (int e = 0; e < c.E; ++e) {
    CHECK(made.offsets[e] == row);
    CHECK(made.load[e] == static_cast<int64_t>(waiting[e].size()));
    std::vector<int64_t> kept = waiting[e];
    const int64_t size = static_cast<int64_t>(kept.size());
    if (c.capacity >= 0 && size > c.capacity) {
      if (c.priority) {
        std::stable_sort(kept.begin(), kept.end(), [&](int64_t a, int64_t b) {
          const float p = priority[a], q = priority[b];
          return p > q || (std::isnan(q) && !std::isnan(p));
        });
      }
      kept.resize(c.capacity);
      const std::set<int64_t> chosen(kept.begin(), kept.end());
      kept.clear();
      for (const int64_t route : waiting[e]) {
        if (chosen.count(route)) kept.push_back(route);
      }
    }
    for (std::size_t i = 0; i < kept.size(); ++i) {
      slots[kept[i]] = row + static_cast<int64_t>(i);
      sources[row + static_cast<int64_t>(i)] = kept[i];
    }
    row += c.capacity >= 0 ? c.capacity : (size + c.align - 1) / c.align * c.align;
  }
  CHECK(made.offsets[c.E] == row);
  for (int64_t i = 0; i < c.T * c.K; ++i) CHECK(made.slots[i] == slots[i]);
  for (int64_t i = 0; i < rows_of(c); ++i) CHECK(made.sources[i] == sources[i]);
}

void test_plans() {
  const PlanCase cases[] = {
      {0, 2, 3, -1, 1, true, false, false},
      {1, 1, 1, 1, 1, false, true, false},
      {30, 2, 4, 2000, 1, true, false, false},  // few routes and many rows
      {33, 3, 5, -1, 8, true, false, false},
      {40, 2, 70, 1, 1, true, false, false},
      {200, 2, 3, 30, 1, true, true, false},
      {200, 2, 3, 0, 1, false, true, false},
      {600, 1, 2, 900, 1, false, true, true},
      {700, 3, 2, 520, 1, true, true, true},
      {2700, 2, 9, 300, 1, true, false, false},
      {2700, 2, 40, -1, 16, false, false, false},
      {2700, 2, 100, -1, 1, true, false, false},
      {2700, 2, 9, 310, 1, true, true, false},
      {4500, 2, 2, 4400, 1, false, true, true},
      {60, 2, 1024, -1, 1, true, false, false},
      // Few priorities, so that what is kept ends with the last of equal ones here and there.
      {90, 2, 30, 3, 1, true, true, false},
      // More experts than threads, and more chunks than are read at once.
      {2700, 2, 600, -1, 1, true, false, false},
      {9000, 2, 300, -1, 8, false, false, false}};
  for (const PlanCase& c : cases) {
    context = "plan T" + std::to_string(c.T) + " E" + std::to_string(c.E);
    test_plan(c);
  }
}

// ---- MaskWeights
// ---------------------------------------------------------------------------------------

template <typename T>
void test_mask_weights(int64_t num_tokens, int64_t K, bool normalize) {
  const double eps = 0.4, scale = 1.5;
  Array<T> weights(num_tokens * K), grad(num_tokens * K), kept(num_tokens * K);
  Array<T> grad_weights(num_tokens * K);
  Array<int32_t> slots(num_tokens * K);
  fill(grad);
  for (int64_t route = 0; route < slots.size(); ++route) {
    // Some tokens' sums are below the eps, and of some one weight is nearly all; what stands
    // beside a dropped route is poison.
    slots[route] = below(3) ? static_cast<int32_t>(route) : -1;
    const double weight = route / K % 4 == 0               ? 0.1 / K
                          : route / K % 4 == 1             ? 0.45
                          : route % K == route / K / 4 % K ? 0.9
                                                           : 1e-9;
    weights[route] = make<T>(slots[route] < 0 ? NAN : weight * (1 + 1e-3 * below(9)));
    if (slots[route] < 0) grad[route] = make<T>(INFINITY);
  }
  const MaskWeights call{dtype_of<T>, weights.data(), slots.data(), num_tokens,
                         K,           normalize,      eps,          scale};
  mask_weights(call, kept.data(), nullptr);
  mask_weights_backward(call, grad.data(), grad_weights.data(), nullptr);
  for (int64_t t = 0; t < num_tokens; ++t) {
    double sum = 0;
    std::vector<int64_t> with_row;
    for (int64_t i = t * K; i < (t + 1) * K; ++i) {
      if (slots[i] >= 0) with_row.push_back(i), sum += number(weights[i]);
    }
    const double divisor = normalize ? std::max(sum, eps) : 1;
    for (int64_t i = t * K; i < (t + 1) * K; ++i) {
      const bool has_row = slots[i] >= 0;
      const double weight = has_row ? number(weights[i]) * scale / divisor : 0;
      CHECK(close(kept[i], weight, weight, K + 4));
      double g = has_row ? number(grad[i]) : 0, size = std::abs(g);
      if (has_row && normalize && sum >= eps) {
        // The mean is subtracted term by term.
        g = size = 0;
        for (const int64_t other : with_row) {
          if (other == i) continue;
          const double share = number(weights[other]) / sum;
          g += share * (number(grad[i]) - number(grad[other]));
          size += share * (std::abs(number(grad[i])) + std::abs(number(grad[other])));
        }
      }
      CHECK(close(grad_weights[i], g * scale / divisor, size * scale / divisor, K + 6));
    }
  }
}

void test_mask_weights() {
  const std::pair<int64_t, int64_t> cases[] = {{0, 2},   {1, 1},   {255, 2},
                                               {256, 8}, {257, 3}, {9, 40}};
  for (const auto& [T, K] : cases) {
    context = "mask_weights T" + std::to_string(T) + " K" + std::to_string(K);
    for (const bool normalize : {false, true}) {
      test_mask_weights<float>(T, K, normalize);
      test_mask_weights<double>(T, K, normalize);
    }
  }
}

// ---- Rows ---------------------------------------------------------------------------------------

struct RowsCase {
  PlanCase plan;
  int64_t H;
  bool consistent = true;
  int64_t shift = 0;  // of the tokens' address, in elements
};

// Where it is not consistent, slots and sources of no plan.
MadePlan plan_of(const RowsCase& c) {
  const int64_t N = c.plan.T * c.plan.K, R = rows_of(c.plan);
  Array<int32_t> expert_ids(N);
  Array<float> priority(N);
  MadePlan made = make_plan(c.plan, expert_ids, priority);
  if (!c.consistent) {
    for (int64_t i = 0; i < N; ++i) made.slots[i] = static_cast<int32_t>(below(R + 4) - 2);
    for (int64_t i = 0; i < R; ++i) made.sources[i] = static_cast<int32_t>(below(N + 4) - 2);
  }
  return made;
}

template <typename T>
void test_rows(const RowsCase& c, bool weighted) {
  using Sum = accumulate_t<T>;
  const PlanCase& p = c.plan;
  const int64_t N = p.T * p.K, R = rows_of(p), H = c.H;
  MadePlan made = plan_of(c);
  Array<T> all_tokens(p.T * H + c.shift);
  Array<T> rows(R * H), dispatched(R * H), again(R * H), combined(p.T * H);
  Array<Sum> weights(N), dots(N), dots_again(N);
  fill(all_tokens), fill(rows), fill(weights);
  const T* tokens = all_tokens.data() + c.shift;
  const auto row_of = [&](int64_t route) -> int64_t {
    const int64_t slot = made.slots[route];
    return slot >= 0 && slot < R && made.sources[slot] == route ? slot : -1;
  };
  // What has no row has no weight, whatever stands there.
  for (int64_t route = 0; route < N; ++route) {
    if (row_of(route) < 0 && below(2)) weights[route] = make<Sum>(NAN);
  }
  const Routes routes{
      made.slots.data(), made.sources.data(), weighted ? weights.data() : nullptr, p.T, p.K, R};
  dispatch(dtype_of<T>, tokens, routes, H, dispatched.data(), nullptr);
  combine(dtype_of<T>, rows.data(), routes, H, combined.data(), nullptr);
  route_dot(dtype_of<T>, tokens, rows.data(), routes, H, dots.data(), nullptr);

  const auto weight = [&](int64_t route) { return weighted ? number(weights[route]) : 1.0; };
  std::vector<double> expected(R * H);
  for (int64_t t = 0; t < p.T; ++t) {
    for (int64_t h = 0; h < H; ++h) {
      double sum = 0, terms = 0;
      for (int64_t route = t * p.K; route < (t + 1) * p.K; ++route) {
        const int64_t row = row_of(route);
        if (row < 0) continue;
        expected[row * H + h] = weight(route) * number(tokens[t * H + h]);
        sum += weight(route) * number(rows[row * H + h]);
        terms += std::abs(weight(route) * number(rows[row * H + h]));
      }
      CHECK(close(combined[t * H + h], sum, terms, 2.0 * p.K));
    }
    for (int64_t route = t * p.K; route < (t + 1) * p.K; ++route) {
      double sum = 0, terms = 0;
      for (int64_t h = 0; row_of(route) >= 0 && h < H; ++h) {
        const double term = number(tokens[t * H + h]) * number(rows[row_of(route) * H + h]);
        sum += term, terms += std::abs(term);
      }
      CHECK(close(dots[route], sum, terms, H + 1.0));
    }
  }
  for (int64_t i = 0; i < R * H; ++i) {
    CHECK(close(dispatched[i], expected[i], std::abs(expected[i]), 1));
  }
  if (!weighted) return;
  combine_backward(dtype_of<T>, tokens, rows.data(), routes, H, again.data(), dots_again.data(),
                   nullptr);
  CHECK(!std::memcmp(again.data(), dispatched.data(), R * H * sizeof(T)));
  CHECK(!std::memcmp(dots_again.data(), dots.data(), N * sizeof(Sum)));
}

void test_rows() {
  const RowsCase cases[] = {{{0, 2, 3, 4, 1, true, false, false}, 8},
                            {{1, 1, 1, -1, 1, true, false, false}, 1},
                            {{33, 2, 5, 9, 1, true, false, false}, 7},
                            {{100, 2, 5, 9, 1, true, false, false}, 7},
                            {{37, 3, 4, -1, 8, true, false, false}, 64},
                            {{9, 10, 16, -1, 1, false, false, false}, 24},
                            {{9, 2, 3, -1, 1, true, false, false}, 24, true, 1},
                            {{5, 2, 3, 40, 1, true, true, false}, 1501},
                            {{4, 2, 2, 3, 1, true, false, false}, 2064},
                            {{40, 0, 3, 2, 1, true, false, false}, 16},
                            {{21, 2, 3, 0, 1, true, false, false}, 16},
                            {{11, 3, 3, 4, 1, true, false, false}, 0},
                            {{50, 9, 5, 70, 1, true, false, false}, 16, false}};
  for (const RowsCase& c : cases) {
    context = "rows T" + std::to_string(c.plan.T) + " K" + std::to_string(c.plan.K) + " H" +
              std::to_string(c.H) + (c.consistent ? "" : ", slots and sources of no plan");
    for (const bool weighted : {false, true}) {
      test_rows<float>(c, weighted);
      test_rows<double>(c, weighted);
      test_rows<__half>(c, weighted);
      test_rows<__nv_bfloat16>(c, weighted);
    }
  }
}

// ---- Activation ---------------------------------------------------------------------------------

template <typename T>
void test_activation(const RowsCase& c, Activation activation, bool weighted) {
  using Sum = accumulate_t<T>;
  const PlanCase& p = c.plan;
  const int64_t N = p.T * p.K, R = rows_of(p), F = c.H, G = is_gated(activation) ? 2 * F : F;
  MadePlan made = plan_of(c);
  Array<T> pre_activation(R * G), grad(R * F), out(R * F), grad_pre_activation(R * G),
      active(R * F);
  Array<Sum> weights(N), grad_weights(N);
  fill(pre_activation), fill(grad), fill(weights);
  std::vector<int64_t> route(R, -1);
  std::vector<bool> has_row(N);
  for (int64_t r = 0; r < R; ++r) {
    const int64_t source = made.sources[r];
    if (source < 0 || source >= N || made.slots[source] != r) {
      // What no route has is not read.
      for (int64_t i = 0; i < G; ++i) pre_activation[r * G + i] = make<T>(NAN);
      for (int64_t i = 0; i < F; ++i) grad[r * F + i] = make<T>(NAN);
      continue;
    }
    route[r] = source;
    has_row[source] = true;
  }
  const Routes routes{
      made.slots.data(), made.sources.data(), weighted ? weights.data() : nullptr, p.T, p.K, R};
  activate(dtype_of<T>, pre_activation.data(), routes, F, activation, out.data(), nullptr);
  if (weighted) {
    activate_backward({dtype_of<T>, grad.data(), pre_activation.data(), F, activation,
                       grad_pre_activation.data(), active.data(), grad_weights.data()},
                      routes, nullptr);
    CHECK(!std::memcmp(active.data(), out.data(), R * F * sizeof(T)));
  }
  for (int64_t r = 0; r < R; ++r) {
    double dot = 0, dot_terms = 0;
    const double weight = route[r] < 0 ? 0 : weighted ? number(weights[route[r]]) : 1;
    for (int64_t f = 0; f < F; ++f) {
      double value = 0, slope = 0, up = 1, upstream = 0;
      if (route[r] >= 0) {
        const auto of_gate = activated<double>(activation, number(pre_activation[r * G + f]));
        value = of_gate.value, slope = of_gate.slope;
        if (G != F) up = number(pre_activation[r * G + F + f]);
        upstream = number(grad[r * F + f]);
      }
      const double terms = std::abs(up) + std::abs(value * up);
      CHECK(close(out[r * F + f], weight * value * up, std::abs(weight) * terms, 8));
      if (!weighted) continue;
      const double size = std::abs(weight * upstream) * (1 + terms);
      CHECK(close(grad_pre_activation[r * G + f], weight * upstream * slope * up, size, 8));
      if (G != F) {
        CHECK(
            close(grad_pre_activation[r * G + F + f], weight * upstream * value, size + 1e-30, 8));
      }
      dot += upstream * value * up, dot_terms += std::abs(upstream) * terms;
    }
    if (weighted && route[r] >= 0) CHECK(close(grad_weights[route[r]], dot, dot_terms, F + 8.0));
  }
  for (int64_t i = 0; weighted && i < N; ++i) {
    if (!has_row[i]) CHECK(grad_weights[i] == 0);
  }
}

void test_activations() {
  const RowsCase cases[] = {{{0, 2, 3, 4, 1, true, false, false}, 8},
                            {{1, 1, 1, -1, 1, true, false, false}, 1},
                            {{33, 2, 5, 9, 1, true, false, false}, 7},
                            {{17, 3, 4, -1, 8, true, false, false}, 64},
                            {{5, 2, 3, 10, 1, true, true, false}, 601},
                            {{4, 2, 2, 3, 1, true, false, false}, 2312},
                            {{11, 3, 3, 4, 1, true, false, false}, 0},
                            {{40, 5, 5, 50, 1, true, false, false}, 16, false}};
  for (const RowsCase& c : cases) {
    for (const Activation activation :
         {Activation::kSwiglu, Activation::kGeglu, Activation::kGelu, Activation::kRelu}) {
      context = "activate T" + std::to_string(c.plan.T) + " F" + std::to_string(c.H) + " of " +
                std::to_string(static_cast<int>(activation));
      for (const bool weighted : {false, true}) {
        test_activation<float>(c, activation, weighted);
        test_activation<double>(c, activation, weighted);
        test_activation<__half>(c, activation, weighted);
        test_activation<__nv_bfloat16>(c, activation, weighted);
      }
    }
  }
}

// What __launch_bounds__ promises to nvcc; the emulator does not see it.
void check_launches() {
  const std::map<std::string, std::size_t> bounds = {
      {"gate", 256},          {"gate_importance", 1024},
      {"gate_backward", 256}, {"plan_count", 256},
      {"plan_place", 256},    {"plan_keep", 512},
      {"mask_weights", 256},  {"mask_weights_backward", 256},
      {"dispatch", 256},      {"combine", 256},
      {"route_dot", 256},     {"combine_backward", 256},
      {"activate", 256},      {"activate_backward", 256}};
  for (const cusim::Launch& launch : cusim::launches()) {
    context = launch.name;
    CHECK(launch.threads <= bounds.at(launch.name) && launch.threads % 32 == 0);
  }
  cusim::launches().clear();
}

}  // namespace

int main(int argc, char** argv) {
  const std::set<std::string> named(argv + 1, argv + argc);
  for (const std::string& name : named) {
    if (std::set<std::string>{"gate", "plan", "mask_weights", "rows", "activate"}.count(name))
      continue;
    std::printf("usage: %s [gate] [plan] [mask_weights] [rows] [activate], got %s\n", argv[0],
                name.c_str());
    return 2;
  }
  const auto wants = [&](const char* op) { return named.empty() || named.count(op); };
  cusim::options().recording = true;
  try {
    for (const char* order : {"forward", "reverse", "random1", "random2", "random3"}) {
      cusim::set_order(order);
      generator.seed(static_cast<unsigned>(cusim::options().seed));
      if (wants("gate")) test_gates();
      if (wants("plan")) test_plans();
      if (wants("mask_weights")) test_mask_weights();
      if (wants("rows")) test_rows();
      if (wants("activate")) test_activations();
      check_launches();
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
  std::printf("%ld checks: %ld failed\n", checks, failures);
  return failures != 0;
}
