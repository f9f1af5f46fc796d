// The operators' CUDA side: arguments from args.h, outputs from torch's allocator, kernels from
// csrc/cuda on torch's current stream.

#include <tuple>

#include "cuda_call.h"

#if defined(MOE_EXT_ARCHITECTURES)
#define MOE_EXT_TEXT(...) #__VA_ARGS__
#define MOE_EXT_TEXT_OF(...) MOE_EXT_TEXT(__VA_ARGS__)
// moe_ext/toolkit.py reads it in the library's bytes.
__attribute__((used)) static const char architectures[] = "moe_ext built by CUDA " MOE_EXT_TEXT_OF(
    MOE_EXT_TOOLKIT) " for compute capability " MOE_EXT_TEXT_OF(MOE_EXT_ARCHITECTURES);
#endif

#if !defined(MOE_EXT_EMULATED)
// As moe_ext_library in ops.cpp.
extern "C" __attribute__((visibility("default"))) void moe_ext_cuda_library() {}
#endif

namespace moe_ext {
namespace {

int few_experts(const char* op, int64_t num_experts) {
  if (num_experts <= cuda::kMaxExperts) return static_cast<int>(num_experts);
  Check(op).fail("num_experts must be at most ", cuda::kMaxExperts, " on cuda, got ", num_experts);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_cuda(const GateArgs& a) {
  const int64_t T = a.num_tokens, E = few_experts("gate", a.num_experts);
  const OnDevice device(a.logits);
  const ScalarType dtype = accumulate_type(a.logits.scalar_type());
  const cuda::Dtype logits_dtype = dtype_of(a.logits);
  const Tensor weights = empty(a.logits, {T, a.top_k}, dtype);
  const Tensor expert_ids = empty(a.logits, {T, a.top_k}, ScalarType::Int);
  const Tensor probs = empty(a.logits, {T, E}, dtype);
  const Tensor importance = empty(a.logits, {E}, dtype);
  const Tensor block_sums = empty(a.logits, {cuda::gate_blocks(logits_dtype, T, E), E}, dtype);
  cuda::gate(
      {logits_dtype, a.logits.const_data_ptr(), a.choice_scores.const_data_ptr(), T,
       static_cast<int>(E), static_cast<int>(a.top_k), a.rule.scoring, a.rule.normalize,
       a.rule.scale, weights.mutable_data_ptr(), data<int32_t>(expert_ids),
       probs.mutable_data_ptr(), importance.mutable_data_ptr(), block_sums.mutable_data_ptr()},
      device.stream());
  return {weights, expert_ids, probs, importance};
}

Tensor gate_backward_cuda(const GateBackwardArgs& a) {
  const int num_experts = few_experts("gate_backward", a.num_experts);
  const OnDevice device(a.probs);
  const Tensor grad = empty(a.probs, {a.num_tokens, a.num_experts}, a.probs.scalar_type());
  cuda::gate_backward(
      {dtype_of(a.probs), data_or_null<void>(a.grad_weights), data_or_null<void>(a.grad_probs),
       data_or_null<void>(a.grad_importance), a.probs.const_data_ptr(),
       const_data<int32_t>(a.expert_ids), a.num_tokens, num_experts, static_cast<int>(a.top_k),
       a.rule.scoring, a.rule.normalize, a.rule.scale, grad.mutable_data_ptr()},
      device.stream());
  return grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> plan_cuda(const PlanArgs& a) {
  const int E = few_experts("plan", a.num_experts);
  const OnDevice device(a.expert_ids);
  const Tensor slots = empty(a.expert_ids, {a.num_tokens, a.top_k}, ScalarType::Int);
  const Tensor sources = empty(a.expert_ids, {a.num_rows}, ScalarType::Int);
  const Tensor offsets = empty(a.expert_ids, {a.num_experts + 1}, ScalarType::Int);
  const Tensor load = empty(a.expert_ids, {a.num_experts}, ScalarType::Int);
  const int64_t scratch_size = cuda::plan_scratch(a.num_routes, E, a.priority.has_value());
  const Tensor scratch = empty(a.expert_ids, {scratch_size}, ScalarType::Int);
  cuda::plan(
      {const_data<int32_t>(a.expert_ids), data_or_null<float>(a.priority), a.num_tokens, a.top_k, E,
       a.capacity.value_or(-1), a.choice_major, a.align, a.num_rows, data<int32_t>(slots),
       data<int32_t>(sources), data<int32_t>(offsets), data<int32_t>(load), data<int32_t>(scratch)},
      device.stream());
  return {slots, sources, offsets, load};
}

std::tuple<Tensor, Tensor> balance_cuda(const BalanceArgs& a) {
  const int E = few_experts("balance", a.num_experts);
  const OnDevice device(a.importance);
  const ScalarType dtype = a.importance.scalar_type();
  const Tensor l_aux = empty(a.importance, {}, dtype);
  const Tensor slope = empty(a.importance, {a.num_experts}, dtype);
  const int64_t blocks = a.choices < a.top_k ? cuda::balance_blocks(a.num_tokens) : 0;
  const Tensor scratch = empty(a.load, {blocks, a.num_experts}, ScalarType::Int);
  cuda::balance({dtype_of(a.importance), a.importance.const_data_ptr(), const_data<int32_t>(a.load),
                 const_data<int32_t>(a.expert_ids), a.num_tokens, a.top_k, a.choices, E,
                 l_aux.mutable_data_ptr(), slope.mutable_data_ptr(), data<int32_t>(scratch)},
                device.stream());
  return {l_aux, slope};
}

// The weights, or their gradient where a.grad is given.
Tensor mask_weights_cuda(const MaskWeightsArgs& a) {
  const OnDevice device(a.weights);
  const Tensor out = empty(a.weights, {a.num_tokens, a.top_k}, a.weights.scalar_type());
  const cuda::MaskWeights args{dtype_of(a.weights),
                               a.weights.const_data_ptr(),
                               const_data<int32_t>(a.slots),
                               a.num_tokens,
                               a.top_k,
                               a.normalize,
                               a.eps,
                               a.scale};
  if (a.grad) {
    cuda::mask_weights_backward(args, a.grad->const_data_ptr(), out.mutable_data_ptr(),
                                device.stream());
  } else {
    cuda::mask_weights(args, out.mutable_data_ptr(), device.stream());
  }
  return out;
}

Tensor move_rows(const MoveArgs& a, int64_t num_rows, decltype(cuda::dispatch)* launch) {
  const OnDevice device(a.from);
  const Tensor out = empty(a.from, {num_rows, a.hidden}, a.from.scalar_type());
  launch(dtype_of(a.from), a.from.const_data_ptr(), routes_of(a.routes), a.hidden,
         out.mutable_data_ptr(), device.stream());
  return out;
}
Tensor dispatch_cuda(const MoveArgs& a) { return move_rows(a, a.routes.num_rows, cuda::dispatch); }
Tensor combine_cuda(const MoveArgs& a) { return move_rows(a, a.routes.num_tokens, cuda::combine); }

Tensor route_dot_cuda(const RouteDotArgs& a) {
  const OnDevice device(a.tokens);
  const Tensor dots = empty_route_sums(a.tokens, a.routes);
  cuda::route_dot(dtype_of(a.tokens), a.tokens.const_data_ptr(), a.rows.const_data_ptr(),
                  routes_of(a.routes), a.hidden, dots.mutable_data_ptr(), device.stream());
  return dots;
}

std::tuple<Tensor, Tensor> combine_backward_cuda(const RouteDotArgs& a) {
  const OnDevice device(a.tokens);
  const Tensor dispatched = empty(a.tokens, {a.routes.num_rows, a.hidden}, a.tokens.scalar_type());
  const Tensor dots = empty_route_sums(a.tokens, a.routes);
  cuda::combine_backward(dtype_of(a.tokens), a.tokens.const_data_ptr(), a.rows.const_data_ptr(),
                         routes_of(a.routes), a.hidden, dispatched.mutable_data_ptr(),
                         dots.mutable_data_ptr(), device.stream());
  return {dispatched, dots};
}

Tensor activate_cuda(const ActivateArgs& a) {
  const Tensor& from = a.pre_activation;
  const OnDevice device(from);
  const Tensor out = empty(from, {a.routes.num_rows, a.width}, from.scalar_type());
  cuda::activate(dtype_of(from), from.const_data_ptr(), routes_of(a.routes), a.width, a.activation,
                 out.mutable_data_ptr(), device.stream());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> activate_backward_cuda(const ActivateBackwardArgs& a) {
  const ActivateArgs& f = a.forward;
  const Tensor& from = f.pre_activation;
  const OnDevice device(from);
  const int64_t num_rows = f.routes.num_rows;
  const Tensor grad_pre_activation = empty(from, {num_rows, f.inner_width}, from.scalar_type());
  const Tensor active = empty(from, {num_rows, f.width}, from.scalar_type());
  const Tensor grad_weights = empty_route_sums(from, f.routes);
  cuda::activate_backward({dtype_of(from), a.grad.const_data_ptr(), from.const_data_ptr(), f.width,
                           f.activation, grad_pre_activation.mutable_data_ptr(),
                           active.mutable_data_ptr(), grad_weights.mutable_data_ptr()},
                          routes_of(f.routes), device.stream());
  return {grad_pre_activation, active, grad_weights};
}

void zero_empty_groups_cuda(const Tensor& sums, const Tensor& offsets) {
  const OnDevice device(sums);
  const int64_t groups = offsets.numel() - 1;
  if (sums.numel() == 0) return;
  cuda::zero_empty_groups(sums.mutable_data_ptr(), sums.numel() / groups * sums.element_size(),
                          const_data<int32_t>(offsets), groups, device.stream());
}

}  // namespace

MOE_EXT_CUDA_LIBRARY(m) {
  m.impl("gate", boxed<gate_args, gate_cuda>);
  m.impl("gate_backward", boxed<gate_backward_args, gate_backward_cuda>);
  m.impl("plan", boxed<plan_args, plan_cuda>);
  m.impl("balance", boxed<balance_args, balance_cuda>);
  m.impl("mask_weights", boxed<mask_weights_args, mask_weights_cuda>);
  m.impl("mask_weights_backward", boxed<mask_weights_backward_args, mask_weights_cuda>);
  m.impl("dispatch", boxed<dispatch_args, dispatch_cuda>);
  m.impl("combine", boxed<combine_args, combine_cuda>);
  m.impl("route_dot", boxed<route_dot_args, route_dot_cuda>);
  m.impl("combine_backward", boxed<combine_backward_args, combine_backward_cuda>);
  m.impl("activate", boxed<activate_args, activate_cuda>);
  m.impl("activate_backward", boxed<activate_backward_args, activate_backward_cuda>);
  m.impl("zero_empty_groups", TORCH_BOX(&zero_empty_groups_cuda));
}

}  // namespace moe_ext
