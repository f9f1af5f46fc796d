// The operators' CUDA kernels, in the .cu files, behind plain pointers to device memory.
// Neither torch's nor CUDA's headers are needed to call them.
//
// Nothing here waits for the device, allocates, or keeps anything after the call: a caller gives
// the outputs and the scratch memory. The shape of every launch follows from sizes alone. A launch
// that CUDA refuses throws std::runtime_error. Letters as in moe_ext/ops/contracts.py.

#pragma once

#include <cstdint>

#include "../activation.h"
#include "../scoring.h"
#include "../weight_format.h"

struct CUstream_st;

namespace moe_ext::cuda {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

// The gate's and the plan's kernels keep a number per expert in registers or shared memory.
constexpr int64_t kMaxExperts = 1024;

// Weights, probs and importance are float64 beside float64 logits, else float32.
struct Gate {
  Dtype dtype;
  const void* logits;         // [T, E]
  const void* choice_scores;  // [T, E]
  int64_t num_tokens;
  int num_experts, top_k;
  Scoring scoring;
  bool normalize;
  double scale;
  void* weights;        // [T, K]
  int32_t* expert_ids;  // [T, K]
  void* probs;          // [T, E]
  void* importance;     // [E]
  void* block_sums;     // scratch: [gate_blocks(dtype, T, E), E], as importance
};
int64_t gate_blocks(Dtype dtype, int64_t num_tokens, int64_t num_experts);
void gate(const Gate& call, CUstream_st* stream);

struct GateBackward {
  Dtype dtype;                  // of probs and of every gradient: float32 or float64
  const void* grad_weights;     // [T, K] or null
  const void* grad_probs;       // [T, E] or null
  const void* grad_importance;  // [E] or null
  const void* probs;            // [T, E]
  const int32_t* expert_ids;    // [T, K]
  int64_t num_tokens;
  int num_experts, top_k;
  Scoring scoring;
  bool normalize;
  double scale;
  void* grad_logits;  // [T, E]
};
void gate_backward(const GateBackward& call, CUstream_st* stream);

struct Plan {
  const int32_t* expert_ids;  // [T, K]
  const float* priority;      // [T, K] or null
  int64_t num_tokens, top_k;
  int num_experts;
  int64_t capacity;  // -1: dropless
  bool choice_major;
  int64_t align, num_rows;
  int32_t* slots;    // [T, K]
  int32_t* sources;  // [R]
  int32_t* offsets;  // [E+1]
  int32_t* load;     // [E]
  int32_t* scratch;  // [plan_scratch(...)]
};
int64_t plan_scratch(int64_t num_routes, int64_t num_experts, bool with_priority);
void plan(const Plan& call, CUstream_st* stream);

struct Balance {
  Dtype dtype;                // of importance, l_aux and slope: float32 or float64
  const void* importance;     // [E]
  const int32_t* load;        // [E]
  const int32_t* expert_ids;  // [T, K]
  int64_t num_tokens, top_k, choices;
  int num_experts;
  void* l_aux;       // []
  void* slope;       // [E]
  int32_t* scratch;  // [balance_blocks(T), E]; not used where choices are all K
};
int64_t balance_blocks(int64_t num_tokens);
void balance(const Balance& call, CUstream_st* stream);

struct MaskWeights {
  Dtype dtype;           // of the weights: float32 or float64
  const void* weights;   // [T, K]
  const int32_t* slots;  // [T, K]
  int64_t num_tokens, top_k;
  bool normalize;
  double eps, scale;
};
void mask_weights(const MaskWeights& call, void* kept, CUstream_st* stream);
// grad [T, K] -> grad_weights [T, K]
void mask_weights_backward(const MaskWeights& call, const void* grad, void* grad_weights,
                           CUstream_st* stream);

// sums: [E, so many bytes each]
void zero_empty_groups(void* sums, int64_t bytes, const int32_t* offsets, int64_t num_groups,
                       CUstream_st* stream);

// The routes of the row operators. A route has a row where slots and sources agree that it has;
// whatever else they hold, no access is out of bounds.
struct Routes {
  const int32_t* slots;    // [T, K]
  const int32_t* sources;  // [R]
  const void* weights;     // [T, K] or null, float64 beside float64 rows, else float32
  int64_t num_tokens, top_k, num_rows;
};

// tokens [T, H] -> rows [R, H]
void dispatch(Dtype dtype, const void* tokens, const Routes& routes, int64_t hidden, void* rows,
              CUstream_st* stream);
// rows [R, H] -> tokens [T, H]
void combine(Dtype dtype, const void* rows, const Routes& routes, int64_t hidden, void* tokens,
             CUstream_st* stream);
// tokens [T, H], rows [R, H] -> dots [T, K]
void route_dot(Dtype dtype, const void* tokens, const void* rows, const Routes& routes,
               int64_t hidden, void* dots, CUstream_st* stream);
// The same, and in the same pass over the tokens -> dispatched [R, H], by the weights
void combine_backward(Dtype dtype, const void* tokens, const void* rows, const Routes& routes,
                      int64_t hidden, void* dispatched, void* dots, CUstream_st* stream);

// pre_activation [R, G] -> out [R, F], by the weights where there are any; F is `width`, G is 2F
// with a gate
void activate(Dtype dtype, const void* pre_activation, const Routes& routes, int64_t width,
              Activation activation, void* out, CUstream_st* stream);

struct ActivateBackward {
  Dtype dtype;
  const void* grad;            // [R, F]
  const void* pre_activation;  // [R, G]
  int64_t width;
  Activation activation;
  void* grad_pre_activation;  // [R, G]
  void* active;               // [R, F], what `activate` gives
  void* grad_weights;         // [T, K], as the weights
};
void activate_backward(const ActivateBackward& call, const Routes& routes, CUstream_st* stream);

// ---- Products on tensor cores: compute capability 8.0 and up ------------------------------------
//
// Rows are of whole 16-byte vectors, and aligned. Float32 counts with 19 bits where TF32 is
// allowed, else nearly whole; there is no float64.

// The rows of each group: offsets[e] and the min(load[e], room) behind it. Whatever both hold, no
// row is out of range. Other rows are not read; they are written only where it says so.
struct Groups {
  const int32_t* offsets;  // [E+1]
  const int32_t* load;     // [E]
  int num_groups;
  int64_t num_rows;  // R
};

struct GroupedMM {
  Dtype dtype;
  bool allow_tf32;
  const void* rows;  // [R, M]; gathered, [T, M]: row r is that of the token whose route has row r
  bool gathers;
  Routes routes;        // needed where rows are gathered or weighed
  const void* weights;  // [E, N, M]; transposed, [E, M, N]
  bool transposed;
  Groups groups;
  int64_t depth, width;  // M, N
};
// out[r] = weights[e] @ rows[r] + bias[e], the bias weighed by the route's weight or not.
// bias: [E, N] or null, out: [R, N]; zeroes: the other rows
void grouped_mm(const GroupedMM& call, const void* bias, bool weighs, bool zeroes, void* out,
                CUstream_st* stream);
// The same as a pre-activation, and its activation, weighed or not.
// pre_activation: [R, N] or null, its other rows zero; active: [R, F], N is 2F with a gate
void grouped_mm_activate(const GroupedMM& call, const void* bias, bool weighs,
                         Activation activation, void* pre_activation, void* active,
                         CUstream_st* stream);
// The product is the gradient of the activation, [R, F]: the results of `activate_backward`, and
// for each row num_dots(F) numbers whose sum is the gradient of its route's weight.
int64_t num_dots(int64_t width);
void grouped_mm_activate_backward(const GroupedMM& call, Activation activation,
                                  const void* pre_activation, void* grad_pre_activation,
                                  void* active, float* dots, CUstream_st* stream);

// grad_weights[t, k] = the sum of the row's dots + <grad[t], bias[e]>
struct SumDots {
  Dtype dtype;        // of grad and bias
  const float* dots;  // [R, num_dots(F)]
  int64_t width;      // F
  const void* grad;   // [T, H]
  const void* bias;   // [E, H] or null
  int64_t hidden;     // H
  Routes routes;
  Groups groups;
  float* grad_weights;  // [T, K]
};
void sum_dots(const SumDots& call, CUstream_st* stream);

// Weights in a format, whose numbers are rounded to the rows' dtype, of 16 bits.
struct QuantizedMM {
  Dtype dtype;
  const void* rows;  // [R, M]
  WeightFormat format;
  const void* values;  // [E, N, bytes of M]; transposed, [E, M, bytes of N]. Rows of whole vectors
  const void* scales;  // [E, N or M, num_scales]
  const void* zeros;   // [E, N or M, (num_scales + 1) / 2] or null
  int64_t num_scales;
  bool transposed;
  Groups groups;
  int64_t depth, width;  // M, N
};
// out[r] = weights[e] @ rows[r] + bias[e], zero in other rows. bias: [E, N] or null, out: [R, N]
void quantized_mm(const QuantizedMM& call, const void* bias, void* out, CUstream_st* stream);

struct GroupedOuter {
  Dtype dtype;
  bool allow_tf32;
  const void* left;                  // [R, N], or gathered [T, N]
  const void* right;                 // [R, M], or gathered [T, M]
  bool gathers_left, gathers_right;  // not both
  Routes routes;
  Groups groups;
  int64_t left_width, right_width;  // N, M
};
// out[e] = sum over the group's rows of left[r] right[r]^T, [E, N, M]
void grouped_outer(const GroupedOuter& call, void* out, CUstream_st* stream);

// out[e] = sum over the group's rows of rows[r], weighed by the routes' weights or not
struct SumRows {
  Dtype dtype;
  const void* rows;  // [R, N], or gathered [T, N]
  bool gathers, weighs;
  Routes routes;
  Groups groups;
  int64_t width;  // N
};
// out: [E, N]
void sum_rows(const SumRows& call, void* out, CUstream_st* stream);

}  // namespace moe_ext::cuda
