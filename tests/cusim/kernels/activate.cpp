// The activations and their gradient, beside plain C++.

#include "plans.h"

namespace testing {
namespace {

template <typename T>
void test_activation(const RowsCase& c, Activation activation, bool weighted) {
  using Sum = accumulate_t<T>;
  const PlanCase& p = c.plan;
  const int64_t N = p.T * p.K, R = rows_of(p), F = c.H, G = is_gated(activation) ? 2 * F : F;
  const InnerColumns at{activation, F};
  MadePlan made = plan_of(c);
  Array<T> pre_activation = filled<T>(R * G), grad_pre_activation(R * G);
  Array<T> grad = filled<T>(R * F), out(R * F), active(R * F);
  Array<Sum> weights = filled<Sum>(N), grad_weights(N);
  // Beyond the limits of swiglu_oai too.
  for (int64_t i = 0; is_interleaved(activation) && i < pre_activation.size(); ++i) {
    pre_activation[i] = make<T>(4 * number(pre_activation[i]));
  }
  std::vector<int64_t> route(R, -1);
  for (int64_t i = 0; i < N; ++i) {
    if (made.row_of(i) >= 0) route[made.row_of(i)] = i;
  }
  for (int64_t r = 0; r < R; ++r) {
    // A row without a route is not read.
    for (int64_t i = 0; route[r] < 0 && i < G; ++i) pre_activation[r * G + i] = make<T>(NAN);
    for (int64_t i = 0; route[r] < 0 && i < F; ++i) grad[r * F + i] = make<T>(NAN);
  }
  const Routes routes = made.routes(p, weighted ? weights.data() : nullptr);
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
      double value = 0, slope = 0, upstream = 0;
      ValueAndSlope<double> of_up{1, 0};
      if (route[r] >= 0) {
        const auto of_gate =
            activated<double>(activation, number(pre_activation[r * G + at.gate(f)]));
        value = of_gate.value, slope = of_gate.slope;
        if (G != F) of_up = factor<double>(activation, number(pre_activation[r * G + at.up(f)]));
        upstream = number(grad[r * F + f]);
      }
      const double up = of_up.value, terms = std::abs(up) + std::abs(value * up);
      CHECK(close(out[r * F + f], weight * value * up, std::abs(weight) * terms, 8));
      if (!weighted) continue;
      const double size = std::abs(weight * upstream) * (1 + terms);
      CHECK(
          close(grad_pre_activation[r * G + at.gate(f)], weight * upstream * slope * up, size, 8));
      if (G != F) {
        CHECK(close(grad_pre_activation[r * G + at.up(f)], weight * upstream * value * of_up.slope,
                    size + 1e-30, 8));
      }
      dot += upstream * value * up, dot_terms += std::abs(upstream) * terms;
    }
    if (weighted && route[r] >= 0) CHECK(close(grad_weights[route[r]], dot, dot_terms, F + 8.0));
  }
  for (int64_t i = 0; weighted && i < N; ++i) {
    if (made.row_of(i) < 0) CHECK(grad_weights[i] == 0);
  }
}

void test_activations() {
  const RowsCase cases[] = {{{0, 2, 3, 4}, 8},
                            {{1, 1, 1}, 1},
                            {{33, 2, 5, 9}, 7},
                            {{17, 3, 4, -1, 8}, 64},
                            {{5, 2, 3, 10, 1, true, true}, 601},
                            {{4, 2, 2, 3}, 2312},
                            {{11, 3, 3, 4}, 0},
                            {{40, 5, 5, 50}, 16, false}};
  for (const RowsCase& c : cases) {
    for (const Activation activation :
         {Activation::kSwiglu, Activation::kGeglu, Activation::kSwigluOai, Activation::kGelu,
          Activation::kRelu, Activation::kRelu2}) {
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

const Registration registration("activate", test_activations,
                                {{"activate", 256}, {"activate_backward", 256}});

}  // namespace
}  // namespace testing
