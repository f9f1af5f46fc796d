// The experts' operators on tensor cores: arguments from expert_args.h, kernels from
// csrc/cuda/products. moe_ext/ops/tensor_cores.py says what they take.

#include <tuple>

#include "cuda_call.h"

namespace moe_ext {
namespace {

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

// As kernels read it: dense, and whole vectors.
Tensor readable(const Tensor& tensor) {
  const Tensor whole = dense(tensor);
  return is_aligned(whole) ? whole : torch::stable::clone(whole);
}
OptionalTensor readable(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(readable(*tensor)) : std::nullopt;
}

// Weights [E, N, M], or [E, M, N] if they lie that way.
struct Weights {
  Tensor memory;
  bool transposed;

  explicit Weights(const Tensor& weights) {
    transposed = weights.stride(1) < weights.stride(2);
    memory = readable(transposed ? torch::stable::transpose(weights, 1, 2) : weights);
  }
};

cuda::Groups groups_of(const Groups& groups, int64_t num_rows) {
  const Check check("products");
  if (groups.num_experts == 0) check.fail("tensor cores take at least one expert, got 0");
  if (groups.num_experts > INT32_MAX) {
    check.fail("tensor cores take up to ", INT32_MAX, " experts, got ", groups.num_experts);
  }
  constexpr int64_t kMostRows = INT32_MAX - 128;  // a kernel counts up to a tile more, in 32 bits
  if (num_rows > kMostRows) {
    check.fail("tensor cores take up to ", kMostRows, " rows, got ", num_rows);
  }
  return {const_data<int32_t>(groups.offsets), const_data<int32_t>(groups.load),
          static_cast<int>(groups.num_experts), num_rows};
}

// Rows of whole vectors, of a dtype that is multiplied.
void check_widths(const char* op, const Tensor& rows, std::initializer_list<int64_t> widths) {
  for (const int64_t width : widths) {
    const bool is_taken = rows.scalar_type() != ScalarType::Double && width > 0;
    if (is_taken && width * rows.element_size() % 16 == 0) continue;
    Check(op).fail("tensor cores take rows of a multiple of 16 bytes, not float64; got ", width,
                   " columns");
  }
}

// Without routes: rows as they lie.
cuda::Routes no_routes(int64_t num_rows) { return {nullptr, nullptr, nullptr, 0, 1, num_rows}; }

Tensor tensor_grouped_mm(const GroupedMMArgs& a, bool allow_tf32) {
  check_widths("grouped_mm", a.rows, {a.rows_width, a.out_width});
  const OnDevice device(a.rows);
  const Tensor left = readable(a.rows);
  const OptionalTensor added = readable(a.bias);
  const Weights right(a.weights);
  const Tensor out = empty(left, {a.num_rows, a.out_width}, left.scalar_type());
  cuda::grouped_mm({dtype_of(left), allow_tf32, left.const_data_ptr(), false, no_routes(a.num_rows),
                    right.memory.const_data_ptr(), right.transposed,
                    groups_of(a.groups, a.num_rows), a.rows_width, a.out_width},
                   data_or_null<void>(added), false, true, out.mutable_data_ptr(), device.stream());
  return out;
}

// Rows that are to be rounded to 8 bits are so already.
Tensor tensor_quantized_mm(const QuantizedMMArgs& a, bool /* allow_tf32 */) {
  const Check check("quantized_mm");
  check_widths("quantized_mm", a.rows, {a.rows_width, a.out_width});
  if (a.rows.element_size() != 2) check.fail("tensor cores take rows of 16 bits here");
  if (a.int8_rows) check.fail("tensor cores take rows as they are");
  if (a.values.size(2) % 16 != 0) {
    check.fail("tensor cores take lines of a multiple of 16 bytes, not ", a.values.size(2));
  }
  const OnDevice device(a.rows);
  const Tensor left = readable(a.rows), codes = readable(a.values);
  const OptionalTensor added = readable(a.bias);
  const Tensor out = empty(left, {a.num_rows, a.out_width}, left.scalar_type());
  cuda::quantized_mm({dtype_of(left), left.const_data_ptr(), a.format, codes.const_data_ptr(),
                      a.scales.const_data_ptr(), data_or_null<void>(a.zeros), a.scales.size(2),
                      a.transposed, groups_of(a.groups, a.num_rows), a.rows_width, a.out_width},
                     data_or_null<void>(added), out.mutable_data_ptr(), device.stream());
  return out;
}

Tensor tensor_grouped_outer(const GroupedOuterArgs& a, bool allow_tf32) {
  check_widths("grouped_outer", a.left, {a.left_width, a.right_width});
  const OnDevice device(a.left);
  const Tensor lefts = readable(a.left), rights = readable(a.right);
  const Tensor out =
      empty(lefts, {a.groups.num_experts, a.left_width, a.right_width}, lefts.scalar_type());
  cuda::grouped_outer(
      {dtype_of(lefts), allow_tf32, lefts.const_data_ptr(), rights.const_data_ptr(), false, false,
       no_routes(a.num_rows), groups_of(a.groups, a.num_rows), a.left_width, a.right_width},
      out.mutable_data_ptr(), device.stream());
  return out;
}

// The networks of all experts: their operands as kernels read them, and the products of both
// directions.
class Experts {
 public:
  Experts(const FeedForwardArgs& a, bool allow_tf32)
      : a_(a),
        device_(a.tokens),
        tokens_(readable(a.tokens)),
        up_(a.up),
        down_(a.down),
        up_bias_(readable(a.up_bias)),
        down_bias_(readable(a.down_bias)),
        dtype_(dtype_of(tokens_)),
        allow_tf32_(allow_tf32),
        routes_(routes_of(a.routes)),
        groups_(groups_of(a.groups, a.routes.num_rows)) {
    check_widths("feed_forward", tokens_, {a.hidden, a.inner_width, a.width});
  }

  // Rows that no route owns are not written, and nobody reads them.
  Tensor fresh_rows(int64_t width) const { return fresh({a_.routes.num_rows, width}); }
  Tensor none() const { return fresh({0}); }

  void project_up(void* pre_activation, const Tensor& active) const {
    cuda::grouped_mm_activate(product(tokens_, true, up_, false, a_.hidden, a_.inner_width),
                              data_or_null<void>(up_bias_), a_.score_before_experts, a_.activation,
                              pre_activation, active.mutable_data_ptr(), device_.stream());
  }

  Tensor project_down(const Tensor& active) const {
    const Tensor rows = fresh_rows(a_.hidden);
    cuda::grouped_mm(product(active, false, down_, false, a_.width, a_.hidden),
                     data_or_null<void>(down_bias_), a_.score_before_experts, false,
                     rows.mutable_data_ptr(), device_.stream());
    return rows;
  }

  Tensor combined(const Tensor& rows, bool weighs) const {
    cuda::Routes routes = routes_;
    if (!weighs) routes.weights = nullptr;
    const Tensor out = fresh({a_.routes.num_tokens, a_.hidden});
    cuda::combine(dtype_, rows.const_data_ptr(), routes, a_.hidden, out.mutable_data_ptr(),
                  device_.stream());
    return out;
  }

  // Writes the gradient of the pre-activation and the weighed activation; returns that of the
  // routes' weights.
  Tensor activation_gradient(const Tensor& grad, const Tensor& pre_activation,
                             const Tensor& grad_pre_activation, const Tensor& active) const {
    const int64_t count = cuda::num_dots(a_.width);
    const Tensor dots = empty(tokens_, {a_.routes.num_rows, count}, ScalarType::Float);
    cuda::grouped_mm_activate_backward(
        product(grad, true, down_, true, a_.hidden, a_.width), a_.activation,
        pre_activation.const_data_ptr(), grad_pre_activation.mutable_data_ptr(),
        active.mutable_data_ptr(), data<float>(dots), device_.stream());
    const Tensor grad_weights = empty_route_sums(tokens_, a_.routes);
    cuda::sum_dots(
        {dtype_, const_data<float>(dots), a_.width, grad.const_data_ptr(),
         data_or_null<void>(down_bias_), a_.hidden, routes_, groups_, data<float>(grad_weights)},
        device_.stream());
    return grad_weights;
  }

  Tensor tokens_gradient(const Tensor& grad_pre_activation) const {
    const Tensor rows = fresh_rows(a_.hidden);
    cuda::grouped_mm(product(grad_pre_activation, false, up_, true, a_.inner_width, a_.hidden),
                     nullptr, false, false, rows.mutable_data_ptr(), device_.stream());
    return combined(rows, false);
  }

  // One side of a weight's gradient: rows, or the tokens whose routes have them.
  struct Side {
    const Tensor& matrix;
    bool gathers;
    int64_t width;
  };
  Side tokens() const { return {tokens_, true, a_.hidden}; }
  Tensor up_gradient(const Side& left) const { return outer(left, tokens(), up_.transposed); }
  Tensor down_gradient(const Side& left, const Tensor& active) const {
    return outer(left, {active, false, a_.width}, down_.transposed);
  }

  // The gradient of a bias.
  Tensor sum(const Side& side, bool weighs) const {
    const Tensor out = fresh({a_.groups.num_experts, side.width});
    cuda::sum_rows(
        {dtype_, side.matrix.const_data_ptr(), side.gathers, weighs, routes_, groups_, side.width},
        out.mutable_data_ptr(), device_.stream());
    return out;
  }

 private:
  Tensor fresh(std::initializer_list<int64_t> size) const {
    return empty(tokens_, size, tokens_.scalar_type());
  }

  // rows @ weights^T, or rows @ weights.
  cuda::GroupedMM product(const Tensor& rows, bool gathers, const Weights& weights, bool backward,
                          int64_t depth, int64_t width) const {
    return {dtype_,
            allow_tf32_,
            rows.const_data_ptr(),
            gathers,
            routes_,
            weights.memory.const_data_ptr(),
            weights.transposed != backward,
            groups_,
            depth,
            width};
  }

  // Laid out as the weight is.
  Tensor outer(const Side& left, const Side& right, bool transposed) const {
    if (transposed) return torch::stable::transpose(outer(right, left, false), 1, 2);
    const Tensor out = fresh({a_.groups.num_experts, left.width, right.width});
    cuda::grouped_outer(
        {dtype_, allow_tf32_, left.matrix.const_data_ptr(), right.matrix.const_data_ptr(),
         left.gathers, right.gathers, routes_, groups_, left.width, right.width},
        out.mutable_data_ptr(), device_.stream());
    return out;
  }

  const FeedForwardArgs& a_;
  const OnDevice device_;
  const Tensor tokens_;
  const Weights up_, down_;
  const OptionalTensor up_bias_, down_bias_;
  const cuda::Dtype dtype_;
  const bool allow_tf32_;
  const cuda::Routes routes_;
  const cuda::Groups groups_;
};

std::tuple<Tensor, Tensor> tensor_feed_forward(const FeedForwardArgs& a, bool keeps,
                                               bool allow_tf32) {
  const Experts experts(a, allow_tf32);
  const Tensor pre_activation = keeps ? experts.fresh_rows(a.inner_width) : experts.none();
  const Tensor active = experts.fresh_rows(a.width);
  experts.project_up(keeps ? pre_activation.mutable_data_ptr() : nullptr, active);
  return {experts.combined(experts.project_down(active), !a.score_before_experts), pre_activation};
}

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SixTensors tensor_feed_forward_backward(const FeedForwardBackwardArgs& b, bool needs_tokens,
                                        bool needs_up, bool needs_down, bool allow_tf32) {
  const FeedForwardArgs& a = b.forward;
  const Experts experts(a, allow_tf32);
  const Tensor upstream = readable(b.grad), inner = readable(b.pre_activation);
  const Tensor grad_inner = experts.fresh_rows(a.inner_width);
  const Tensor active = experts.fresh_rows(a.width);
  const Tensor grad_weights = experts.activation_gradient(upstream, inner, grad_inner, active);
  const Experts::Side of_grad{upstream, true, a.hidden}, of_inner{grad_inner, false, a.inner_width};
  return {needs_tokens ? experts.tokens_gradient(grad_inner) : experts.none(),
          needs_up ? experts.up_gradient(of_inner) : experts.none(),
          needs_down ? experts.down_gradient(of_grad, active) : experts.none(),
          needs_up && a.up_bias ? experts.sum(of_inner, false) : experts.none(),
          needs_down && a.down_bias ? experts.sum(of_grad, true) : experts.none(),
          grad_weights};
}

}  // namespace

MOE_EXT_CUDA_LIBRARY(m) {
  m.impl("tensor_grouped_mm", boxed<grouped_mm_args, tensor_grouped_mm>);
  m.impl("tensor_quantized_mm", boxed<quantized_mm_args, tensor_quantized_mm>);
  m.impl("tensor_grouped_outer", boxed<grouped_outer_args, tensor_grouped_outer>);
  m.impl("tensor_feed_forward", boxed<feed_forward_args, tensor_feed_forward>);
  m.impl("tensor_feed_forward_backward",
         boxed<feed_forward_backward_args, tensor_feed_forward_backward>);
}

}  // namespace moe_ext
