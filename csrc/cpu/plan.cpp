// Plan: give every kept route a row.
//
// Routes queue for their expert, choice-major (all first choices, then all second ones) or
// token-major. One pass counts the routes of every expert; a second one hands out its rows in turn,
// from offsets[e] on, until none is left. With a priority the routes that a full expert does not
// keep leave the queue in between.

#include <cmath>
#include <vector>

#include "common.h"
#include "machine/vector.h"

namespace moe_ext {
namespace {

// route = t * K + k. A choice-major queue is K queues one behind the other. One thread takes them
// in turn. Where there is work for more, each takes a chunk of tokens, and in it all queues side by
// side, in the order of memory, by numbers of their own.
class Queue {
 public:
  explicit Queue(const PlanArgs& a)
      : num_tokens_(a.num_tokens),
        top_k_(a.top_k),
        num_experts_(a.num_experts),
        stride_((a.num_experts + kLine - 1) / kLine * kLine) {
    const int64_t queues = a.choice_major ? a.top_k : 1;
    // A chunk's numbers are to be few beside its routes.
    const int64_t least = std::max<int64_t>(kChunk, 4 * queues * a.num_experts);
    num_chunks_ = std::min<int64_t>(torch::stable::get_num_threads(), a.num_routes / least);
    if (num_chunks_ > 1) {
      num_queues_ = queues;
    } else {
      num_chunks_ = 1;
      laps_ = queues;
    }
  }

  int64_t num_chunks() const { return num_chunks_; }
  // Numbers for every expert, chunk and queue. No two chunks' are on one cache line.
  int64_t size() const { return num_chunks_ * chunk_size(); }
  int64_t chunk_size() const { return num_queues_ * stride_ + kLine; }

  // Calls body(chunk) for every chunk, side by side.
  template <typename Body>
  void for_each_chunk(const Body& body) const {
    parallel_for(0, num_chunks_, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) body(chunk);
    });
  }

  // Calls body(route, the first number of its queue) for every route of a chunk; those of a queue
  // in their order. The body is a copy and its captures are too: else they would be read again
  // after every write.
  template <typename Body>
  void for_each_route(int64_t chunk, Body body) const {
    walk(chunk, laps_, body);
  }

  // The same in the order of memory.
  template <typename Body>
  void for_each_route_of_memory(int64_t chunk, Body body) const {
    walk(chunk, 1, body);
  }

  // Calls body(e, i) for the i-th number of every expert e, in the order of the queue.
  template <typename Body>
  void for_each_number(Body body) const {
    for (int64_t queue = 0; queue < num_queues_; ++queue) {
      for (int64_t chunk = 0; chunk < num_chunks_; ++chunk) {
        const int64_t first = chunk * chunk_size() + queue * stride_;
        for (int64_t e = 0; e < num_experts_; ++e) body(e, first + e);
      }
    }
  }

 private:
  template <typename Body>
  MOE_EXT_INLINE void walk(int64_t chunk, int64_t laps, Body body) const {
    const int64_t begin = num_tokens_ * chunk / num_chunks_ * top_k_;
    const int64_t end = num_tokens_ * (chunk + 1) / num_chunks_ * top_k_;
    if (num_queues_ == 1) {
      for (int64_t lap = 0; lap < laps; ++lap) {
        for (int64_t route = begin + lap; route < end; route += laps) body(route, 0);
      }
      return;
    }
    const int64_t step = stride_, all = num_queues_ * stride_;
    int64_t first = 0;
    for (int64_t route = begin; route < end; ++route) {
      body(route, first);
      first += step;
      if (first == all) first = 0;
    }
  }

  static constexpr int64_t kChunk = 1 << 14, kLine = 16;
  int64_t num_tokens_, top_k_, num_experts_, stride_, num_queues_ = 1, laps_ = 1, num_chunks_;
};

// The routes of every number's chunk and queue that ask for its expert.
std::vector<int32_t> count(const Queue& queue, const int32_t* expert_ids, const PlanArgs& a) {
  const int64_t num_experts = a.num_experts;
  std::vector<int32_t> counts(queue.size());
  std::atomic<bool> all_in_range{true};
  queue.for_each_chunk([&](int64_t chunk) {
    int32_t* const of_chunk = counts.data() + chunk * queue.chunk_size();
    bool is_in_range = true;
    queue.for_each_route_of_memory(
        chunk, [=, &is_in_range](int64_t route, int64_t first) __attribute__((always_inline)) {
          const int64_t e = expert_ids[route];
          if (in_range(e, num_experts)) {
            ++of_chunk[first + e];
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
// these rows alone, and every slot. `is_enough`: there is a row for every route with an expert.
template <bool is_enough>
void hand_out(const Queue& queue, const int32_t* expert_ids, const std::vector<int32_t>& counts,
              int64_t num_experts, const int32_t* offsets, int32_t* slots, int32_t* sources) {
  struct Rows {  // Those that may be left. 64 bits spare a conversion for every route.
    int64_t next, end;
  };
  std::vector<Rows> rows(counts.size());
  std::vector<int64_t> next(offsets, offsets + num_experts);
  queue.for_each_number([&](int64_t e, int64_t i) {
    const int64_t end = offsets[e + 1];
    rows[i] = {std::min(next[e], end), end};
    next[e] += counts[i];
  });
  queue.for_each_chunk([&](int64_t chunk) {
    Rows* const of_chunk = rows.data() + chunk * queue.chunk_size();
    queue.for_each_route(chunk, [=](int64_t route, int64_t first) __attribute__((always_inline)) {
      const int64_t e = expert_ids[route];
      int64_t row = -1;
      if (e >= 0 && (is_enough || of_chunk[first + e].next < of_chunk[first + e].end)) {
        row = of_chunk[first + e].next;
        of_chunk[first + e].next = row + 1;
        sources[row] = static_cast<int32_t>(route);
      }
      slots[route] = static_cast<int32_t>(row);
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
  hand_out<true>(queue, expert_ids, counts, E, starts.data(), slots.data(), routes.data());

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

std::tuple<Tensor, Tensor, Tensor, Tensor> plan_cpu(const PlanArgs& a) {
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

  std::fill_n(loads, E, 0);
  queue.for_each_number([&](int64_t e, int64_t i) { loads[e] += counts[i]; });
  int64_t next_row = 0;
  for (int64_t e = 0; e < E; ++e) {
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
  const auto give = a.capacity && kept.empty() ? hand_out<false> : hand_out<true>;
  give(queue, ids, counts, E, offset, data<int32_t>(slots), source);
  return {slots, sources, offsets, load};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("plan", boxed<plan_args, plan_cpu>); }

}  // namespace moe_ext
