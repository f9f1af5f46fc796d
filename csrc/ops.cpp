// The table of operators. Letters are shapes: T tokens, K choices, E experts, R rows, H hidden,
// N and M the two widths of an expert's weight,
// F an expert's inner size, G = 2F where its activation has a gate, else F. Ids, slots, sources,
// offsets and load are int32. Meaning: moe_ext/ops/reference.py. Gradients:
// moe_ext/ops/autograd.py. Arguments: args.h.

#include <torch/csrc/stable/library.h>

// Does nothing. A C++ program that calls it, as moe_ext.h does, is linked with this library.
extern "C" __attribute__((visibility("default"))) void moe_ext_library() {}

STABLE_TORCH_LIBRARY(moe_ext, m) {
  // logits, choice_scores [T, E] -> weights [T, K], expert_ids [T, K], probs [T, E], importance [E]
  m.def(
      "gate(Tensor logits, Tensor? choice_scores, SymInt k, str scoring, bool normalize, "
      "float scale) -> (Tensor, Tensor, Tensor, Tensor)");

  // grad_weights [T, K], grad_probs [T, E], grad_importance [E], probs [T, E], expert_ids [T, K]
  // -> grad_logits [T, E]
  m.def(
      "gate_backward(Tensor? grad_weights, Tensor? grad_probs, Tensor? grad_importance, "
      "Tensor probs, Tensor expert_ids, str scoring, bool normalize, float scale) -> Tensor");

  // expert_ids, priority [T, K] -> slots [T, K], sources [R], offsets [E+1], load [E]
  m.def(
      "plan(Tensor expert_ids, Tensor? priority, SymInt num_experts, SymInt? capacity, str order, "
      "SymInt align) -> (Tensor, Tensor, Tensor, Tensor)");

  // weights, slots [T, K] -> kept [T, K]
  m.def(
      "mask_weights(Tensor weights, Tensor slots, bool normalize, float eps, float scale) -> "
      "Tensor");

  // grad, weights, slots [T, K] -> grad_weights [T, K]
  m.def(
      "mask_weights_backward(Tensor grad, Tensor weights, Tensor slots, bool normalize, "
      "float eps, float scale) -> Tensor");

  // tokens [T, H], slots [T, K], sources [R], weights [T, K] -> rows [R, H]
  m.def("dispatch(Tensor tokens, Tensor slots, Tensor sources, Tensor? weights) -> Tensor");

  // rows [R, H], slots [T, K], sources [R], weights [T, K] -> tokens [T, H]
  m.def("combine(Tensor rows, Tensor slots, Tensor sources, Tensor? weights) -> Tensor");

  // tokens [T, H], rows [R, H], slots [T, K], sources [R] -> weights [T, K]
  m.def("route_dot(Tensor tokens, Tensor rows, Tensor slots, Tensor sources) -> Tensor");

  // tokens [T, H], rows [R, H], slots [T, K], sources [R], weights [T, K]
  // -> dispatch(tokens, weights) [R, H], route_dot(tokens, rows) [T, K]
  m.def(
      "combine_backward(Tensor tokens, Tensor rows, Tensor slots, Tensor sources, Tensor weights) "
      "-> (Tensor, Tensor)");

  // rows [R, M], weights [E, N, M], bias [E, N], offsets [E+1], load [E] -> [R, N]
  m.def(
      "grouped_mm(Tensor rows, Tensor weights, Tensor? bias, Tensor offsets, Tensor load, "
      "SymInt? capacity) -> Tensor");

  // left [R, N], right [R, M], offsets [E+1], load [E] -> [E, N, M]
  m.def(
      "grouped_outer(Tensor left, Tensor right, Tensor offsets, Tensor load, SymInt? capacity) "
      "-> Tensor");

  // pre_activation [R, G], slots [T, K], sources [R], weights [T, K] -> [R, F]
  m.def(
      "activate(Tensor pre_activation, Tensor slots, Tensor sources, Tensor? weights, str "
      "activation) "
      "-> Tensor");

  // grad [R, F], pre_activation [R, G], slots [T, K], sources [R], weights [T, K]
  // -> grad_pre_activation [R, G], activate(pre_activation, weights) [R, F], grad_weights [T, K]
  m.def(
      "activate_backward(Tensor grad, Tensor pre_activation, Tensor slots, Tensor sources, Tensor "
      "weights, "
      "str activation) -> (Tensor, Tensor, Tensor)");

  // Whether products of such rows are computed in float32, from copies.
  m.def("widens(Tensor rows) -> bool");
}
