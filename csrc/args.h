// One function per operator: checks its arguments once and returns them contiguous, with the sizes
// by name. Every backend's kernel is registered with it, as boxed<dispatch_args, dispatch_cpu>, so
// that no kernel checks a shape. Those of the experts' operators are in expert_args.h.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "call.h"
#include "scoring.h"

namespace moe_ext {

// kernel(args(taken...), others...), where `args` is a function of this file, and others are what
// the kernel takes beside it.
template <auto args, auto kernel, typename = decltype(args), typename = decltype(kernel)>
struct Operator;

template <auto args, auto kernel, typename Args, typename... Taken, typename Results,
          typename... Others>
struct Operator<args, kernel, Args (*)(Taken...), Results (*)(const Args&, Others...)> {
  static Results call(Taken... taken, Others... others) {
    return kernel(args(taken...), others...);
  }
};

// The kernel as torch registers it.
template <auto args, auto kernel>
constexpr auto* boxed = TORCH_BOX((&Operator<args, kernel>::call));

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(dense(*tensor)) : std::nullopt;
}

// MOE_EXT_POISON in the environment fills results on the CPU before an operator writes them, for
// tests: with NaN, or with the largest integer.
inline void poison(const Tensor& tensor) {
  static const bool is_on = std::getenv("MOE_EXT_POISON") != nullptr;
  if (!is_on) return;
  const bool is_int = tensor.scalar_type() == ScalarType::Int;
  const std::size_t bytes = tensor.numel() * tensor.element_size();
  std::memset(tensor.mutable_data_ptr(), is_int ? 0x7f : 0xff, bytes);
}

// On the CPU without the dispatcher, in which the results of operators on a few tokens took most of
// the time.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  const torch::stable::Device device = like.device();
  if (device.type() != torch::headeronly::DeviceType::CPU) {
    return torch::stable::new_empty(like, {size.begin(), size.size()}, dtype);
  }
  constexpr std::size_t kMostDims = 3;
  int64_t strides[kMostDims + 1] = {}, stride = 1;
  for (std::size_t i = size.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(1, size.begin()[i]);
  }
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.begin(),
                                                  strides, type, aoti_torch_device_type_cpu(), 0,
                                                  &handle));
  const Tensor tensor(handle);
  poison(tensor);
  return tensor;
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
const T* const_data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor ? const_data<T>(*tensor) : nullptr;
}

inline Scoring parse_scoring(const Check& check, const std::string& scoring) {
  if (scoring == "softmax") return Scoring::kSoftmax;
  if (scoring == "sigmoid") return Scoring::kSigmoid;
  if (scoring == "sqrtsoftplus") return Scoring::kSqrtSoftplus;
  check.fail("scoring must be softmax, sigmoid or sqrtsoftplus, got ", scoring);
}

// How the weights of the chosen experts follow from the logits.
struct GateRule {
  Scoring scoring;
  bool normalize;
  double scale;
};

inline GateRule gate_rule(const Check& check, const std::string& scoring, bool normalize,
                          double scale) {
  const Scoring kind = parse_scoring(check, scoring);
  check.finite("scale", scale);
  return {kind, normalize, scale};
}

struct GateArgs {
  Tensor logits;         // [T, E]
  Tensor choice_scores;  // [T, E], the logits where none were given
  int64_t num_tokens, num_experts, top_k;
  GateRule rule;
};

inline GateArgs gate_args(const Tensor& logits, const OptionalTensor& choice_scores, int64_t k,
                          const std::string& scoring, bool normalize, double scale) {
  GateRule rule;
  const Sizes s = check<contract("gate")>({logits, choice_scores}, [&](Call& call) {
    rule = gate_rule(call, scoring, normalize, scale);
    const int64_t E = call.sizes['E'];
    if (k < 1 || k > E) call.fail("k must be in 1..E with E = ", E, ", got ", k);
    call.sizes.set('K', k);
  });
  const Tensor dense_logits = dense(logits);
  const Tensor dense_scores = choice_scores ? dense(*choice_scores) : dense_logits;
  return {dense_logits, dense_scores, s['T'], s['E'], k, rule};
}

struct GateBackwardArgs {
  OptionalTensor grad_weights;     // [T, K]
  OptionalTensor grad_probs;       // [T, E]
  OptionalTensor grad_importance;  // [E]
  Tensor probs;                    // [T, E]
  Tensor expert_ids;               // [T, K]
  int64_t num_tokens, num_experts, top_k;
  GateRule rule;
};

inline GateBackwardArgs gate_backward_args(const OptionalTensor& grad_weights,
                                           const OptionalTensor& grad_probs,
                                           const OptionalTensor& grad_importance,
                                           const Tensor& probs, const Tensor& expert_ids,
                                           const std::string& scoring, bool normalize,
                                           double scale) {
  GateRule rule;
  const Sizes s = check<contract("gate_backward")>(
      {grad_weights, grad_probs, grad_importance, probs, expert_ids},
      [&](Call& call) { rule = gate_rule(call, scoring, normalize, scale); });
  return {dense(grad_weights),
          dense(grad_probs),
          dense(grad_importance),
          dense(probs),
          dense(expert_ids),
          s['T'],
          s['E'],
          s['K'],
          rule};
}

struct PlanArgs {
  Tensor expert_ids;        // [T, K], -1 where the token has no such choice
  OptionalTensor priority;  // [T, K]
  int64_t num_tokens, top_k, num_experts, num_routes, num_rows;
  std::optional<int64_t> capacity;
  bool choice_major;
  int64_t align;
};

// Rows of a plan without capacity: every expert may waste align - 1 rows, but only an expert that
// has a route wastes any.
inline int64_t dropless_rows(int64_t num_routes, int64_t num_experts, int64_t align) {
  const int64_t used = num_experts < num_routes ? num_experts : num_routes;
  return align * ((num_routes + used * (align - 1)) / align);
}

inline PlanArgs plan_args(const Tensor& expert_ids, const OptionalTensor& priority,
                          int64_t num_experts, const std::optional<int64_t>& capacity,
                          const std::string& order, int64_t align) {
  const auto rule = [&](Call& call) {
    if (order != "choice" && order != "token") {
      call.fail("order must be choice or token, got ", order);
    }
    if (num_experts < 1) call.fail("num_experts must be at least 1, got ", num_experts);
    call.int32_size("num_experts", num_experts);
    if (align < 1) call.fail("align must be at least 1, got ", align);
    call.int32_size("align", align);
    if (capacity) {
      if (*capacity < 0) call.fail("capacity must not be negative, got ", *capacity);
      call.int32_size("capacity", *capacity);
      if (align != 1) call.fail("align must be 1 where there is a capacity, got ", align);
    }
    const int64_t num_routes = call.sizes['T'] * call.sizes['K'];
    call.sizes.set(
        'R', capacity ? num_experts * *capacity : dropless_rows(num_routes, num_experts, align));
  };
  const Sizes s = check<contract("plan")>({expert_ids, priority}, rule);
  return {
      dense(expert_ids), dense(priority),   s['T'], s['K'], num_experts, s['T'] * s['K'], s['R'],
      capacity,          order == "choice", align};
}

struct BalanceArgs {
  Tensor importance;  // [E]
  Tensor load;        // [E]
  Tensor expert_ids;  // [T, K]
  int64_t num_tokens, top_k, num_experts, choices;
};

inline BalanceArgs balance_args(const Tensor& importance, const Tensor& load,
                                const Tensor& expert_ids, int64_t choices) {
  const auto rule = [&](Call& call) {
    const int64_t K = call.sizes['K'];
    if (choices < 1 || choices > K) {
      call.fail("choices must be in 1..K with K = ", K, ", got ", choices);
    }
  };
  const Sizes s = check<contract("balance")>({importance, load, expert_ids}, rule);
  return {dense(importance), dense(load), dense(expert_ids), s['T'], s['K'], s['E'], choices};
}

struct MaskWeightsArgs {
  OptionalTensor grad;  // [T, K], in the backward
  Tensor weights;       // [T, K]
  Tensor slots;         // [T, K]
  int64_t num_tokens, top_k;
  bool normalize;
  double eps, scale;
};

inline MaskWeightsArgs mask_weights_args(const Tensor& weights, const Tensor& slots, bool normalize,
                                         double eps, double scale) {
  const auto rule = [&](Call& call) { call.finite("eps", eps), call.finite("scale", scale); };
  const Sizes s = check<contract("mask_weights")>({weights, slots}, rule);
  return {std::nullopt, dense(weights), dense(slots), s['T'], s['K'], normalize, eps, scale};
}

inline MaskWeightsArgs mask_weights_backward_args(const Tensor& grad, const Tensor& weights,
                                                  const Tensor& slots, bool normalize, double eps,
                                                  double scale) {
  const auto rule = [&](Call& call) { call.finite("eps", eps), call.finite("scale", scale); };
  const Sizes s = check<contract("mask_weights_backward")>({grad, weights, slots}, rule);
  return {dense(grad), dense(weights), dense(slots), s['T'], s['K'], normalize, eps, scale};
}

// The routes of the row operators.
struct RouteArgs {
  Tensor slots;            // [T, K]
  Tensor sources;          // [R]
  OptionalTensor weights;  // [T, K]
  int64_t num_tokens, top_k, num_rows;
};

inline RouteArgs route_args(const Tensor& slots, const Tensor& sources,
                            const OptionalTensor& weights, const Sizes& s) {
  return {dense(slots), dense(sources), dense(weights), s['T'], s['K'], s['R']};
}

// A result [T, K], in the dtype of sums of rows.
inline Tensor empty_route_sums(const Tensor& rows, const RouteArgs& a) {
  return empty(rows, {a.num_tokens, a.top_k}, accumulate_type(rows.scalar_type()));
}

// For dispatch and combine.
struct MoveArgs {
  Tensor from;  // tokens [T, H], or rows [R, H]
  RouteArgs routes;
  int64_t hidden;
};

template <int kContract>
MoveArgs move_args(const Tensor& from, const Tensor& slots, const Tensor& sources,
                   const OptionalTensor& weights) {
  const Sizes s = check<kContract>({from, slots, sources, weights});
  return {dense(from), route_args(slots, sources, weights, s), s['H']};
}

constexpr auto* dispatch_args = move_args<contract("dispatch")>;
constexpr auto* combine_args = move_args<contract("combine")>;

// For route_dot, which has no weights, and combine_backward.
struct RouteDotArgs {
  Tensor tokens;  // [T, H]
  Tensor rows;    // [R, H]
  RouteArgs routes;
  int64_t hidden;
};

inline RouteDotArgs route_dot_args(const Tensor& tokens, const Tensor& rows, const Tensor& slots,
                                   const Tensor& sources) {
  const Sizes s = check<contract("route_dot")>({tokens, rows, slots, sources});
  return {dense(tokens), dense(rows), route_args(slots, sources, std::nullopt, s), s['H']};
}

inline RouteDotArgs combine_backward_args(const Tensor& tokens, const Tensor& rows,
                                          const Tensor& slots, const Tensor& sources,
                                          const Tensor& weights) {
  const Sizes s = check<contract("combine_backward")>({tokens, rows, slots, sources, weights});
  return {dense(tokens), dense(rows), route_args(slots, sources, weights, s), s['H']};
}

}  // namespace moe_ext
