// Plans for the tests of kernels that need one.

#pragma once

#include "testing.h"

namespace testing {

struct PlanCase {
  int64_t T, K;
  int E;
  int64_t capacity = -1;  // dropless
  int64_t align = 1;
  bool choice_major = true, priority = false, skewed = false;
};

struct MadePlan {
  Array<int32_t> slots, sources, offsets, load;

  Routes routes(const PlanCase& c, const void* weights) {
    return {slots.data(), sources.data(), weights, c.T, c.K, sources.size()};
  }
  int64_t row_of(int64_t route) {
    const int64_t slot = slots[route];
    return slot >= 0 && slot < sources.size() && sources[slot] == route ? slot : -1;
  }
};

inline int64_t rows_of(const PlanCase& c) {
  if (c.capacity >= 0) return c.E * c.capacity;
  const int64_t N = c.T * c.K;
  return c.align * ((N + std::min<int64_t>(c.E, N) * (c.align - 1)) / c.align);
}

inline MadePlan make_plan(const PlanCase& c, Array<int32_t>& expert_ids, Array<float>& priority) {
  for (int64_t i = 0; i < expert_ids.size(); ++i) {
    // A few ids that are no expert's.
    expert_ids[i] = static_cast<int32_t>(c.skewed ? i % 2 : below(c.E + 2) - 1);
    const float special[] = {NAN, -NAN, INFINITY, -INFINITY, -0.0f};
    priority[i] = below(6) == 0 ? special[below(5)] : static_cast<float>(below(6) - 2);
  }
  MadePlan made{Array<int32_t>(c.T * c.K), Array<int32_t>(rows_of(c)), Array<int32_t>(c.E + 1),
                Array<int32_t>(c.E)};
  Array<int32_t> scratch(plan_scratch(c.T * c.K, c.E, c.priority));
  plan({expert_ids.data(), c.priority ? priority.data() : nullptr, c.T, c.K, c.E, c.capacity,
        c.choice_major, c.align, rows_of(c), made.slots.data(), made.sources.data(),
        made.offsets.data(), made.load.data(), scratch.data()},
       nullptr);
  return made;
}

struct RowsCase {
  PlanCase plan;
  int64_t H;
  bool consistent = true;
  int64_t shift = 0;  // of the tokens' address, in elements
};

// Where it is not consistent, slots and sources belong to no plan.
inline MadePlan plan_of(const RowsCase& c) {
  const int64_t N = c.plan.T * c.plan.K, R = rows_of(c.plan);
  Array<int32_t> expert_ids(N);
  Array<float> priority(N);
  MadePlan made = make_plan(c.plan, expert_ids, priority);
  if (!c.consistent) {
    for (int64_t i = 0; i < N; ++i) made.slots[i] = static_cast<int32_t>(below(R + 4) - 2);
    for (int64_t i = 0; i < R; ++i) made.sources[i] = static_cast<int32_t>(below(N + 4) - 2);
  }
  return made;
}

}  // namespace testing
