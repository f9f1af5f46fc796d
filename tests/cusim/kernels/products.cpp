// The products on tensor cores and the kernels beside them, beside plain C++.

#include "grouping.h"

namespace testing {
namespace {

template <typename T>
struct Products {
  const Case& c;
  bool allow_tf32;
  Grouping g{c};
  Array<T> rows{(c.gathers ? g.T : g.R) * c.M}, weights{g.E * c.N * c.M}, bias{g.E * c.N};
  Exactness exactness{sizeof(T) == 2 ? 0 : allow_tf32 ? 1.0e-3 : 2.0e-6, 8.0 + c.M / 8.0};

  Products(const Case& c, bool allow_tf32) : c(c), allow_tf32(allow_tf32) {
    fill(rows), fill(weights), fill(bias);
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

  struct Sum {
    double value, terms;
  };
  Sum sum(int e, int64_t r, int64_t n) {
    Sum out{0, 0};
    for (int64_t m = 0; m < c.M; ++m) {
      const int64_t at = c.transposed ? (e * c.M + m) * c.N + n : (e * c.N + n) * c.M + m;
      const double product = row(r, m) * number(weights[at]);
      out.value += product, out.terms += std::abs(product);
    }
    return out;
  }

  double weight(int64_t r) {
    if (!c.weighs) return 1;
    const int64_t route = g.route_of(r);
    return route < 0 ? 0 : g.weights[route];
  }

  ValueAndSlope<double> up_of(T x) const { return factor<double>(c.activation, number(x)); }

  // Calls body(e, r) for each row that a group owns.
  template <typename Body>
  void each_row(const Body& body) {
    for (int e = 0; e < g.E; ++e) {
      for (int64_t r = g.offsets[e]; r < g.last_row(e); ++r) body(e, r);
    }
  }
  // Other rows stay as they were, NaN, or are zero.
  void check_others(Array<T>& out, int64_t width, double expected) {
    std::vector<bool> owned(g.R);
    each_row([&](int, int64_t r) { owned[r] = true; });
    bool right = true;
    for (int64_t r = 0; r < g.R; ++r) {
      for (int64_t i = 0; !owned[r] && i < width; ++i) {
        const double found = number(out[r * width + i]);
        right &= std::isnan(expected) ? std::isnan(found) : found == expected;
      }
    }
    CHECK(right);
  }

  void test_rows() {
    Array<T> out(g.R * c.N);
    const void* of_bias = c.bias ? bias.data() : nullptr;
    grouped_mm(call(), of_bias, c.weighs, false, out.data(), nullptr);
    check_others(out, c.N, NAN);
    grouped_mm(call(), of_bias, c.weighs, true, out.data(), nullptr);
    check_others(out, c.N, 0);
    bool right = true;
    each_row([&](int e, int64_t r) {
      for (int64_t n = 0; n < c.N; ++n) {
        const Sum s = sum(e, r, n);
        const double more = c.bias ? weight(r) * number(bias[e * c.N + n]) : 0;
        right &= is_near(out[r * c.N + n], s.value + more, s.terms + std::abs(more), exactness);
      }
    });
    CHECK(right);
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
    check_others(pre_activation, c.N, 0), check_others(active, F, NAN);
    bool right = true, is_active = true;
    each_row([&](int e, int64_t r) {
      for (int64_t n = 0; n < c.N; ++n) {
        const Sum s = sum(e, r, n);
        const double more = c.bias ? number(bias[e * c.N + n]) : 0;
        right &= is_near(pre_activation[r * c.N + n], s.value + more, s.terms + std::abs(more),
                         exactness);
      }
      for (int64_t f = 0; f < F; ++f) {
        const double gate = number(pre_activation[r * c.N + at.gate(f)]);
        const double value = activated<double>(c.activation, gate).value;
        const double up = F < c.N ? up_of(pre_activation[r * c.N + at.up(f)]).value : 1;
        const double terms = std::abs(weight(r)) * (std::abs(up) + std::abs(value * up));
        is_active &= close(active[r * F + f], weight(r) * value * up, terms, 8);
      }
    });
    CHECK(right);
    CHECK(is_active);
  }

  // The product is the gradient of an activation of width N.
  void test_gradient() {
    const int64_t F = c.N, G = is_gated(c.activation) ? 2 * F : F;
    const InnerColumns at{c.activation, F};
    Array<T> pre_activation(g.R * G), grad_pre_activation(g.R * G), active(g.R * F);
    Array<float> dots(g.R * num_dots(F)), grad_weights(g.T * g.K);
    fill(pre_activation);
    grouped_mm_activate_backward(call(), c.activation, pre_activation.data(),
                                 grad_pre_activation.data(), active.data(), dots.data(), nullptr);
    check_others(grad_pre_activation, G, NAN), check_others(active, F, NAN);
    // The gradient of the weights also has a part of a bias of the rows' width.
    Array<T> grad(g.T * c.M), row_bias(g.E * c.M);
    fill(grad), fill(row_bias);
    sum_dots({dtype_of<T>, dots.data(), F, grad.data(), c.bias ? row_bias.data() : nullptr, c.M,
              g.routes(), g.groups(), grad_weights.data()},
             nullptr);
    bool right = true, is_active = true, is_dot = true;
    each_row([&](int e, int64_t r) {
      const int64_t route = g.route_of(r);
      const double w = route < 0 ? 0 : g.weights[route];
      double dot = 0, dot_terms = 0;
      for (int64_t f = 0; f < F; ++f) {
        const Sum s = sum(e, r, f);
        const double gate = number(pre_activation[r * G + at.gate(f)]);
        const auto of_gate = activated<double>(c.activation, gate);
        const ValueAndSlope<double> of_up =
            G > F ? up_of(pre_activation[r * G + at.up(f)]) : ValueAndSlope<double>{1, 0};
        const double up = of_up.value;
        const double size = 1 + std::abs(up) + std::abs(of_gate.value * up);
        const double terms = s.terms * size * (1 + std::abs(w));
        right &= is_near(grad_pre_activation[r * G + at.gate(f)], w * s.value * of_gate.slope * up,
                         terms, exactness);
        if (G > F) {
          right &= is_near(grad_pre_activation[r * G + at.up(f)],
                           w * s.value * of_gate.value * of_up.slope, terms, exactness);
        }
        is_active &= close(active[r * F + f], w * of_gate.value * up, std::abs(w) * size, 8);
        dot += s.value * of_gate.value * up, dot_terms += terms;
      }
      if (route < 0) return;
      for (int64_t m = 0; c.bias && m < c.M; ++m) {
        const double product = number(grad[route / c.K * c.M + m]) * number(row_bias[e * c.M + m]);
        dot += product, dot_terms += std::abs(product);
      }
      is_dot &= is_near(grad_weights[route], dot, dot_terms, exactness);
    });
    for (int64_t route = 0; route < g.T * g.K; ++route) {
      if (g.slots[route] < 0) is_dot &= grad_weights[route] == 0;
    }
    CHECK(right);
    CHECK(is_active);
    CHECK(is_dot);
  }

  // The rows [.., M] beside others [R, N], one of the two gathered.
  void test_outer(bool gathered_left) {
    Array<T> others(g.R * c.N), out(g.E * c.N * c.M);
    fill(others);
    const int64_t left_width = gathered_left ? c.M : c.N, right_width = gathered_left ? c.N : c.M;
    grouped_outer({dtype_of<T>, allow_tf32, gathered_left ? rows.data() : others.data(),
                   gathered_left ? others.data() : rows.data(), gathered_left && c.gathers,
                   !gathered_left && c.gathers, g.routes(), g.groups(), left_width, right_width},
                  out.data(), nullptr);
    Exactness of_rows = exactness;
    bool right = true;
    for (int e = 0; e < g.E; ++e) {
      of_rows.roundings = 8.0 + (g.last_row(e) - g.offsets[e]) / 8.0;
      for (int64_t n = 0; n < c.N; ++n) {
        for (int64_t m = 0; m < c.M; ++m) {
          double value = 0, terms = 0;
          for (int64_t r = g.offsets[e]; r < g.last_row(e); ++r) {
            const double product = number(others[r * c.N + n]) * row(r, m);
            value += product, terms += std::abs(product);
          }
          const int64_t at = gathered_left ? (e * c.M + m) * c.N + n : (e * c.N + n) * c.M + m;
          right &= is_near(out[at], value, terms, of_rows);
        }
      }
    }
    CHECK(right);
  }

  void test_sum_rows() {
    Array<T> out(g.E * c.M);
    sum_rows({dtype_of<T>, rows.data(), c.gathers, c.weighs, g.routes(), g.groups(), c.M},
             out.data(), nullptr);
    bool right = true;
    for (int e = 0; e < g.E; ++e) {
      for (int64_t m = 0; m < c.M; ++m) {
        double value = 0, terms = 0;
        for (int64_t r = g.offsets[e]; r < g.last_row(e); ++r) {
          value += weight(r) * row(r, m), terms += std::abs(weight(r) * row(r, m));
        }
        right &= is_near(out[e * c.M + m], value, terms, {0, 40});
      }
    }
    CHECK(right);
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

#ifdef __SANITIZE_THREAD__
constexpr bool kMayOverlap = false;  // groups that share rows write them twice
#else
constexpr bool kMayOverlap = true;
#endif

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
    if (turn < 2 || !kMayOverlap) std::sort(g.offsets.data(), g.offsets.data() + g.E + 1);
    for (int e = 0; e < g.E; ++e) g.load[e] = turn % 2 ? any(g.R) : INT32_MAX;
    Array<__nv_bfloat16> inner(g.R * 2 * c.N), active(g.R * c.N), out(g.E * c.N * c.M);
    Array<float> dots(g.R * num_dots(c.N)), grad_weights(g.T * g.K);
    fill(inner), fill(active);
    const GroupedMM call = products.call();
    grouped_mm(call, products.bias.data(), true, true, active.data(), nullptr);
    grouped_mm_activate(call, products.bias.data(), true, Activation::kSwiglu, inner.data(),
                        active.data(), nullptr);
    grouped_mm_activate_backward(call, Activation::kSwiglu, inner.data(), inner.data(),
                                 active.data(), dots.data(), nullptr);
    sum_dots({Dtype::kBFloat16, dots.data(), c.N, products.rows.data(), products.weights.data(),
              c.M, g.routes(), g.groups(), grad_weights.data()},
             nullptr);
    grouped_outer({Dtype::kBFloat16, false, active.data(), products.rows.data(), false, true,
                   g.routes(), g.groups(), c.N, c.M},
                  out.data(), nullptr);
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
  for (int64_t i = 0; i < products.rows.size(); ++i) {
    products.rows[i] = std::abs(products.rows[i]);
  }
  for (int64_t i = 0; i < products.weights.size(); ++i) {
    products.weights[i] = std::abs(products.weights[i]);
  }
  Array<float> out(products.g.R * c.N);
  grouped_mm(products.call(), nullptr, false, false, out.data(), nullptr);
  double worst = 0;
  products.each_row([&](int e, int64_t r) {
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
  for (const bool gathered_left : {false, true}) {
    Products<__nv_bfloat16> products(c, false);
    Grouping& g = products.g;
    Array<__nv_bfloat16> others(g.R * c.N), out(g.E * c.N * c.M);
    for (int64_t i = 0; i < others.size(); ++i) others[i] = make<__nv_bfloat16>(1);
    for (const int e : {0, 1}) {
      products.rows[g.sources[g.last_row(e) - 1] * c.M] = make<__nv_bfloat16>(INFINITY);
    }
    const void *left = others.data(), *right = products.rows.data();
    if (gathered_left) std::swap(left, right);
    grouped_outer({Dtype::kBFloat16, false, left, right, gathered_left, !gathered_left, g.routes(),
                   g.groups(), gathered_left ? c.M : c.N, gathered_left ? c.N : c.M},
                  out.data(), nullptr);
    bool right_ones = true;
    for (int64_t i = 0; i < out.size(); ++i) {
      const int64_t m = gathered_left ? i / c.N % c.M : i % c.M;
      right_ones &= m == 0 ? number(out[i]) == INFINITY : std::isfinite(number(out[i]));
    }
    CHECK(right_ones);
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

const Registration registration("products", {test_all,
                                             {{"grouped_mm", 128},
                                              {"grouped_mm_activate", 128},
                                              {"grouped_mm_activate_backward", 128},
                                              {"grouped_outer", 128},
                                              {"sum_dots", 256},
                                              {"sum_rows", 256}}});

}  // namespace
}  // namespace testing
