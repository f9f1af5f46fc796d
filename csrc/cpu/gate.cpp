// Gate: score every expert, choose K of them, weigh the choices.
//
//   probs[t, :]      = softmax, sigmoid or sqrt(softplus) of logits[t, :]
//   expert_ids[t, :] = the K largest of choice_scores[t, :], NaN first, equal ones by lower id
//   weights[t, k]    = scale * probs[t, expert_ids[t, k]] / d[t]
//   d[t]             = sum over k of probs[t, expert_ids[t, k]] with normalize, else 1
//   importance[e]    = sum over t of probs[t, e]
//
// A task is a block of kBlock tokens, whatever the number of threads, and the blocks' sums are
// added in the order of the blocks: importance is bitwise the same on every run. Within a block
// kLanes tokens go side by side, one in each lane of a vector (gate_lanes.h).

#include <cmath>
#include <vector>

#include "gate_lanes.h"

namespace moe_ext {
namespace {

constexpr int64_t kBlock = 128;

template <typename T>
struct Scratch {
  Scratch(int64_t num_experts, int64_t top_k)
      : values(num_experts), sums(num_experts), keys(num_experts), chosen(top_k), weights(top_k) {}
  std::vector<Lanes<T>> values;         // [E] logits, then probabilities
  std::vector<Lanes<T>> sums;           // [E] of probabilities
  std::vector<Lanes<key_t<T>>> keys;    // [E]
  std::vector<Lanes<key_t<T>>> chosen;  // [K] ids
  std::vector<Lanes<T>> weights;        // [K]
};

// logits -> probabilities but for a factor, in place.
template <int bytes, typename T>
MOE_EXT_INLINE void softmax(Lanes<T>* values, int64_t num_experts, Lanes<T>& factors) {
  using V = Vector<T, bytes>;
  for (int64_t lane = 0; lane < kLanes; lane += bytes / sizeof(T)) {
    const auto larger = [&](V& largest, int64_t e) __attribute__((always_inline)) {
      V value{};
      load(value, values[e].at + lane);
      largest = value > largest ? value : largest;
    };
    // Two at a time, so that one comparison need not wait for the one before.
    V largest{}, other{}, sum{};
    load(largest, values[0].at + lane);
    other = largest;
    for (int64_t e = 1; e + 1 < num_experts; e += 2) {
      larger(largest, e);
      larger(other, e + 1);
    }
    larger(largest, num_experts - 1);
    largest = other > largest ? other : largest;
    for (int64_t e = 0; e < num_experts; ++e) {
      V value{};
      load(value, values[e].at + lane);
      value -= largest;
      exponential(value);
      sum += value;
      store(value, values[e].at + lane);
    }
    store(T{1} / sum, factors.at + lane);
  }
}

template <int bytes, typename T>
MOE_EXT_INLINE void sigmoid(Lanes<T>* values, int64_t num_experts) {
  for (int64_t e = 0; e < num_experts; ++e) {
    for (int64_t lane = 0; lane < kLanes; lane += bytes / sizeof(T)) {
      Vector<T, bytes> value{};
      load(value, values[e].at + lane);
      value = -value;
      exponential(value);
      store(T{1} / (value + T{1}), values[e].at + lane);
    }
  }
}

// Scores n <= kLanes tokens; `factors` are to be multiplied with their probabilities later.
template <int bytes, typename T>
MOE_EXT_INLINE void score(Scoring scoring, Lanes<T>* values, int64_t num_experts, int64_t n,
                          Lanes<T>& factors) {
  if (scoring == Scoring::kSoftmax) return softmax<bytes>(values, num_experts, factors);
  for (T& factor : factors.at) factor = 1;
  if (scoring == Scoring::kSigmoid) return sigmoid<bytes>(values, num_experts);
  for (int64_t e = 0; e < num_experts; ++e) {
    for (int64_t lane = 0; lane < n; ++lane) {
      values[e].at[lane] = elementwise_score(scoring, values[e].at[lane]);
    }
  }
}

// values *= factors; sums += values, in the first n lanes.
template <int bytes, typename T>
MOE_EXT_INLINE void scale_and_add(Lanes<T>* values, int64_t num_experts, const Lanes<T>& factors,
                                  int64_t n, Lanes<T>* sums) {
  Lanes<key_t<T>> counts;
  for (int64_t lane = 0; lane < kLanes; ++lane) counts.at[lane] = lane < n ? -1 : 0;
  for (int64_t lane = 0; lane < kLanes; lane += bytes / sizeof(T)) {
    Vector<key_t<T>, bytes> count{};
    Vector<T, bytes> factor{}, value{}, sum{};
    load(count, counts.at + lane);
    load(factor, factors.at + lane);
    for (int64_t e = 0; e < num_experts; ++e) {
      load(value, values[e].at + lane);
      load(sum, sums[e].at + lane);
      value *= factor;
      sum += count ? value : decltype(value){};
      store(value, values[e].at + lane);
      store(sum, sums[e].at + lane);
    }
  }
}

// n <= kLanes tokens, from their logits to all results but importance, which is added to scratch.
template <int bytes, typename scalar_t, typename T>
MOE_EXT_INLINE void gate_tokens(const GateArgs& a, int64_t first, int64_t n, Scratch<T>& scratch,
                                T* weights, int32_t* expert_ids, T* probs) {
  const int64_t E = a.num_experts, K = a.top_k;
  Lanes<T>* values = scratch.values.data();
  Lanes<key_t<T>>* chosen = scratch.chosen.data();
  const auto* logits = const_data<scalar_t>(a.logits) + first * E;
  const auto* choice_scores = const_data<scalar_t>(a.choice_scores) + first * E;

  read_rows(choice_scores, n, E, values);
  const int64_t coming = std::min(kLanes, a.num_tokens - first - n) * E;
  prefetch(choice_scores + n * E, coming);
  if (choice_scores != logits) prefetch(logits + n * E, coming);
  make_keys(values, E, scratch.keys.data());
  choose<bytes>(scratch.keys.data(), E, K, chosen);
  if (choice_scores != logits) read_rows(logits, n, E, values);

  Lanes<T> factors;
  score<bytes>(a.rule.scoring, values, E, n, factors);
  scale_and_add<bytes>(values, E, factors, n, scratch.sums.data());
  write_rows(values, n, E, probs + first * E);

  Lanes<T> sum{};
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sum.at[lane] += scratch.weights[k].at[lane] = values[chosen[k].at[lane]].at[lane];
    }
  }
  const T scale = static_cast<T>(a.rule.scale);
  for (T& divisor : sum.at) divisor = a.rule.normalize ? clamped(divisor) : T{1};
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      scratch.weights[k].at[lane] = scratch.weights[k].at[lane] / sum.at[lane] * scale;
    }
  }
  for (int64_t lane = 0; lane < n; ++lane) {
    for (int64_t k = 0; k < K; ++k) {
      weights[(first + lane) * K + k] = scratch.weights[k].at[lane];
      expert_ids[(first + lane) * K + k] = static_cast<int32_t>(chosen[k].at[lane]);
    }
  }
}

template <typename scalar_t>
std::tuple<Tensor, Tensor, Tensor, Tensor> gate_kernel(const GateArgs& a) {
  using T = accumulate_t<scalar_t>;
  const int64_t E = a.num_experts;
  const ScalarType dtype = accumulate_type(a.logits.scalar_type());
  Tensor weights = empty(a.logits, {a.num_tokens, a.top_k}, dtype);
  Tensor expert_ids = empty(a.logits, {a.num_tokens, a.top_k}, ScalarType::Int);
  Tensor probs = empty(a.logits, {a.num_tokens, E}, dtype);
  Tensor importance = empty(a.logits, {E}, dtype);
  const int64_t num_blocks = parts(a.num_tokens, kBlock);
  T *weights_out = data<T>(weights), *probs_out = data<T>(probs);
  int32_t* ids_out = data<int32_t>(expert_ids);
  std::vector<T> block_sums(num_blocks * E);

  parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(E, a.top_k);
    for (int64_t block = begin; block < end; ++block) {
      std::fill(scratch.sums.begin(), scratch.sums.end(), Lanes<T>{});
      const int64_t last = std::min(a.num_tokens, (block + 1) * kBlock);
      for (int64_t t = block * kBlock; t < last; t += kLanes) {
        on_widest([&](auto bytes) __attribute__((always_inline)) {
          gate_tokens<bytes, scalar_t>(a, t, std::min(kLanes, last - t), scratch, weights_out,
                                       ids_out, probs_out);
        });
      }
      for (int64_t e = 0; e < E; ++e) {
        T& sum = block_sums[block * E + e];
        for (const T lane : scratch.sums[e].at) sum += lane;
      }
    }
  });

  T* total = data<T>(importance);
  for (int64_t e = 0; e < E; ++e) {
    double sum = 0;
    for (int64_t block = 0; block < num_blocks; ++block) sum += block_sums[block * E + e];
    total[e] = static_cast<T>(sum);
  }
  return {weights, expert_ids, probs, importance};
}

// g[e] = p[e] * (g[e] - sum over i of p[i] * g[i]), for p of a softmax.
template <typename T>
void softmax_backward(const T* p, T* g, int64_t num_experts) {
  const T* most = std::find_if(p, p + num_experts, is_most<T>);
  const T shift = most == p + num_experts ? T{0} : g[most - p];
  // In four parts, so that no addition waits for the one before.
  T a = 0, b = 0, c = 0, d = 0;
  int64_t e = 0;
  for (; e + 4 <= num_experts; e += 4) {
    a += p[e] * (g[e] - shift);
    b += p[e + 1] * (g[e + 1] - shift);
    c += p[e + 2] * (g[e + 2] - shift);
    d += p[e + 3] * (g[e + 3] - shift);
  }
  for (; e < num_experts; ++e) a += p[e] * (g[e] - shift);
  const T mean = (a + b) + (c + d);
  for (e = 0; e < num_experts; ++e) g[e] = p[e] * (g[e] - shift - mean);
}

template <typename T>
Tensor gate_backward_kernel(const GateBackwardArgs& a) {
  const int64_t E = a.num_experts, K = a.top_k;
  const T* grad_weights = data_or_null<T>(a.grad_weights);
  const T* grad_probs = data_or_null<T>(a.grad_probs);
  const T* grad_importance = data_or_null<T>(a.grad_importance);
  const T* probs = const_data<T>(a.probs);
  const int32_t* expert_ids = const_data<int32_t>(a.expert_ids);
  Tensor grad = empty(a.probs, {a.num_tokens, E}, a.probs.scalar_type());
  T* grad_logits = data<T>(grad);
  const T scale = static_cast<T>(a.rule.scale);

  parallel_for(0, a.num_tokens, grain(E * 3 * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const T* p = probs + t * E;
      T* g = grad_logits + t * E;
      for (int64_t e = 0; e < E; ++e) {
        g[e] = (grad_probs ? grad_probs[t * E + e] : T{0}) +
               (grad_importance ? grad_importance[e] : T{0});
      }
      if (grad_weights) {
        const T* gw = grad_weights + t * K;
        const int32_t* chosen = expert_ids + t * K;
        Normalized<T> chosen_sum;
        if (a.rule.normalize) {
          for (int64_t k = 0; k < K; ++k) chosen_sum.add(p[chosen[k]], gw[k]);
          chosen_sum.divide();
        }
        const T factor = scale / chosen_sum.divisor;
        for (int64_t k = 0; k < K; ++k) g[chosen[k]] += factor * chosen_sum.centred(gw[k]);
      }
      if (a.rule.scoring == Scoring::kSoftmax) {
        softmax_backward(p, g, E);
      } else {
        for (int64_t e = 0; e < E; ++e) g[e] *= slope(a.rule.scoring, p[e]);
      }
    }
  });
  return grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_cpu(const GateArgs& a) {
  return visit_float(a.logits.scalar_type(),
                     [&](auto zero) { return gate_kernel<decltype(zero)>(a); });
}

Tensor gate_backward_cpu(const GateBackwardArgs& a) {
  check_ids(Check("gate_backward"), const_data<int32_t>(a.expert_ids), a.num_tokens * a.top_k,
            a.top_k, 0, a.num_experts);
  return visit_sums(a.probs.scalar_type(),
                    [&](auto zero) { return gate_backward_kernel<decltype(zero)>(a); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("gate", boxed<gate_args, gate_cpu>);
  m.impl("gate_backward", boxed<gate_backward_args, gate_backward_cpu>);
}

}  // namespace moe_ext
