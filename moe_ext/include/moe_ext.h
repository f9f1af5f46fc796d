// The operators of moe_ext for C++ programs, as functions of ATen tensors. Inference only: the
// gradients are Python's, and a call that wants one without them throws.
//
// Letters are shapes: T tokens, K choices, E experts, R rows, H hidden, N and M the two widths of
// an expert's weight, F an expert's inner size. Arguments, results and errors (c10::Error) are
// those of the functions of the Python package that have the same names.
//
// find_package(moe_ext) gives the target moe_ext::moe_ext to link.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>

// Operators are found by name: these calls keep the linker from leaving the libraries out.
extern "C" void moe_ext_library();
#ifdef MOE_EXT_CUDA
extern "C" void moe_ext_cuda_library();
#endif

namespace moe_ext {

using OptionalTensor = std::optional<at::Tensor>;

struct Choice {
  at::Tensor weights;     // [T, K] float32, float64 for float64 logits
  at::Tensor expert_ids;  // [T, K] int32
  at::Tensor probs;       // [T, E] like weights
  at::Tensor importance;  // [E] like weights, column sums of probs
};

struct Plan {
  at::Tensor slots;                 // [T, K] int32, the row of a choice, -1 where it was dropped
  at::Tensor sources;               // [R] int32, t * K + k of a row, -1 where it is empty
  at::Tensor offsets;               // [E+1] int32, the first row of every expert
  at::Tensor load;                  // [E] int32, choices of every expert, before dropping
  std::optional<int64_t> capacity;  // rows of every expert; nullopt where nothing is dropped
};

namespace detail {

inline c10::OperatorHandle find(const char* name) {
  moe_ext_library();
#ifdef MOE_EXT_CUDA
  moe_ext_cuda_library();
#endif
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

template <typename T>
bool requires_grad(const T&) {
  return false;
}
inline bool requires_grad(const at::Tensor& tensor) { return tensor.requires_grad(); }
inline bool requires_grad(const OptionalTensor& tensor) {
  return tensor && tensor->requires_grad();
}

template <typename Result, typename... Args>
Result call(const c10::OperatorHandle& op, const Args&... args) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !(at::GradMode::is_enabled() && (requires_grad(args) || ...)) ||
          op.hasKernelForDispatchKey(c10::DispatchKey::Autograd),
      op.operator_name().name,
      " has no gradient in a program without Python; call it under c10::InferenceMode or "
      "at::NoGradGuard");
  return op.typed<Result(Args...)>().call(args...);
}

inline std::optional<c10::SymInt> rows_of(std::optional<int64_t> capacity) {
  return capacity ? std::make_optional<c10::SymInt>(*capacity) : std::nullopt;
}

using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

}  // namespace detail

// logits, choice_scores [T, E]; scoring: softmax, sigmoid or sqrtsoftplus
inline Choice gate(const at::Tensor& logits, int64_t k, std::string_view scoring = "softmax",
                   bool normalize = false, double scale = 1.0,
                   const OptionalTensor& choice_scores = std::nullopt) {
  static const c10::OperatorHandle op = detail::find("moe_ext::gate");
  auto [weights, expert_ids, probs, importance] = detail::call<detail::Four>(
      op, logits, choice_scores, c10::SymInt(k), scoring, normalize, scale);
  return {weights, expert_ids, probs, importance};
}

// experts [T, K] int32, priority [T, K] float32; order: choice or token
inline Plan make_plan(const at::Tensor& expert_ids, int64_t num_experts,
                      std::optional<int64_t> capacity = std::nullopt,
                      const OptionalTensor& priority = std::nullopt,
                      std::string_view order = "choice", int64_t align = 1) {
  static const c10::OperatorHandle op = detail::find("moe_ext::plan");
  auto [slots, sources, offsets, load] =
      detail::call<detail::Four>(op, expert_ids, priority, c10::SymInt(num_experts),
                                 detail::rows_of(capacity), order, c10::SymInt(align));
  return {slots, sources, offsets, load, capacity};
}

// weights [T, K] -> [T, K]; eps: the smallest normal number where not given
inline at::Tensor mask_weights(const at::Tensor& weights, const Plan& plan, bool normalize = false,
                               std::optional<double> eps = std::nullopt, double scale = 1.0) {
  static const c10::OperatorHandle op = detail::find("moe_ext::mask_weights");
  const double smallest = weights.scalar_type() == at::kDouble ? std::numeric_limits<double>::min()
                                                               : std::numeric_limits<float>::min();
  return detail::call<at::Tensor>(op, weights, plan.slots, normalize, eps.value_or(smallest),
                                  scale);
}

// tokens [T, H], weights [T, K] -> rows [R, H]
inline at::Tensor dispatch(const at::Tensor& tokens, const Plan& plan,
                           const OptionalTensor& weights = std::nullopt) {
  static const c10::OperatorHandle op = detail::find("moe_ext::dispatch");
  return detail::call<at::Tensor>(op, tokens, plan.slots, plan.sources, weights);
}

// rows [R, H], weights [T, K] -> tokens [T, H]
inline at::Tensor combine(const at::Tensor& rows, const Plan& plan,
                          const OptionalTensor& weights = std::nullopt) {
  static const c10::OperatorHandle op = detail::find("moe_ext::combine");
  return detail::call<at::Tensor>(op, rows, plan.slots, plan.sources, weights);
}

// tokens [T, H], rows [R, H] -> [T, K]
inline at::Tensor route_dot(const at::Tensor& tokens, const at::Tensor& rows, const Plan& plan) {
  static const c10::OperatorHandle op = detail::find("moe_ext::route_dot");
  return detail::call<at::Tensor>(op, tokens, rows, plan.slots, plan.sources);
}

// tokens [T, H], weights [T, K], up [E, G, H], down [E, H, F], up_bias [E, G], down_bias [E, H] ->
// [T, H]; activation: swiglu, geglu or swiglu_oai with G = 2F, gelu, relu or relu2 with G = F. On
// the CPU alone, as grouped_mm.
inline at::Tensor feed_forward(const at::Tensor& tokens, const Plan& plan,
                               const at::Tensor& weights, const at::Tensor& up,
                               const at::Tensor& down, std::string_view activation,
                               const OptionalTensor& up_bias = std::nullopt,
                               const OptionalTensor& down_bias = std::nullopt,
                               bool score_before_experts = false) {
  static const c10::OperatorHandle op = detail::find("moe_ext::feed_forward");
  auto [out, pre_activation] = detail::call<std::tuple<at::Tensor, at::Tensor>>(
      op, tokens, plan.slots, plan.sources, plan.offsets, plan.load, weights, up, down, up_bias,
      down_bias, activation, score_before_experts, detail::rows_of(plan.capacity), false);
  return out;
}

// rows [R, M], weights [E, N, M], bias [E, N] -> [R, N]. On the CPU alone: on CUDA the Python
// package uses torch's products.
inline at::Tensor grouped_mm(const at::Tensor& rows, const at::Tensor& weights, const Plan& plan,
                             const OptionalTensor& bias = std::nullopt) {
  static const c10::OperatorHandle op = detail::find("moe_ext::grouped_mm");
  return detail::call<at::Tensor>(op, rows, weights, bias, plan.offsets, plan.load,
                                  detail::rows_of(plan.capacity));
}

// pre_activation [R, G] as of feed_forward; weights [T, K] -> [R, F]
inline at::Tensor activate(const at::Tensor& pre_activation, const Plan& plan,
                           std::string_view activation,
                           const OptionalTensor& weights = std::nullopt) {
  static const c10::OperatorHandle op = detail::find("moe_ext::activate");
  return detail::call<at::Tensor>(op, pre_activation, plan.slots, plan.sources, weights,
                                  activation);
}

}  // namespace moe_ext
