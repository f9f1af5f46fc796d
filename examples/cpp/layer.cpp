// A mixture-of-experts layer without Python: every token goes to 2 of 4 SwiGLU experts.
#include <ATen/ATen.h>
#include <moe_ext.h>

#include <iostream>

// tokens [T, H], router [E, H], up [E, 2F, H], down [E, H, F] -> [T, H]
at::Tensor layer(const at::Tensor& tokens, const at::Tensor& router, const at::Tensor& up,
                 const at::Tensor& down) {
  const at::Tensor logits = at::linear(tokens, router);
  const auto choice = moe_ext::gate(logits, 2, "softmax", /*normalize=*/true);
  const auto plan = moe_ext::make_plan(choice.expert_ids, router.size(0));
  const at::Tensor rows = moe_ext::dispatch(tokens, plan);
  const at::Tensor pre_activation = moe_ext::grouped_mm(rows, up, plan);
  const at::Tensor active = moe_ext::activate(pre_activation, plan, "swiglu", choice.weights);
  return moe_ext::combine(moe_ext::grouped_mm(active, down, plan), plan);
}

int main() {
  const c10::InferenceMode inference;
  at::manual_seed(0);
  const at::Tensor tokens = at::randn({16, 32}), router = at::randn({4, 32});
  const at::Tensor up = at::randn({4, 128, 32}), down = at::randn({4, 32, 64});
  std::cout << layer(tokens, router, up, down).sum(1) << "\n";
}
