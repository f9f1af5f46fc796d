// Plan: give every kept route a row.
//
// Routes queue for their expert, choice-major (all first choices, then all second ones) or
// token-major. A stable counting sort groups them by expert in the order of the queue; then each
// expert keeps the first C of its group, or with a priority the C largest, and hands out its rows
// from offsets[e] on, still in the order of the queue.

#include <cmath>
#include <vector>

#include "common.h"

namespace moe_ext {
namespace {

constexpr int64_t kChunk = 1 << 15;

// route = t * K + k. The queue visits routes by steps of K (choice-major) or of 1 (token-major).
class Queue {
 public:
  explicit Queue(const PlanArgs& a)
      : num_routes_(a.num_routes),
        step_(a.choice_major ? a.top_k : 1),
        lap_(a.choice_major ? a.num_tokens : a.num_routes) {}
  int64_t route_at(int64_t place) const { return place % lap_ * step_ + place / lap_; }
  int64_t next(int64_t route) const {
    route += step_;
    return route < num_routes_ ? route : route + 1 - num_routes_;
  }

 private:
  int64_t num_routes_, step_, lap_;
};

struct Queues {
  std::vector<int32_t> routes;  // [N], expert after expert, in the order of the queue
  std::vector<int64_t> starts;  // [E+1]
};

Queues group_by_expert(const int32_t* experts, const PlanArgs& a) {
  const int64_t N = a.num_routes, E = a.num_experts;
  const Queue queue(a);
  const int64_t num_chunks =
      std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), N / kChunk));
  const auto for_each_route = [&](int64_t chunk, const auto& body) {
    const int64_t begin = N * chunk / num_chunks, end = N * (chunk + 1) / num_chunks;
    if (begin == end) return;
    int64_t route = queue.route_at(begin);
    for (int64_t place = begin; place < end; ++place, route = queue.next(route)) {
      if (experts[route] >= 0) body(route, experts[route]);
    }
  };

  // cursors[chunk][e]: first how many routes the chunk has, then where its next one goes.
  std::vector<int64_t> cursors(num_chunks * E);
  parallel_for(0, num_chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      int64_t* count = cursors.data() + chunk * E;
      for_each_route(chunk, [&](int64_t, int32_t e) { ++count[e]; });
    }
  });
  Queues groups{std::vector<int32_t>(N), std::vector<int64_t>(E + 1)};
  int64_t total = 0;
  for (int64_t e = 0; e < E; ++e) {
    groups.starts[e] = total;
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      const int64_t count = cursors[chunk * E + e];
      cursors[chunk * E + e] = total;
      total += count;
    }
  }
  groups.starts[E] = total;
  parallel_for(0, num_chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      int64_t* cursor = cursors.data() + chunk * E;
      for_each_route(chunk, [&](int64_t route, int32_t e) {
        groups.routes[cursor[e]++] = static_cast<int32_t>(route);
      });
    }
  });
  return groups;
}

// Moves the `kept` routes of largest priority to the front of an expert's, still in the order of
// the queue. A NaN is below every number, equal ones go by the queue. What follows them is not
// used.
void keep_by_priority(int32_t* routes, int64_t count, int64_t kept, const float* priority) {
  std::vector<int32_t> ranking(count);
  for (int64_t i = 0; i < count; ++i) ranking[i] = static_cast<int32_t>(i);
  const auto before = [&](int32_t i, int32_t j) {
    const float p = priority[routes[i]], q = priority[routes[j]];
    if (p > q || (std::isnan(q) && !std::isnan(p))) return true;
    if (p < q || (std::isnan(p) && !std::isnan(q))) return false;
    return i < j;
  };
  std::nth_element(ranking.begin(), ranking.begin() + kept, ranking.end(), before);
  std::vector<char> keep(count);
  for (int64_t i = 0; i < kept; ++i) keep[ranking[i]] = 1;
  int64_t front = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (keep[i]) routes[front++] = routes[i];
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> plan_cpu(const Tensor& experts,
                                                    const OptionalTensor& priority,
                                                    int64_t num_experts,
                                                    std::optional<int64_t> capacity,
                                                    const std::string& order, int64_t align) {
  const PlanArgs a = plan_args(experts, priority, num_experts, capacity, order, align);
  const int64_t E = a.num_experts, R = a.num_rows;
  const int32_t* ids = const_data<int32_t>(a.experts);
  check_ids(Check("plan"), ids, a.num_routes, a.top_k, -1, E);
  Queues groups = group_by_expert(ids, a);

  Tensor slots = empty(a.experts, {a.num_tokens, a.top_k}, ScalarType::Int);
  Tensor sources = empty(a.experts, {R}, ScalarType::Int);
  Tensor offsets = empty(a.experts, {E + 1}, ScalarType::Int);
  Tensor load = empty(a.experts, {E}, ScalarType::Int);
  int32_t* slot = data<int32_t>(slots);
  int32_t* source = data<int32_t>(sources);
  int32_t* offset = data<int32_t>(offsets);
  int32_t* loads = data<int32_t>(load);
  std::fill_n(slot, a.num_routes, -1);
  std::fill_n(source, R, -1);

  int64_t next_row = 0;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t count = groups.starts[e + 1] - groups.starts[e];
    loads[e] = static_cast<int32_t>(count);
    offset[e] = static_cast<int32_t>(next_row);
    next_row += a.capacity ? *a.capacity : (count + a.align - 1) / a.align * a.align;
  }
  offset[E] = static_cast<int32_t>(next_row);

  const float* keys = data_or_null<float>(a.priority);
  parallel_for(0, E, grain(a.num_routes * 8 / E), [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      int32_t* routes = groups.routes.data() + groups.starts[e];
      const int64_t count = loads[e], kept = std::min<int64_t>(count, offset[e + 1] - offset[e]);
      if (keys && kept < count) keep_by_priority(routes, count, kept, keys);
      for (int64_t i = 0; i < kept; ++i) {
        slot[routes[i]] = static_cast<int32_t>(offset[e] + i);
        source[offset[e] + i] = routes[i];
      }
    }
  });
  return {slots, sources, offsets, load};
}

}  // namespace
}  // namespace moe_ext

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("plan", TORCH_BOX(&moe_ext::plan_cpu)); }
