// The arguments of the experts' operators, as in args.h: activations, products, and networks of
// both.

#pragma once

#include <utility>

#include "activation.h"
#include "args.h"
#include "weight_format.h"

namespace moe_ext {

inline Activation parse_activation(const Check& check, const std::string& activation) {
  if (activation == "swiglu") return Activation::kSwiglu;
  if (activation == "geglu") return Activation::kGeglu;
  if (activation == "swiglu_oai") return Activation::kSwigluOai;
  if (activation == "gelu") return Activation::kGelu;
  if (activation == "relu") return Activation::kRelu;
  if (activation == "relu2") return Activation::kRelu2;
  check.fail("activation must be swiglu, geglu, swiglu_oai, gelu, relu or relu2, got ", activation);
}

// F follows from G and the activation.
inline Activation check_activation(Call& call, const std::string& activation) {
  const Activation kind = parse_activation(call, activation);
  const int64_t G = call.sizes['G'];
  if (is_gated(kind) && G % 2 != 0) {
    call.fail("pre_activation must be [R, 2F], got [R, ", G, "]");
  }
  call.sizes.set('F', is_gated(kind) ? G / 2 : G);
  return kind;
}

struct ActivateArgs {
  Tensor pre_activation;  // [R, G], G = 2F with the gate's columns first, F without a gate
  RouteArgs routes;
  Activation activation;
  int64_t inner_width, width;
};

inline ActivateArgs activate_args(const Tensor& pre_activation, const Tensor& slots,
                                  const Tensor& sources, const OptionalTensor& weights,
                                  const std::string& activation) {
  Activation kind;
  const Sizes s =
      check<contract("activate")>({pre_activation, slots, sources, weights},
                                  [&](Call& call) { kind = check_activation(call, activation); });
  return {dense(pre_activation), route_args(slots, sources, weights, s), kind, s['G'], s['F']};
}

struct ActivateBackwardArgs {
  Tensor grad;  // [R, F]
  ActivateArgs forward;
};

inline ActivateBackwardArgs activate_backward_args(const Tensor& grad, const Tensor& pre_activation,
                                                   const Tensor& slots, const Tensor& sources,
                                                   const Tensor& weights,
                                                   const std::string& activation) {
  Activation kind;
  const Sizes s = check<contract("activate_backward")>(
      {grad, pre_activation, slots, sources, weights},
      [&](Call& call) { kind = check_activation(call, activation); });
  const RouteArgs routes = route_args(slots, sources, weights, s);
  return {dense(grad), {dense(pre_activation), routes, kind, s['G'], s['F']}};
}

// The rows of each expert that a route owns: offsets[e] and the min(load[e], room) after it.
struct Groups {
  Tensor offsets;  // [E+1]
  Tensor load;     // [E]
  int64_t num_experts;
};

// A plan's capacity says what its offsets are: e * capacity.
inline void check_capacity(const Call& call, const std::optional<int64_t>& capacity) {
  if (!capacity) return;
  const int64_t R = call.sizes['R'], E = call.sizes['E'];
  // A quotient, since the product may not fit into 64 bits.
  if (E == 0 ? R == 0 : R % E == 0 && *capacity == R / E) return;
  call.fail("capacity must be R / E with R = ", R, ", E = ", E, ", got ", *capacity);
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
  const Sizes s = check<contract("grouped_mm")>(
      {rows, weights, bias, offsets, load}, [&](Call& call) { check_capacity(call, capacity); });
  const Groups groups{dense(offsets), dense(load), s['E']};
  return {dense(rows), weights, dense(bias), groups, s['R'], s['M'], s['N']};
}

struct QuantizedMMArgs {
  Tensor rows;            // [R, I]
  Tensor values, scales;  // [E, N, B], [E, N, S]
  OptionalTensor zeros;   // [E, N, Z]
  OptionalTensor bias;    // [E, O]
  Groups groups;
  WeightFormat format;
  bool transposed, int8_rows;
  int64_t num_rows, rows_width, out_width;
};

// The weight is [N, M]: M follows from its bytes, and O.
inline WeightFormat check_format(Call& call, const std::string& name, bool transposed,
                                 const Tensor& scales, const OptionalTensor& zeros,
                                 const OptionalTensor& bias) {
  const std::optional<WeightFormat> format = weight_format(name);
  if (!format) call.fail("format must be int8, int4, mxfp4 or nf4, got ", name);
  call.dtype("scales", scales,
             {*format == WeightFormat::kInt4    ? ScalarType::BFloat16
              : *format == WeightFormat::kMxfp4 ? ScalarType::Byte
                                                : ScalarType::Float});
  const int64_t N = call.sizes['N'], M = call.sizes['B'] * 8 / bits_of(*format);
  const int64_t S = call.sizes['S'];
  const bool of_rows = *format == WeightFormat::kInt8;
  if (of_rows ? S != 1 : S == 0 || M % S != 0 || !has_group(*format, M / S)) {
    const char* expected = of_rows                           ? "all"
                           : *format == WeightFormat::kInt4  ? "32 or 64 or 128"
                           : *format == WeightFormat::kMxfp4 ? "32"
                                                             : "64";
    call.fail("scales must be one for ", expected, " numbers of a row, got ", S, " for ", M);
  }
  if (zeros && *format != WeightFormat::kInt4) call.fail("zeros must be None for ", name);
  if (transposed && bias) call.fail("bias must be None for transposed weights");
  call.sizes.set('Z', (S + 1) / 2);
  const int64_t taken = transposed ? N : M;
  call.sizes.set('O', transposed ? M : N);
  if (call.sizes['I'] != taken) {
    call.fail("rows must be [R, ", taken, "] for such a weight, got [R, ", call.sizes['I'], "]");
  }
  return *format;
}

inline QuantizedMMArgs quantized_mm_args(const Tensor& rows, const Tensor& values,
                                         const Tensor& scales, const OptionalTensor& zeros,
                                         const OptionalTensor& bias, const Tensor& offsets,
                                         const Tensor& load, const std::string& name,
                                         bool transposed, bool int8_rows,
                                         const std::optional<int64_t>& capacity) {
  WeightFormat format;
  const Sizes s = check<contract("quantized_mm")>(
      {rows, values, scales, zeros, bias, offsets, load}, [&](Call& call) {
        format = check_format(call, name, transposed, scales, zeros, bias);
        check_capacity(call, capacity);
      });
  const Groups groups{dense(offsets), dense(load), s['E']};
  return {dense(rows), dense(values), dense(scales), dense(zeros), dense(bias), groups,
          format,      transposed,    int8_rows,     s['R'],       s['I'],      s['O']};
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
  const Sizes s = check<contract("grouped_outer")>(
      {left, right, offsets, load}, [&](Call& call) { check_capacity(call, capacity); });
  const Groups groups{dense(offsets), dense(load), s['E']};
  return {dense(left), dense(right), groups, s['R'], s['N'], s['M']};
}

// The tensors of both directions, as they are given.
struct FeedForwardOperands {
  const Tensor &tokens, &slots, &sources, &offsets, &load, &weights, &up, &down;
  const OptionalTensor &up_bias, &down_bias;
};

struct FeedForwardArgs {
  Tensor tokens;  // [T, H]
  RouteArgs routes;
  Groups groups;
  Tensor up, down;           // [E, G, H], [E, H, F], strides kept
  OptionalTensor up_bias;    // [E, G]
  OptionalTensor down_bias;  // [E, H]
  Activation activation;
  bool score_before_experts;
  int64_t hidden, inner_width, width;  // H, G, F
};

// tensors: of one direction. F follows from G and the activation.
template <int kContract, int kCount>
FeedForwardArgs check_experts(const Given (&tensors)[kCount], const FeedForwardOperands& o,
                              const std::string& activation, bool score_before_experts,
                              const std::optional<int64_t>& capacity) {
  Activation kind;
  const Sizes s = check<kContract>(tensors, [&](Call& call) {
    kind = parse_activation(call, activation);
    call.same_dtype("up", o.up, "tokens", o.tokens);
    const int64_t G = call.sizes['G'];
    if (is_gated(kind) && G % 2 != 0) call.fail("up must be [E, 2F, H], got ", shape_text(o.up));
    call.sizes.set('F', is_gated(kind) ? G / 2 : G);
    check_capacity(call, capacity);
  });
  const RouteArgs routes = route_args(o.slots, o.sources, o.weights, s);
  const Groups groups{dense(o.offsets), dense(o.load), s['E']};
  return {dense(o.tokens),
          routes,
          groups,
          o.up,
          o.down,
          dense(o.up_bias),
          dense(o.down_bias),
          kind,
          score_before_experts,
          s['H'],
          s['G'],
          s['F']};
}

inline FeedForwardArgs feed_forward_args(
    const Tensor& tokens, const Tensor& slots, const Tensor& sources, const Tensor& offsets,
    const Tensor& load, const Tensor& weights, const Tensor& up, const Tensor& down,
    const OptionalTensor& up_bias, const OptionalTensor& down_bias, const std::string& activation,
    bool score_before_experts, const std::optional<int64_t>& capacity) {
  return check_experts<contract("feed_forward")>(
      {tokens, slots, sources, offsets, load, weights, up, down, up_bias, down_bias},
      {tokens, slots, sources, offsets, load, weights, up, down, up_bias, down_bias}, activation,
      score_before_experts, capacity);
}

struct FeedForwardBackwardArgs {
  Tensor grad;            // [T, H]
  Tensor pre_activation;  // [R, G]
  FeedForwardArgs forward;
};

inline FeedForwardBackwardArgs feed_forward_backward_args(
    const Tensor& grad, const Tensor& tokens, const Tensor& pre_activation, const Tensor& slots,
    const Tensor& sources, const Tensor& offsets, const Tensor& load, const Tensor& weights,
    const Tensor& up, const Tensor& down, const OptionalTensor& up_bias,
    const OptionalTensor& down_bias, const std::string& activation, bool score_before_experts,
    const std::optional<int64_t>& capacity) {
  FeedForwardArgs forward = check_experts<contract("feed_forward_backward")>(
      {grad, tokens, pre_activation, slots, sources, offsets, load, weights, up, down, up_bias,
       down_bias},
      {tokens, slots, sources, offsets, load, weights, up, down, up_bias, down_bias}, activation,
      score_before_experts, capacity);
  return {dense(grad), dense(pre_activation), std::move(forward)};
}

}  // namespace moe_ext
