// Grouped matrix products: one GEMM per expert on the rows that routes own.
//
//   grouped_mm:     out[r, :]    = weights[e] @ rows[r, :]                    r in the rows of e
//   grouped_outer:  out[e, :, :] = sum over those r of left[r, :] ⊗ right[r, :]
//
// The rows of e are offsets[e] and the min(load[e], offsets[e+1] - offsets[e]) after it. All other
// rows are never read and come out zero. The GEMMs are torch's.

#include <array>

#include "common.h"

namespace moe_ext {
namespace {

// Without instructions for a 16-bit type torch multiplies it some thirty times slower than float32;
// then the operands of one expert at a time are widened. MOE_EXT_WIDEN_16BIT widens always: for
// tests on a CPU that has the instructions.
bool multiplies_natively([[maybe_unused]] ScalarType dtype) {
#if defined(MOE_EXT_WIDEN_16BIT)
  return false;
#elif defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (dtype == ScalarType::BFloat16) return __builtin_cpu_supports("avx512bf16");
#if !defined(__clang__) && __GNUC__ >= 12
  if (dtype == ScalarType::Half) return __builtin_cpu_supports("avx512fp16");
#else
  if (dtype == ScalarType::Half) return false;
#endif
#endif
  return true;
}

void mm_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

void multiply_into(Tensor& out, const Tensor& a, const Tensor& b) {
  const ScalarType dtype = out.scalar_type();
  if (dtype == ScalarType::Float || dtype == ScalarType::Double || multiplies_natively(dtype)) {
    mm_into(out, a, b);
    return;
  }
  const Tensor wide_a = torch::stable::to(a, ScalarType::Float);
  const Tensor wide_b = torch::stable::to(b, ScalarType::Float);
  const Tensor wide = empty(out, {out.size(0), out.size(1)}, ScalarType::Float);
  mm_into(wide, wide_a, wide_b);
  torch::stable::copy_(out, wide);
}

// Calls body(e, begin, end) with the rows that routes of e own, and gap(begin, end) with all other
// rows, in order.
template <typename Body, typename Gap>
void for_each_group(const Check& check, const Groups& groups, int64_t num_rows, const Body& body,
                    const Gap& gap) {
  const int32_t* offsets = const_data<int32_t>(groups.offsets);
  const int32_t* load = const_data<int32_t>(groups.load);
  int64_t previous = 0;
  for (int64_t e = 0; e <= groups.num_experts; ++e) {
    if (offsets[e] < previous || offsets[e] > num_rows || (e == 0 && offsets[e] != 0)) {
      check.fail("offsets must rise from 0 to at most R = ", num_rows, ", got ", offsets[e],
                 " at [", e, "]");
    }
    previous = offsets[e];
  }
  int64_t done = 0;
  for (int64_t e = 0; e < groups.num_experts; ++e) {
    const int64_t begin = offsets[e], room = offsets[e + 1] - offsets[e];
    if (load[e] < 0) check.fail("load must not be negative, got ", load[e], " at [", e, "]");
    const int64_t end = begin + std::min<int64_t>(load[e], room);
    if (done < begin) gap(done, begin);
    body(e, begin, end);
    done = end;
  }
  if (done < num_rows) gap(done, num_rows);
}

Tensor rows_of(const Tensor& tensor, int64_t begin, int64_t end) {
  Tensor base = tensor;
  return torch::stable::narrow(base, 0, begin, end - begin);
}

Tensor grouped_mm_cpu(const Tensor& rows, const Tensor& weights, const Tensor& offsets,
                      const Tensor& load) {
  const GroupedMMArgs a = grouped_mm_args(rows, weights, offsets, load);
  Tensor out = empty(a.rows, {a.num_rows, a.out_width}, a.rows.scalar_type());
  for_each_group(
      Check("grouped_mm"), a.groups, a.num_rows,
      [&](int64_t e, int64_t begin, int64_t end) {
        if (begin == end) return;
        Tensor block = rows_of(out, begin, end);
        const Tensor weight =
            torch::stable::transpose(torch::stable::select(a.weights, 0, e), 0, 1);
        multiply_into(block, rows_of(a.rows, begin, end), weight);
      },
      [&](int64_t begin, int64_t end) {
        Tensor gap = rows_of(out, begin, end);
        torch::stable::zero_(gap);
      });
  return out;
}

Tensor grouped_outer_cpu(const Tensor& left, const Tensor& right, const Tensor& offsets,
                         const Tensor& load) {
  const GroupedOuterArgs a = grouped_outer_args(left, right, offsets, load);
  Tensor out =
      empty(a.left, {a.groups.num_experts, a.left_width, a.right_width}, a.left.scalar_type());
  for_each_group(
      Check("grouped_outer"), a.groups, a.num_rows,
      [&](int64_t e, int64_t begin, int64_t end) {
        Tensor block = torch::stable::select(out, 0, e);
        if (begin == end) {
          torch::stable::zero_(block);
          return;
        }
        const Tensor left_rows = torch::stable::transpose(rows_of(a.left, begin, end), 0, 1);
        multiply_into(block, left_rows, rows_of(a.right, begin, end));
      },
      [](int64_t, int64_t) {});
  return out;
}

}  // namespace
}  // namespace moe_ext

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("grouped_mm", TORCH_BOX(&moe_ext::grouped_mm_cpu));
  m.impl("grouped_outer", TORCH_BOX(&moe_ext::grouped_outer_cpu));
}
