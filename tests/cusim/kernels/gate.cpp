// The gate and its gradient, beside plain C++.

#include "testing.h"

namespace testing {
namespace {

double score_of(Scoring scoring, double x) {
  if (scoring == Scoring::kSigmoid) return 1 / (1 + std::exp(-x));
  return std::sqrt(std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))));
}

// A NaN of other bits than NAN, where conversions leave it its bits.
template <typename T>
T other_nan() {
  if constexpr (!std::is_same_v<T, float>) return make<T>(NAN);
  return cusim::bits_as<T>(uint32_t{0x7fc00005});
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
  // every sum that is to be compared. In every fourth row no two are equal but by chance; in half
  // of these the best are in one lane, in the others some are no numbers, of different bits.
  const double special[] = {NAN, -NAN, INFINITY, -INFINITY, 0.0, -0.0};
  const auto values = [&](Array<T>& array, bool with_special) {
    for (int64_t i = 0; i < array.size(); ++i) {
      const int64_t row = i / c.E;
      const bool odd = with_special && row % 3 == 1;
      if (row % 4 == 3) {
        const bool of_the_best = row % 8 == 7 && i % c.E / (16 / int64_t{sizeof(T)}) % 32 == 1;
        array[i] = make<T>(4 * normal() + (of_the_best ? 32 : 0));
        const int64_t place = with_special && row % 8 == 3 ? (i - row) % c.E : 2;
        if (place == 0) array[i] = make<T>(row % 16 == 3 ? NAN : -NAN);
        if (place == 1 && row % 16 == 3) array[i] = other_nan<T>();
        continue;
      }
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
  const double scale = 1.5, tiny = std::numeric_limits<Sum>::min();
  gate({dtype_of<T>, logits.data(), choice_scores, c.T, c.E, c.K, c.scoring, c.normalize, scale,
        weights.data(), expert_ids.data(), probs.data(), importance.data(), block_sums.data()},
       nullptr);

  std::vector<double> sums(c.E);
  for (int64_t t = 0; t < c.T; ++t) {
    std::vector<int> order(c.E);
    std::vector<double> p(c.E);
    std::iota(order.begin(), order.end(), 0);
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
    const double divisor = c.normalize ? std::max(chosen, tiny) : 1;
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
  Array<Sum> grad_weights = filled<Sum>(c.T * c.K), grad_probs = filled<Sum>(c.T * c.E);
  Array<Sum> grad_importance = filled<Sum>(c.E), grad(c.T * c.E);
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
    std::vector<Share> all;
    for (int e = 0; e < c.E; ++e) {
      ExactSum g;
      g.add(number(grad_importance[e]));
      if (!c.own_scores) g.add(number(grad_probs[t * c.E + e]));
      all.push_back({number(probs[t * c.E + e]), g});
    }
    double sum = 0;
    std::vector<int> ids;
    std::vector<Share> chosen;
    for (int k = 0; k < c.K; ++k) {
      const int e = expert_ids[t * c.K + k];
      if (!is_expert(e)) continue;
      const double of_weight = number(grad_weights[t * c.K + k]);
      ids.push_back(e), chosen.push_back({all[e].share, {of_weight, std::abs(of_weight)}});
      sum += all[e].share;
    }
    const double divisor = c.normalize ? std::max(sum, tiny) : 1;
    for (Share& one : chosen) one.share /= divisor;
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      const ExactSum g = c.normalize && sum >= tiny ? centred(chosen, i) : chosen[i].grad;
      all[ids[i]].grad.value += scale / divisor * g.value;
      all[ids[i]].grad.terms += scale / divisor * g.terms;
    }
    for (int e = 0; e < c.E; ++e) {
      const double p = all[e].share;
      const double slope = is_softmax                       ? p
                           : c.scoring == Scoring::kSigmoid ? p * (1 - p)
                           : p < 1e-8                       ? p / 2
                                                            : -std::expm1(-p * p) / (2 * p);
      const ExactSum g = is_softmax ? centred(all, e) : all[e].grad;
      CHECK(close(grad[t * c.E + e], slope * g.value, p * g.terms, 40 + c.E));
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
                            {40, 128, 8, Scoring::kSoftmax, true, false},
                            {9, 512, 3, Scoring::kSqrtSoftplus, true, true},
                            {16, 1024, 12, Scoring::kSigmoid, false, true},
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

const Registration registration("gate", test_gates,
                                {{"gate", 256}, {"gate_importance", 1024}, {"gate_backward", 256}});

}  // namespace
}  // namespace testing
