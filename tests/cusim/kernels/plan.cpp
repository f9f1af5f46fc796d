// Plans, beside plain C++.

#include "plans.h"

namespace testing {
namespace {

void test_plan(const PlanCase& c) {
  Array<int32_t> expert_ids(c.T * c.K);
  Array<float> priority(c.T * c.K);
  MadePlan made = make_plan(c, expert_ids, priority);

  std::vector<std::vector<int64_t>> waiting(c.E);
  for (int64_t place = 0; place < c.T * c.K; ++place) {
    const int64_t route = c.choice_major ? place % c.T * c.K + place / c.T : place;
    const int32_t e = expert_ids[route];
    if (e >= 0 && e < c.E) waiting[e].push_back(route);
  }
  std::vector<int64_t> slots(c.T * c.K, -1), sources(rows_of(c), -1);
  int64_t row = 0;
  for (int e = 0; e < c.E; ++e) {
    CHECK(made.offsets[e] == row);
    CHECK(made.load[e] == static_cast<int64_t>(waiting[e].size()));
    const int64_t size = static_cast<int64_t>(waiting[e].size());
    std::vector<int64_t> kept(size);  // places in the queue
    std::iota(kept.begin(), kept.end(), 0);
    if (c.capacity >= 0 && size > c.capacity) {
      if (c.priority) {
        std::stable_sort(kept.begin(), kept.end(), [&](int64_t a, int64_t b) {
          const float p = priority[waiting[e][a]], q = priority[waiting[e][b]];
          return p > q || (std::isnan(q) && !std::isnan(p));
        });
      }
      kept.resize(c.capacity);
      std::sort(kept.begin(), kept.end());
    }
    int64_t next = row;
    for (const int64_t place : kept) {
      sources[next] = waiting[e][place];
      slots[waiting[e][place]] = next++;
    }
    row += c.capacity >= 0 ? c.capacity : (size + c.align - 1) / c.align * c.align;
  }
  CHECK(made.offsets[c.E] == row);
  for (int64_t i = 0; i < c.T * c.K; ++i) CHECK(made.slots[i] == slots[i]);
  for (int64_t i = 0; i < rows_of(c); ++i) CHECK(made.sources[i] == sources[i]);
}

void test_plans() {
  const PlanCase cases[] = {
      {0, 2, 3},
      {1, 1, 1, 1, 1, false, true},
      {30, 2, 4, 2000},  // few routes and many rows
      {33, 3, 5, -1, 8},
      {40, 2, 70, 1},
      {200, 2, 3, 30, 1, true, true},
      {200, 2, 3, 0, 1, false, true},
      {600, 1, 2, 900, 1, false, true, true},
      {700, 3, 2, 520, 1, true, true, true},
      {2700, 2, 9, 300},
      {2700, 2, 40, -1, 16, false},
      {2700, 2, 100},
      {2700, 2, 9, 310, 1, true, true},
      {4500, 2, 2, 4400, 1, false, true, true},
      {60, 2, 1024},
      // Few priorities, so that what is kept ends with the last of equal ones here and there.
      {90, 2, 30, 3, 1, true, true},
      // More experts than threads, and more chunks than are read at once.
      {2700, 2, 600},
      {9000, 2, 300, -1, 8, false}};
  for (const PlanCase& c : cases) {
    context = "plan T" + std::to_string(c.T) + " E" + std::to_string(c.E);
    test_plan(c);
  }
}

const Registration registration("plan", test_plans,
                                {{"plan_count", 256}, {"plan_place", 256}, {"plan_keep", 512}});

}  // namespace
}  // namespace testing
