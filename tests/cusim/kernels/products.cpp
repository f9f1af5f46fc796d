// The products on tensor cores and the kernels beside them, beside plain C++.

#include "grouping.h"

namespace testing {
namespace {

template <typename T>
struct Products {
  const Case& c;
  bool allow_tf32;
  Grouping g{c};
  Array<T> rows = filled<T>((c.gathers ? g.T : g.R) * c.M);
  Array<T> weights = filled<T>(g.E * c.N * c.M), bias = filled<T>(g.E * c.N);
  Exactness exactness{sizeof(T) == 2 ? 0 : allow_tf32 ? 1.0e-3 : 2.0e-6, 8.0 + c.M / 8.0};

  Products(const Case& c, bool allow_tf32) : c(c), allow_tf32(allow_tf32) {
    for (int64_t i = 0; i < weights.size(); ++i) {
      weights[i] = make<T>(number(weights[i]) / std::sqrt(double(c.M)));
    }
  }

  GroupedMM call() {
    return {dtype_of<T>,    allow_tf32,   rows.data(), c.gathers, g.routes(),
            weights.data(), c.transposed, g.groups(),  c.M,       c.N};
  }

  // The number m of the row that row r stands for. Of a row that its route does not have, any.
  double row(int64_t r, int64_t m) {
    if (!c.gathers) return number(rows[r * c.M + m]);
    return number(rows[g.sources[r] / c.K * c.M + m]);
  }

  // A group's matrix has N lines of M numbers, or M of N.
  int64_t place(int e, int64_t n, int64_t m, bool transposed) const {
    return transposed ? (e * c.M + m) * c.N + n : (e * c.N + n) * c.M + m;
  }

  ExactSum sum(int e, int64_t r, int64_t n) {
    ExactSum sum;
    for (int64_t m = 0; m < c.M; ++m) {
      sum.add(row(r, m) * number(weights[place(e, n, m, c.transposed)]));
    }
    return sum;
  }

  double route_weight(int64_t r) {
    const int64_t route = g.route_of(r);
    return route < 0 ? 0 : g.weights[route];
  }
  double weight(int64_t r) { return c.weighs ? route_weight(r) : 1; }

  ValueAndSlope<double> up_of(T x) const { return factor<double>(c.activation, number(x)); }

  void test_rows() {
    Array<T> out(g.R * c.N);
    const void* of_bias = c.bias ? bias.data() : nullptr;
    grouped_mm(call(), of_bias, c.weighs, false, out.data(), nullptr);
    g.check_others(out, c.N, NAN);
    grouped_mm(call(), of_bias, c.weighs, true, out.data(), nullptr);
    g.check_others(out, c.N, 0);
    g.each_row([&](int e, int64_t r) {
      for (int64_t n = 0; n < c.N; ++n) {
        ExactSum s = sum(e, r, n);
        if (c.bias) s.add(weight(r) * number(bias[e * c.N + n]));
        CHECK(is_near(out[r * c.N + n], s, exactness));
      }
    });
  }

  void test_activation() {
    const int64_t F = is_gated(c.activation) ? c.N / 2 : c.N;
    const InnerColumns at{c.activation, F};
    Array<T> pre_activation(g.R * c.N), active(g.R * F), alone(g.R * F);
    const void* of_bias = c.bias ? bias.data() : nullptr;
    grouped_mm_activate(call(), of_bias, c.weighs, c.activation, pre_activation.data(),
                        active.data(), nullptr);
    grouped_mm_activate(call(), of_bias, c.weighs, c.activation, nullptr, alone.data(), nullptr);
    CHECK(!std::memcmp(active.data(), alone.data(), g.R * F * sizeof(T)));
    g.check_others(pre_activation, c.N, 0), g.check_others(active, F, NAN);
    g.each_row([&](int e, int64_t r) {
      for (int64_t n = 0; n < c.N; ++n) {
        ExactSum s = sum(e, r, n);
        if (c.bias) s.add(number(bias[e * c.N + n]));
        CHECK(is_near(pre_activation[r * c.N + n], s, exactness));
      }
      for (int64_t f = 0; f < F; ++f) {
        const double gate = number(pre_activation[r * c.N + at.gate(f)]);
        const double value = activated<double>(c.activation, gate).value;
        const double up = F < c.N ? up_of(pre_activation[r * c.N + at.up(f)]).value : 1;
        const double terms = std::abs(weight(r)) * (std::abs(up) + std::abs(value * up));
        CHECK(close(active[r * F + f], weight(r) * value * up, terms, 8));
      }
    });
  }

  // The product is the gradient of an activation of width N.
  void test_gradient() {
    const int64_t F = c.N, G = is_gated(c.activation) ? 2 * F : F;
    const InnerColumns at{c.activation, F};
    Array<T> pre_activation = filled<T>(g.R * G), grad_pre_activation(g.R * G), active(g.R * F);
    Array<float> dots(g.R * num_dots(F)), grad_weights(g.T * g.K);
    grouped_mm_activate_backward(call(), c.activation, pre_activation.data(),
                                 grad_pre_activation.data(), active.data(), dots.data(), nullptr);
    g.check_others(grad_pre_activation, G, NAN), g.check_others(active, F, NAN);
    // The gradient of the weights also has a part of a bias of the rows' width.
    Array<T> grad = filled<T>(g.T * c.M), row_bias = filled<T>(g.E * c.M);
    sum_dots({dtype_of<T>, dots.data(), F, grad.data(), c.bias ? row_bias.data() : nullptr, c.M,
              g.routes(), g.groups(), grad_weights.data()},
             nullptr);
    g.each_row([&](int e, int64_t r) {
      const int64_t route = g.route_of(r);
      const double w = route_weight(r);
      ExactSum dot;
      for (int64_t f = 0; f < F; ++f) {
        const ExactSum s = sum(e, r, f);
        const double gate = number(pre_activation[r * G + at.gate(f)]);
        const auto of_gate = activated<double>(c.activation, gate);
        const ValueAndSlope<double> of_up =
            G > F ? up_of(pre_activation[r * G + at.up(f)]) : ValueAndSlope<double>{1, 0};
        const double up = of_up.value;
        const double size = 1 + std::abs(up) + std::abs(of_gate.value * up);
        const double terms = s.terms * size * (1 + std::abs(w));
        const double of_value = w * s.value * of_gate.slope * up;
        CHECK(is_near(grad_pre_activation[r * G + at.gate(f)], {of_value, terms}, exactness));
        if (G > F) {
          const double of_factor = w * s.value * of_gate.value * of_up.slope;
          CHECK(is_near(grad_pre_activation[r * G + at.up(f)], {of_factor, terms}, exactness));
        }
        CHECK(close(active[r * F + f], w * of_gate.value * up, std::abs(w) * size, 8));
        dot.value += s.value * of_gate.value * up, dot.terms += terms;
      }
      if (route < 0) return;
      for (int64_t m = 0; c.bias && m < c.M; ++m) {
        dot.add(number(grad[route / c.K * c.M + m]) * number(row_bias[e * c.M + m]));
      }
      CHECK(is_near(grad_weights[route], dot, exactness));
    });
    for (int64_t route = 0; route < g.T * g.K; ++route) {
      if (g.slots[route] < 0) CHECK(grad_weights[route] == 0);
    }
  }

  // The rows [.., M] beside others [R, N], one of the two gathered: the left one or the right.
  GroupedOuter outer(Array<T>& others, bool rows_left) {
    const void *left = others.data(), *right = rows.data();
    int64_t left_width = c.N, right_width = c.M;
    if (rows_left) std::swap(left, right), std::swap(left_width, right_width);
    return {dtype_of<T>,
            allow_tf32,
            left,
            right,
            rows_left && c.gathers,
            !rows_left && c.gathers,
            g.routes(),
            g.groups(),
            left_width,
            right_width};
  }

  void test_outer(bool rows_left) {
    Array<T> others = filled<T>(g.R * c.N), out(g.E * c.N * c.M);
    grouped_outer(outer(others, rows_left), out.data(), nullptr);
    Exactness of_rows = exactness;
    for (int e = 0; e < g.E; ++e) {
      of_rows.roundings = 8.0 + (g.last_row(e) - g.offsets[e]) / 8.0;
      for (int64_t n = 0; n < c.N; ++n) {
        for (int64_t m = 0; m < c.M; ++m) {
          ExactSum sum;
          for (int64_t r = g.offsets[e]; r < g.last_row(e); ++r) {
            sum.add(number(others[r * c.N + n]) * row(r, m));
          }
          CHECK(is_near(out[place(e, n, m, rows_left)], sum, of_rows));
        }
      }
    }
  }

  void test_sum_rows() {
    Array<T> out(g.E * c.M);
    sum_rows({dtype_of<T>, rows.data(), c.gathers, c.weighs, g.routes(), g.groups(), c.M},
             out.data(), nullptr);
    for (int e = 0; e < g.E; ++e) {
      for (int64_t m = 0; m < c.M; ++m) {
        ExactSum sum;
        for (int64_t r = g.offsets[e]; r < g.last_row(e); ++r) sum.add(weight(r) * row(r, m));
        CHECK(is_near(out[e * c.M + m], sum, {0, 40}));
      }
    }
  }
};

template <typename T>
void test_products(const Case& c, bool allow_tf32 = false) {
  context = "products of " + std::to_string(sizeof(T)) + " bytes, " + text(c);
  Products<T> products(c, allow_tf32);
  products.test_rows();
  products.test_activation();
  products.test_gradient();
  products.test_outer(false);
  products.test_outer(true);
  products.test_sum_rows();
}

// Whatever a plan holds, no access is out of bounds: what sanitizers see, and the emulator.
void test_any_plan() {
  const Case c{{5, 9, 0, 40}, 12, 3, 40, 48};
  context = "products of any plan";
  for (int turn = 0; turn < 4; ++turn) {
    Products<__nv_bfloat16> products(c, false);
    Grouping& g = products.g;
    const auto any = [](int64_t n) { return static_cast<int32_t>(below(3 * n + 6) - n - 3); };
    for (int64_t i = 0; i < g.T * g.K; ++i) g.slots[i] = any(g.R);
    for (int64_t r = 0; r < g.R; ++r) g.sources[r] = any(g.T * g.K);
    for (int e = 0; e <= g.E; ++e) g.offsets[e] = any(g.R);
    // Groups that share rows write them twice.
    const bool may_share = turn >= 2 && !cusim::sees_races();
    if (!may_share) std::sort(g.offsets.data(), g.offsets.data() + g.E + 1);
    for (int e = 0; e < g.E; ++e) g.load[e] = turn % 2 ? any(g.R) : INT32_MAX;
    auto inner = filled<__nv_bfloat16>(g.R * 2 * c.N), active = filled<__nv_bfloat16>(g.R * c.N);
    Array<__nv_bfloat16> out(g.E * c.N * c.M);
    Array<float> dots(g.R * num_dots(c.N)), grad_weights(g.T * g.K);
    const GroupedMM call = products.call();
    grouped_mm(call, products.bias.data(), true, true, active.data(), nullptr);
    grouped_mm_activate(call, products.bias.data(), true, Activation::kSwiglu, inner.data(),
                        active.data(), nullptr);
    grouped_mm_activate_backward(call, Activation::kSwiglu, inner.data(), inner.data(),
                                 active.data(), dots.data(), nullptr);
    sum_dots({Dtype::kBFloat16, dots.data(), c.N, products.rows.data(), products.weights.data(),
              c.M, g.routes(), g.groups(), grad_weights.data()},
             nullptr);
    grouped_outer(products.outer(active, false), out.data(), nullptr);
    sum_rows({Dtype::kBFloat16, products.rows.data(), true, true, g.routes(), g.groups(), c.M},
             out.data(), nullptr);
  }
}

// Floats are added with their own rounding, not towards zero as tensor cores do: among 4096 terms
// of one sign that would be 1e-4 of the sum.
void test_long_sums() {
  const Case c{{3}, -1, 1, 4096, 16};
  context = "products of long sums";
  Products<float> products(c, false);
  for (Array<float>* array : {&products.rows, &products.weights}) {
    for (int64_t i = 0; i < array->size(); ++i) (*array)[i] = std::abs((*array)[i]);
  }
  Array<float> out(products.g.R * c.N);
  grouped_mm(products.call(), nullptr, false, false, out.data(), nullptr);
  double worst = 0;
  products.g.each_row([&](int e, int64_t r) {
    for (int64_t n = 0; n < c.N; ++n) {
      const double exact = products.sum(e, r, n).value;
      worst = std::max(worst, std::abs(out[r * c.N + n] - exact) / exact);
    }
  });
  CHECK(worst < 2e-6);
}

// An infinity in the last row of a group is one in its own sums, and is in no others.
void test_infinities() {
  const Case c{{5, 9}, -1, 1, 8, 16};
  context = "products of infinities";
  for (const bool rows_left : {false, true}) {
    Products<__nv_bfloat16> products(c, false);
    Grouping& g = products.g;
    Array<__nv_bfloat16> others(g.R * c.N), out(g.E * c.N * c.M);
    for (int64_t i = 0; i < others.size(); ++i) others[i] = make<__nv_bfloat16>(1);
    for (const int e : {0, 1}) {
      products.rows[g.sources[g.last_row(e) - 1] * c.M] = make<__nv_bfloat16>(INFINITY);
    }
    grouped_outer(products.outer(others, rows_left), out.data(), nullptr);
    for (int64_t i = 0; i < out.size(); ++i) {
      const int64_t m = rows_left ? i / c.N % c.M : i % c.M;
      CHECK(m == 0 ? number(out[i]) == INFINITY : std::isfinite(number(out[i])));
    }
  }
}

void test_all() {
  using A = Activation;
  test_any_plan();
  test_long_sums();
  test_infinities();
  Case cases[] = {
      {{}, -1, 1, 8, 16},
      {{1}, -1, 1, 8, 16, A::kGelu},
      {{0, 63, 1, 64, 0, 65}, -1, 2, 40, 80},
      {{129, 0}, -1, 1, 40, 144, A::kGeglu, true},
      {{150, 45}, -1, 5, 72, 144, A::kRelu, false, false},
      {{70, 0, 3}, -1, 2, 40, 208, A::kSwigluOai, true, false},
      {{20, 33}, 40, 2, 40, 112, A::kSwigluOai, false, true, true, true},
      {{5, 9, 0, 40}, 12, 3, 136, 48, A::kSwiglu, true, true, true, true},
      {std::vector<int>(256, 0), -1, 2, 24, 32, A::kGelu, true, false, false, true},
  };
  for (const int e : {2, 31, 32, 100, 255}) cases[8].loads[e] = 1 + e / 8;
  int turn = 0;
  for (const Case& c : cases) {
    cusim::options().card = kCards[turn++ % 2];
    test_products<__nv_bfloat16>(c);
    test_products<__half>(c);
    test_products<float>(c, true);
    test_products<float>(c, false);
  }
  cusim::options().card = cusim::kLeast;
}

const Registration registration("products", test_all,
                                {{"grouped_mm", 128},
                                 {"grouped_mm_activate", 128},
                                 {"grouped_mm_activate_backward", 128},
                                 {"grouped_outer", 128},
                                 {"sum_dots", 256},
                                 {"sum_rows", 256}});

}  // namespace
}  // namespace testing
