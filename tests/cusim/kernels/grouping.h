// Groups of rows for the tests of products, and how near their sums are.

#pragma once

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
        R(num_rows(c)),
        E(static_cast<int>(c.loads.size())),
        slots(T * K),
        sources(R),
        offsets(E + 1),
        load(E),
        weights(filled<float>(T * K)) {
    std::vector<int32_t> routes(T * K);
    std::iota(routes.begin(), routes.end(), 0);
    std::shuffle(routes.begin(), routes.end(), generator);
    for (int64_t i = 0; i < T * K; ++i) slots[i] = -1;
    for (int64_t i = 0; i < R; ++i) sources[i] = -1;
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
    const auto is_route = [](int32_t source) { return source >= 0; };
    int32_t *end = sources.data() + R, *first = std::find_if(sources.data(), end, is_route);
    if (T > 3 && first < end) slots[*first] = -1;  // and a row that its route does not have
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
  // Calls body(e, r) for each row that a group owns.
  template <typename Body>
  void each_row(const Body& body) {
    for (int e = 0; e < E; ++e) {
      for (int64_t r = offsets[e]; r < last_row(e); ++r) body(e, r);
    }
  }
  // Calls body(i) for each number of the rows [R, width] that no group owns.
  template <typename Body>
  void each_other(int64_t width, const Body& body) {
    std::vector<bool> owned(R);
    each_row([&](int, int64_t r) { owned[r] = true; });
    for (int64_t i = 0; i < R * width; ++i) {
      if (!owned[i / width]) body(i);
    }
  }
  // Checks that such rows stay NaN, or are zero.
  template <typename Number>
  void check_others(Array<Number>& out, int64_t width, double expected) {
    each_other(width, [&](int64_t i) {
      CHECK(std::isnan(expected) ? std::isnan(number(out[i])) : number(out[i]) == expected);
    });
  }
};

// Sums of products of T: what an operand may lose, and how many roundings a sum of floats takes.
struct Exactness {
  double operand, roundings;
};

template <typename T>
bool is_near(T actual, const ExactSum& expected, const Exactness& exactness) {
  const double error = std::abs(number(actual) - expected.value);
  return error <= (sizeof(T) == 2 ? epsilon<T> * std::abs(expected.value) + 6e-8 : 0) +
                      (exactness.operand + exactness.roundings * epsilon<float>)*expected.terms;
}

}  // namespace testing
