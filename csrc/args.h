// One function per operator: checks its arguments once and returns them contiguous, with the sizes
// by name. Every backend starts with it, so that no kernel checks a shape.

#pragma once

#include <torch/csrc/stable/ops.h>

#include "activation.h"
#include "check.h"
#include "scoring.h"

namespace moe_ext {

using OptionalTensor = std::optional<Tensor>;

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor dense(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(dense(*tensor)) : std::nullopt;
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(like, {size.begin(), size.size()}, dtype);
}

template <typename T>
const T* data_or_null(const OptionalTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

inline Scoring parse_scoring(const Check& check, const std::string& scoring) {
  if (scoring == "softmax") return Scoring::kSoftmax;
  if (scoring == "sigmoid") return Scoring::kSigmoid;
  if (scoring == "sqrtsoftplus") return Scoring::kSqrtSoftplus;
  check.fail("scoring must be softmax, sigmoid or sqrtsoftplus, got ", scoring);
}

struct GateArgs {
  Tensor logits;         // [T, E]
  Tensor choice_scores;  // [T, E], the logits where none were given
  int64_t num_tokens, num_experts, top_k;
  Scoring scoring;
  bool normalize;
  double scale;
};

inline GateArgs gate_args(const Tensor& logits, const OptionalTensor& choice_scores, int64_t k,
                          const std::string& scoring, bool normalize, double scale) {
  const Check check("gate");
  check.shape("logits", logits, {{"T", kAny}, {"E", kAny}});
  check.floating("logits", logits);
  const int64_t T = logits.size(0), E = logits.size(1);
  if (k < 1 || k > E) check.fail("k must be in 1..E with E = ", E, ", got ", k);
  check.int32_size("T * K", T * k);
  if (choice_scores) {
    check.shape("choice_scores", *choice_scores, {{"T", T}, {"E", E}});
    check.same_dtype("choice_scores", *choice_scores, "logits", logits);
    check.same_device("choice_scores", *choice_scores, "logits", logits);
  }
  check.finite("scale", scale);
  const Tensor dense_logits = dense(logits);
  return {dense_logits,
          choice_scores ? dense(*choice_scores) : dense_logits,
          T,
          E,
          k,
          parse_scoring(check, scoring),
          normalize,
          scale};
}

struct GateBackwardArgs {
  OptionalTensor grad_weights;     // [T, K]
  OptionalTensor grad_probs;       // [T, E]
  OptionalTensor grad_importance;  // [E]
  Tensor probs;                    // [T, E]
  Tensor expert_ids;               // [T, K]
  int64_t num_tokens, num_experts, top_k;
  Scoring scoring;
  bool normalize;
  double scale;
};

inline GateBackwardArgs gate_backward_args(const OptionalTensor& grad_weights,
                                           const OptionalTensor& grad_probs,
                                           const OptionalTensor& grad_importance,
                                           const Tensor& probs, const Tensor& expert_ids,
                                           const std::string& scoring, bool normalize,
                                           double scale) {
  const Check check("gate_backward");
  check.shape("probs", probs, {{"T", kAny}, {"E", kAny}});
  check.floating("probs", probs);
  check.dtype("probs", probs, accumulate_type(probs.scalar_type()));
  const int64_t T = probs.size(0), E = probs.size(1);
  check.shape("expert_ids", expert_ids, {{"T", T}, {"K", kAny}});
  check.dtype("expert_ids", expert_ids, ScalarType::Int);
  check.same_device("expert_ids", expert_ids, "probs", probs);
  const int64_t K = expert_ids.size(1);
  const auto check_grad = [&](const char* name, const OptionalTensor& grad,
                              std::initializer_list<Dim> dims) {
    if (!grad) return;
    check.shape(name, *grad, dims);
    check.same_dtype(name, *grad, "probs", probs);
    check.same_device(name, *grad, "probs", probs);
  };
  check_grad("grad_weights", grad_weights, {{"T", T}, {"K", K}});
  check_grad("grad_probs", grad_probs, {{"T", T}, {"E", E}});
  check_grad("grad_importance", grad_importance, {{"E", E}});
  check.finite("scale", scale);
  return {dense(grad_weights),
          dense(grad_probs),
          dense(grad_importance),
          dense(probs),
          dense(expert_ids),
          T,
          E,
          K,
          parse_scoring(check, scoring),
          normalize,
          scale};
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
  const Check check("plan");
  check.shape("expert_ids", expert_ids, {{"T", kAny}, {"K", kAny}});
  check.dtype("expert_ids", expert_ids, ScalarType::Int);
  const int64_t T = expert_ids.size(0), K = expert_ids.size(1);
  check.int32_size("T * K", T * K);
  if (priority) {
    check.shape("priority", *priority, {{"T", T}, {"K", K}});
    check.dtype("priority", *priority, ScalarType::Float);
    check.same_device("priority", *priority, "expert_ids", expert_ids);
  }
  if (num_experts < 1) check.fail("num_experts must be at least 1, got ", num_experts);
  check.int32_size("num_experts", num_experts);
  if (order != "choice" && order != "token") {
    check.fail("order must be choice or token, got ", order);
  }
  if (align < 1) check.fail("align must be at least 1, got ", align);
  check.int32_size("align", align);
  if (capacity) {
    if (*capacity < 0) check.fail("capacity must not be negative, got ", *capacity);
    check.int32_size("capacity", *capacity);
    if (align != 1) check.fail("align must be 1 where there is a capacity, got ", align);
  }
  const int64_t R = capacity ? num_experts * *capacity : dropless_rows(T * K, num_experts, align);
  check.int32_size("rows", R);
  return {dense(expert_ids), dense(priority),   T,    K, num_experts, T * K, R,
          capacity,          order == "choice", align};
}

struct MaskWeightsArgs {
  Tensor weights;  // [T, K]
  Tensor slots;    // [T, K]
  int64_t num_tokens, top_k;
  bool normalize;
  double eps, scale;
};

inline MaskWeightsArgs mask_weights_args(const Tensor& weights, const Tensor& slots, bool normalize,
                                         double eps, double scale,
                                         const char* op = "mask_weights") {
  const Check check(op);
  check.shape("weights", weights, {{"T", kAny}, {"K", kAny}});
  check.floating("weights", weights);
  check.dtype("weights", weights, accumulate_type(weights.scalar_type()));
  check.shape("slots", slots, {{"T", kAny}, {"K", kAny}});
  check.dtype("slots", slots, ScalarType::Int);
  check.same_device("slots", slots, "weights", weights);
  const int64_t T = slots.size(0), K = slots.size(1);
  check.int32_size("T * K", T * K);
  check.shape("weights", weights, {{"T", T}, {"K", K}}, OfPlan{"slots", slots});
  check.finite("eps", eps);
  check.finite("scale", scale);
  return {dense(weights), dense(slots), T, K, normalize, eps, scale};
}

struct MaskWeightsBackwardArgs {
  Tensor grad;  // [T, K]
  MaskWeightsArgs forward;
};

inline MaskWeightsBackwardArgs mask_weights_backward_args(const Tensor& grad, const Tensor& weights,
                                                          const Tensor& slots, bool normalize,
                                                          double eps, double scale) {
  const Check check("mask_weights_backward");
  const MaskWeightsArgs forward =
      mask_weights_args(weights, slots, normalize, eps, scale, "mask_weights_backward");
  check.shape("grad", grad, {{"T", forward.num_tokens}, {"K", forward.top_k}});
  check.same_dtype("grad", grad, "weights", weights);
  check.same_device("grad", grad, "weights", weights);
  return {dense(grad), forward};
}

// A matrix that a plan moves: [T, width] or [R, width].
struct Moved {
  const char* name;
  const Tensor& tensor;
  const char *height, *width;  // the letters
};

// What the row operators share: slots [T, K] and sources [R] of a plan, the matrices that it moves,
// whose first gives dtype and device, and weights [T, K] where there are any. The plan is made
// first, so an argument that does not fit it is at fault.
inline void check_routes(const Check& check, std::initializer_list<Moved> matrices,
                         const Tensor& slots, const Tensor& sources,
                         const OptionalTensor& weights) {
  const auto& [name, like, height, width] = *matrices.begin();
  check.shape("slots", slots, {{"T", kAny}, {"K", kAny}});
  check.dtype("slots", slots, ScalarType::Int);
  check.same_device("slots", slots, name, like);
  check.int32_size("T * K", slots.numel());
  check.shape("sources", sources, {{"R", kAny}});
  check.dtype("sources", sources, ScalarType::Int);
  check.same_device("sources", sources, name, like);
  check.int32_size("rows", sources.size(0));
  const OfPlan of_tokens{"slots", slots}, of_rows{"sources", sources};
  for (const Moved& m : matrices) {
    const OfPlan& of = *m.height == 'T' ? of_tokens : of_rows;
    check.shape(m.name, m.tensor, {{m.height, of.tensor.size(0)}, {m.width, kAny}}, of);
  }
  if (weights) {
    check.shape("weights", *weights, {{"T", slots.size(0)}, {"K", slots.size(1)}}, of_tokens);
    check.dtype("weights", *weights, accumulate_type(like.scalar_type()));
    check.same_device("weights", *weights, name, like);
  }
}

struct DispatchArgs {
  Tensor tokens;           // [T, H]
  Tensor slots;            // [T, K]
  Tensor sources;          // [R]
  OptionalTensor weights;  // [T, K]
  int64_t num_tokens, top_k, num_rows, hidden;
};

inline DispatchArgs dispatch_args(const Tensor& tokens, const Tensor& slots, const Tensor& sources,
                                  const OptionalTensor& weights) {
  const Check check("dispatch");
  check.shape("tokens", tokens, {{"T", kAny}, {"H", kAny}});
  check.floating("tokens", tokens);
  check_routes(check, {{"tokens", tokens, "T", "H"}}, slots, sources, weights);
  return {dense(tokens),  dense(slots),  dense(sources),  dense(weights),
          tokens.size(0), slots.size(1), sources.size(0), tokens.size(1)};
}

struct CombineArgs {
  Tensor rows;             // [R, H]
  Tensor slots;            // [T, K]
  Tensor sources;          // [R]
  OptionalTensor weights;  // [T, K]
  int64_t num_tokens, top_k, num_rows, hidden;
};

inline CombineArgs combine_args(const Tensor& rows, const Tensor& slots, const Tensor& sources,
                                const OptionalTensor& weights) {
  const Check check("combine");
  check.shape("rows", rows, {{"R", kAny}, {"H", kAny}});
  check.floating("rows", rows);
  check_routes(check, {{"rows", rows, "R", "H"}}, slots, sources, weights);
  return {dense(rows),   dense(slots),  dense(sources), dense(weights),
          slots.size(0), slots.size(1), rows.size(0),   rows.size(1)};
}

struct RouteDotArgs {
  Tensor tokens;   // [T, H]
  Tensor rows;     // [R, H]
  Tensor slots;    // [T, K]
  Tensor sources;  // [R]
  int64_t num_tokens, top_k, num_rows, hidden;
};

inline RouteDotArgs route_dot_args(const Tensor& tokens, const Tensor& rows, const Tensor& slots,
                                   const Tensor& sources) {
  const Check check("route_dot");
  check.shape("tokens", tokens, {{"T", kAny}, {"H", kAny}});
  check.floating("tokens", tokens);
  check.shape("rows", rows, {{"R", kAny}, {"H", tokens.size(1)}});
  check.same_dtype("rows", rows, "tokens", tokens);
  check.same_device("rows", rows, "tokens", tokens);
  check_routes(check, {{"tokens", tokens, "T", "H"}, {"rows", rows, "R", "H"}}, slots, sources,
               std::nullopt);
  return {dense(tokens),  dense(rows),   dense(slots), dense(sources),
          tokens.size(0), slots.size(1), rows.size(0), tokens.size(1)};
}

struct CombineBackwardArgs {
  Tensor tokens;   // [T, H]
  Tensor rows;     // [R, H]
  Tensor slots;    // [T, K]
  Tensor sources;  // [R]
  Tensor weights;  // [T, K]
  int64_t num_tokens, top_k, num_rows, hidden;
};

inline CombineBackwardArgs combine_backward_args(const Tensor& tokens, const Tensor& rows,
                                                 const Tensor& slots, const Tensor& sources,
                                                 const Tensor& weights) {
  const Check check("combine_backward");
  check.shape("tokens", tokens, {{"T", kAny}, {"H", kAny}});
  check.floating("tokens", tokens);
  check.shape("rows", rows, {{"R", kAny}, {"H", tokens.size(1)}});
  check.same_dtype("rows", rows, "tokens", tokens);
  check.same_device("rows", rows, "tokens", tokens);
  check_routes(check, {{"tokens", tokens, "T", "H"}, {"rows", rows, "R", "H"}}, slots, sources,
               weights);
  return {dense(tokens),  dense(rows),   dense(slots), dense(sources), dense(weights),
          tokens.size(0), slots.size(1), rows.size(0), tokens.size(1)};
}

inline Activation parse_activation(const Check& check, const std::string& activation) {
  if (activation == "swiglu") return Activation::kSwiglu;
  if (activation == "geglu") return Activation::kGeglu;
  if (activation == "gelu") return Activation::kGelu;
  if (activation == "relu") return Activation::kRelu;
  check.fail("activation must be swiglu, geglu, gelu or relu, got ", activation);
}

struct ActivateArgs {
  Tensor pre_activation;   // [R, G], G = 2F with the gate's columns first, F without a gate
  Tensor slots;            // [T, K]
  Tensor sources;          // [R]
  OptionalTensor weights;  // [T, K]
  Activation activation;
  int64_t num_tokens, top_k, num_rows, inner_width, width;
};

inline ActivateArgs activate_args(const Tensor& pre_activation, const Tensor& slots,
                                  const Tensor& sources, const OptionalTensor& weights,
                                  const std::string& activation, const char* op = "activate") {
  const Check check(op);
  check.shape("pre_activation", pre_activation, {{"R", kAny}, {"G", kAny}});
  check.floating("pre_activation", pre_activation);
  check_routes(check, {{"pre_activation", pre_activation, "R", "G"}}, slots, sources, weights);
  const Activation kind = parse_activation(check, activation);
  const int64_t G = pre_activation.size(1);
  if (is_gated(kind) && G % 2 != 0) check.fail("pre_activation must be [R, 2F], got [R, ", G, "]");
  return {dense(pre_activation),
          dense(slots),
          dense(sources),
          dense(weights),
          kind,
          slots.size(0),
          slots.size(1),
          pre_activation.size(0),
          G,
          is_gated(kind) ? G / 2 : G};
}

struct ActivateBackwardArgs {
  Tensor grad;  // [R, F]
  ActivateArgs forward;
};

inline ActivateBackwardArgs activate_backward_args(const Tensor& grad, const Tensor& pre_activation,
                                                   const Tensor& slots, const Tensor& sources,
                                                   const Tensor& weights,
                                                   const std::string& activation) {
  const Check check("activate_backward");
  const ActivateArgs forward =
      activate_args(pre_activation, slots, sources, weights, activation, "activate_backward");
  check.shape("grad", grad, {{"R", forward.num_rows}, {"F", forward.width}});
  check.same_dtype("grad", grad, "pre_activation", pre_activation);
  check.same_device("grad", grad, "pre_activation", pre_activation);
  return {dense(grad), forward};
}

// The rows of each expert that a route owns: offsets[e] and the min(load[e], room) after it.
struct Groups {
  Tensor offsets;  // [E+1]
  Tensor load;     // [E]
  int64_t num_experts;
};

inline Groups check_groups(const Check& check, const char* name, const Tensor& like,
                           const Tensor& offsets, const Tensor& load) {
  check.shape("load", load, {{"E", kAny}});
  check.dtype("load", load, ScalarType::Int);
  check.same_device("load", load, name, like);
  const int64_t E = load.size(0);
  check.shape("offsets", offsets, {{"E+1", E + 1}});
  check.dtype("offsets", offsets, ScalarType::Int);
  check.same_device("offsets", offsets, name, like);
  return {dense(offsets), dense(load), E};
}

// A plan's capacity says what its offsets are: e * capacity.
inline void check_capacity(const Check& check, const std::optional<int64_t>& capacity,
                           int64_t num_rows, int64_t num_experts) {
  if (!capacity) return;
  // A quotient, since the product may not fit into 64 bits.
  if (num_experts == 0 ? num_rows == 0
                       : num_rows % num_experts == 0 && *capacity == num_rows / num_experts) {
    return;
  }
  check.fail("capacity must be R / E with R = ", num_rows, ", E = ", num_experts, ", got ",
             *capacity);
}

struct GroupedMMArgs {
  Tensor rows;          // [R, M]
  Tensor weights;       // [E, N, M], strides kept: a transposed view is multiplied without a copy
  OptionalTensor bias;  // [E, N]
  Groups groups;
  int64_t num_rows, rows_width, out_width;
};

inline GroupedMMArgs grouped_mm_args(const Tensor& rows, const Tensor& weights,
                                     const OptionalTensor& bias, const Tensor& offsets,
                                     const Tensor& load, const std::optional<int64_t>& capacity) {
  const Check check("grouped_mm");
  check.shape("rows", rows, {{"R", kAny}, {"M", kAny}});
  check.floating("rows", rows);
  check.shape("weights", weights, {{"E", kAny}, {"N", kAny}, {"M", rows.size(1)}});
  check.same_dtype("weights", weights, "rows", rows);
  check.same_device("weights", weights, "rows", rows);
  if (bias) {
    check.shape("bias", *bias, {{"E", weights.size(0)}, {"N", weights.size(1)}});
    check.same_dtype("bias", *bias, "rows", rows);
    check.same_device("bias", *bias, "rows", rows);
  }
  const Groups groups = check_groups(check, "rows", rows, offsets, load);
  check.shape("weights", weights, {{"E", groups.num_experts}, {"N", kAny}, {"M", kAny}},
              OfPlan{"load", load});
  check_capacity(check, capacity, rows.size(0), groups.num_experts);
  return {dense(rows), weights, dense(bias), groups, rows.size(0), rows.size(1), weights.size(1)};
}

struct GroupedOuterArgs {
  Tensor left;   // [R, N]
  Tensor right;  // [R, M]
  Groups groups;
  int64_t num_rows, left_width, right_width;
};

inline GroupedOuterArgs grouped_outer_args(const Tensor& left, const Tensor& right,
                                           const Tensor& offsets, const Tensor& load,
                                           const std::optional<int64_t>& capacity) {
  const Check check("grouped_outer");
  check.shape("left", left, {{"R", kAny}, {"N", kAny}});
  check.floating("left", left);
  check.shape("right", right, {{"R", left.size(0)}, {"M", kAny}});
  check.same_dtype("right", right, "left", left);
  check.same_device("right", right, "left", left);
  const Groups groups = check_groups(check, "left", left, offsets, load);
  check_capacity(check, capacity, left.size(0), groups.num_experts);
  return {dense(left), dense(right), groups, left.size(0), left.size(1), right.size(1)};
}

}  // namespace moe_ext
