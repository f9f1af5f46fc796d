// Plan: give every kept route a row.
//
// Routes queue for their expert, choice-major (all first choices, then all second ones) or
// token-major. One pass counts the routes of every expert; a second one, down the queue, hands out
// its rows in turn, from offsets[e] on, until none is left. With a priority the routes that a full
// expert does not keep leave the queue in between. Threads take a chunk of the queue each.

#include <cmath>
#include <vector>

#include "common.h"

namespace moe_ext {
namespace {

constexpr int64_t kChunk = 1 << 16;

// route = t * K + k. The queue visits routes by steps of K (choice-major) or of 1 (token-major).
class Queue {
 public:
  explicit Queue(const PlanArgs& a)
      : num_routes_(a.num_routes),
        step_(a.choice_major ? a.top_k : 1),
        lap_(a.choice_major ? a.num_tokens : a.num_routes),
        num_chunks_(std::max<int64_t>(
            1, std::min<int64_t>(torch::stable::get_num_threads(), num_routes_ / kChunk))),
        stride_((a.num_experts + 15) / 16 * 16) {}

  int64_t num_chunks() const { return num_chunks_; }
  // Numbers of a chunk's experts, on cache lines of their own.
  int64_t stride() const { return stride_; }

  // Calls body(chunk) for every chunk, side by side.
  template <typename Body>
  void for_each_chunk(const Body& body) const {
    parallel_for(0, num_chunks_, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) body(chunk);
    });
  }

  // Calls body(route) for every route of a chunk, in the order of the queue. The body is a copy and
  // its captures are too: else they would be read again after every write.
  template <typename Body>
  void for_each_route(int64_t chunk, Body body) const {
    int64_t place = num_routes_ * chunk / num_chunks_;
    const int64_t end = num_routes_ * (chunk + 1) / num_chunks_, step = step_;
    while (place < end) {
      const int64_t lap = place / lap_, until = std::min((lap + 1) * lap_, end);
      int64_t route = place % lap_ * step + lap;
      for (; place < until; ++place, route += step) body(route);
    }
  }

  // The same in any order: that of memory where a chunk has all routes.
  template <typename Body>
  void for_each_route_in_any_order(int64_t chunk, Body body) const {
    if (num_chunks_ > 1) return for_each_route(chunk, body);
    for (int64_t route = 0; route < num_routes_; ++route) body(route);
  }

 private:
  int64_t num_routes_, step_, lap_, num_chunks_, stride_;
};

// [chunks, stride]: the routes of every chunk that ask for every expert.
std::vector<int32_t> count(const Queue& queue, const int32_t* expert_ids, const PlanArgs& a) {
  const int64_t num_experts = a.num_experts;
  std::vector<int32_t> counts(queue.num_chunks() * queue.stride());
  std::atomic<bool> all_in_range{true};
  queue.for_each_chunk([&](int64_t chunk) {
    int32_t* const of_chunk = counts.data() + chunk * queue.stride();
    bool is_in_range = true;
    queue.for_each_route_in_any_order(chunk, [=, &is_in_range](int64_t route) {
      const int64_t e = expert_ids[route];
      if (in_range(e, num_experts)) {
        ++of_chunk[e];
      } else if (e != -1) {
        is_in_range = false;
      }
    });
    if (!is_in_range) all_in_range = false;
  });
  if (!all_in_range) check_ids(Check("plan"), expert_ids, a.num_routes, a.top_k, -1, num_experts);
  return counts;
}

// Rows offsets[e] to offsets[e + 1] go to the routes of expert e in turn. Writes the sources of
// these rows alone, and every slot.
void hand_out(const Queue& queue, const int32_t* expert_ids, const std::vector<int32_t>& counts,
              int64_t num_experts, const int32_t* offsets, int32_t* slots, int32_t* sources) {
  struct Rows {
    int32_t next, end;  // those that may be left
  };
  std::vector<Rows> rows(counts.size());
  for (int64_t e = 0; e < num_experts; ++e) {
    int64_t row = offsets[e];
    for (int64_t chunk = 0; chunk < queue.num_chunks(); ++chunk) {
      const int64_t i = chunk * queue.stride() + e;
      rows[i] = {static_cast<int32_t>(std::min<int64_t>(row, offsets[e + 1])), offsets[e + 1]};
      row += counts[i];
    }
  }
  queue.for_each_chunk([&](int64_t chunk) {
    Rows* const of_chunk = rows.data() + chunk * queue.stride();
    queue.for_each_route(chunk, [=](int64_t route) {
      const int32_t e = expert_ids[route];
      int32_t row = -1;
      if (e >= 0 && of_chunk[e].next < of_chunk[e].end) {
        row = of_chunk[e].next++;
        sources[row] = static_cast<int32_t>(route);
      }
      slots[route] = row;
    });
  });
}

// The experts of all routes, -1 for those that a full expert does not keep: it keeps the `capacity`
// ones of largest priority, a NaN below every number, equal ones by the queue.
std::vector<int32_t> without_dropped(const Queue& queue, const int32_t* expert_ids,
                                     const PlanArgs& a, const std::vector<int32_t>& counts,
                                     const int32_t* load) {
  const int64_t E = a.num_experts, N = a.num_routes, capacity = *a.capacity;
  const float* priority = const_data<float>(*a.priority);
  std::vector<int32_t> kept(expert_ids, expert_ids + N), slots(N), routes(N), starts(E + 1);
  for (int64_t e = 0; e < E; ++e) starts[e + 1] = starts[e] + load[e];
  hand_out(queue, expert_ids, counts, E, starts.data(), slots.data(), routes.data());

  parallel_for(0, E, grain(N * 8 / E), [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      if (load[e] <= capacity) continue;
      const auto before = [&](int32_t i, int32_t j) {
        const float p = priority[routes[i]], q = priority[routes[j]];
        if (p > q || (std::isnan(q) && !std::isnan(p))) return true;
        if (p < q || (std::isnan(p) && !std::isnan(q))) return false;
        return i < j;
      };
      std::vector<int32_t> places(load[e]);
      for (int32_t i = 0; i < load[e]; ++i) places[i] = starts[e] + i;
      const auto first_dropped = places.begin() + capacity;
      std::nth_element(places.begin(), first_dropped, places.end(), before);
      std::for_each(first_dropped, places.end(), [&](int32_t i) { kept[routes[i]] = -1; });
    }
  });
  return kept;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> plan_cpu(const Tensor& expert_ids,
                                                    const OptionalTensor& priority,
                                                    int64_t num_experts,
                                                    std::optional<int64_t> capacity,
                                                    const std::string& order, int64_t align) {
  const PlanArgs a = plan_args(expert_ids, priority, num_experts, capacity, order, align);
  const int64_t E = a.num_experts, R = a.num_rows;
  const int32_t* ids = const_data<int32_t>(a.expert_ids);
  const Queue queue(a);
  std::vector<int32_t> counts = count(queue, ids, a);

  Tensor slots = empty(a.expert_ids, {a.num_tokens, a.top_k}, ScalarType::Int);
  Tensor sources = empty(a.expert_ids, {R}, ScalarType::Int);
  Tensor offsets = empty(a.expert_ids, {E + 1}, ScalarType::Int);
  Tensor load = empty(a.expert_ids, {E}, ScalarType::Int);
  int32_t* source = data<int32_t>(sources);
  int32_t* offset = data<int32_t>(offsets);
  int32_t* loads = data<int32_t>(load);

  int64_t next_row = 0;
  for (int64_t e = 0; e < E; ++e) {
    loads[e] = 0;
    for (int64_t chunk = 0; chunk < queue.num_chunks(); ++chunk)
      loads[e] += counts[chunk * queue.stride() + e];
    const int64_t rows = a.capacity ? *a.capacity : (loads[e] + a.align - 1) / a.align * a.align;
    offset[e] = static_cast<int32_t>(next_row);
    next_row += rows;
    std::fill(source + next_row - rows + std::min<int64_t>(loads[e], rows), source + next_row, -1);
  }
  offset[E] = static_cast<int32_t>(next_row);
  std::fill(source + next_row, source + R, -1);

  std::vector<int32_t> kept;
  if (a.priority && a.capacity) {
    kept = without_dropped(queue, ids, a, counts, loads);
    counts = count(queue, kept.data(), a);
    ids = kept.data();
  }
  hand_out(queue, ids, counts, E, offset, data<int32_t>(slots), source);
  return {slots, sources, offsets, load};
}

}  // namespace
}  // namespace moe_ext

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("plan", TORCH_BOX(&moe_ext::plan_cpu)); }
