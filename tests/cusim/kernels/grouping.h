// Groups of rows for the tests of products, and how near their sums are.

#pragma once

#include <numeric>

#include "testing.h"

namespace testing {

constexpr cusim::Card kCards[] = {{99 << 10, 100 << 10, 2}, {163 << 10, 164 << 10, 3}};

struct Case {
  std::vector<int> loads;
  int64_t room;  // rows of each expert, -1: as many as it has
  int64_t K, M, N;
  Activation activation = Activation::kSwiglu;
  bool transposed = false, gathers = true, bias = true, weighs = false;
};

inline std::string text(const Case& c) {
  std::string text = "loads";
  for (const int load : c.loads) text += " " + std::to_string(load);
  return text + " room " + std::to_string(c.room) + " M" + std::to_string(c.M) + " N" +
         std::to_string(c.N) + (c.transposed ? " transposed" : "") + (c.gathers ? " gathered" : "");
}

// A plan with these loads: rows are given to routes at random, and some routes have none.
struct Grouping {
  int64_t T, K, R;
  int E;
  Array<int32_t> slots, sources, offsets, load;
  Array<float> weights;

  explicit Grouping(const Case& c)
      : T((std::accumulate(c.loads.begin(), c.loads.end(), int64_t{0}) + 5) / c.K + 1),
        K(c.K),
        R(0),
        E(static_cast<int>(c.loads.size())),
        slots(T * K),
        sources(num_rows(c)),
        offsets(E + 1),
        load(E),
        weights(T * K) {
    R = sources.size();
    std::vector<int32_t> routes(T * K);
    std::iota(routes.begin(), routes.end(), 0);
    std::shuffle(routes.begin(), routes.end(), generator);
    for (int64_t i = 0; i < T * K; ++i) slots[i] = -1;
    for (int64_t i = 0; i < R; ++i) sources[i] = -1;
    fill(weights);
    offsets[0] = 0;
    for (int e = 0, next = 0; e < E; ++e) {
      const auto room = static_cast<int32_t>(c.room < 0 ? c.loads[e] : c.room);
      offsets[e + 1] = offsets[e] + room;
      load[e] = c.loads[e] > room ? c.loads[e] + 3 : c.loads[e];
      for (int32_t r = offsets[e]; r < last_row(e); ++r) {
        sources[r] = routes[next];
        slots[routes[next++]] = r;
      }
    }
    if (T > 3) {  // and a row that its route does not have
      for (int64_t r = 0; r < R; ++r) {
        if (sources[r] < 0) continue;
        slots[sources[r]] = -1;
        break;
      }
    }
  }

  static int64_t num_rows(const Case& c) {
    int64_t rows = 0;
    for (const int load : c.loads) rows += c.room < 0 ? load : c.room;
    return rows;
  }
  int32_t last_row(int e) { return std::min(offsets[e] + load[e], offsets[e + 1]); }
  Routes routes() { return {slots.data(), sources.data(), weights.data(), T, K, R}; }
  Groups groups() { return {offsets.data(), load.data(), E, R}; }
  int64_t route_of(int64_t r) {
    const int32_t route = sources[r];
    return route >= 0 && slots[route] == r ? route : -1;
  }
};

// Sums of products of T: what an operand may lose, and how many roundings a sum of floats takes.
struct Exactness {
  double operand, roundings;
};

template <typename T>
bool is_near(T actual, double expected, double terms, const Exactness& exactness) {
  const double error = std::abs(number(actual) - expected);
  return error <= (sizeof(T) == 2 ? epsilon<T> * std::abs(expected) + 6e-8 : 0) +
                      (exactness.operand + exactness.roundings * epsilon<float>)*terms;
}

}  // namespace testing
