// dispatch, combine, route_dot and combine_backward, beside plain C++.

#include "plans.h"

namespace testing {
namespace {

template <typename T>
void test_rows(const RowsCase& c, bool weighted) {
  using Sum = accumulate_t<T>;
  const PlanCase& p = c.plan;
  const int64_t N = p.T * p.K, R = rows_of(p), H = c.H;
  MadePlan made = plan_of(c);
  Array<T> all_tokens = filled<T>(p.T * H + c.shift), rows = filled<T>(R * H);
  Array<T> dispatched(R * H), again(R * H), combined(p.T * H);
  Array<Sum> weights = filled<Sum>(N), dots(N), dots_again(N);
  const T* tokens = all_tokens.data() + c.shift;
  // A route without a row has no weight, whatever stands there.
  for (int64_t route = 0; route < N; ++route) {
    if (made.row_of(route) < 0 && below(2)) weights[route] = make<Sum>(NAN);
  }
  const Routes routes = made.routes(p, weighted ? weights.data() : nullptr);
  dispatch(dtype_of<T>, tokens, routes, H, dispatched.data(), nullptr);
  combine(dtype_of<T>, rows.data(), routes, H, combined.data(), nullptr);
  route_dot(dtype_of<T>, tokens, rows.data(), routes, H, dots.data(), nullptr);

  const auto weight = [&](int64_t route) { return weighted ? number(weights[route]) : 1.0; };
  std::vector<double> expected(R * H);
  for (int64_t t = 0; t < p.T; ++t) {
    for (int64_t h = 0; h < H; ++h) {
      ExactSum sum;
      for (int64_t route = t * p.K; route < (t + 1) * p.K; ++route) {
        const int64_t row = made.row_of(route);
        if (row < 0) continue;
        expected[row * H + h] = weight(route) * number(tokens[t * H + h]);
        sum.add(weight(route) * number(rows[row * H + h]));
      }
      CHECK(close(combined[t * H + h], sum, 2.0 * p.K));
    }
    for (int64_t route = t * p.K; route < (t + 1) * p.K; ++route) {
      ExactSum dot;
      const int64_t row = made.row_of(route);
      for (int64_t h = 0; row >= 0 && h < H; ++h) {
        dot.add(number(tokens[t * H + h]) * number(rows[row * H + h]));
      }
      CHECK(close(dots[route], dot, H + 1.0));
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

void test_all() {
  const RowsCase cases[] = {{{0, 2, 3, 4}, 8},          {{1, 1, 1}, 1},
                            {{33, 2, 5, 9}, 7},         {{100, 2, 5, 9}, 7},
                            {{37, 3, 4, -1, 8}, 64},    {{9, 10, 16, -1, 1, false}, 24},
                            {{9, 2, 3}, 24, true, 1},   {{5, 2, 3, 40, 1, true, true}, 1501},
                            {{4, 2, 2, 3}, 2064},       {{40, 0, 3, 2}, 16},
                            {{21, 2, 3, 0}, 16},        {{11, 3, 3, 4}, 0},
                            {{50, 9, 5, 70}, 16, false}};
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

const Registration registration(
    "rows", test_all,
    {{"dispatch", 256}, {"combine", 256}, {"route_dot", 256}, {"combine_backward", 256}});

}  // namespace
}  // namespace testing
