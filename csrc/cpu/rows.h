// The routes and rows of dispatch, combine, route_dot, combine_backward and activate.

#pragma once

#include <cstring>

#include "common.h"
#include "machine/around_caches.h"

namespace moe_ext {

// Problems in slots and sources, and the first route that was dropped.
struct Found {
  Fault bad_slot, bad_source, dropped;
};

// The routes of an operator whose rows are scalar_t.
//
// slots and sources must be inverse to each other where they are not -1: then every row is written
// exactly once, by one thread. Checked route by route and row by row while they are read anyway:
// problems are noted, and `check` raises for the first one.
template <typename scalar_t>
struct Routes {
  const int32_t* slots;                   // [T, K]
  const int32_t* sources;                 // [R]
  const accumulate_t<scalar_t>* weights;  // [T, K] or null
  int64_t num_tokens, top_k, num_rows;

  explicit Routes(const RouteArgs& a)
      : slots(const_data<int32_t>(a.slots)),
        sources(const_data<int32_t>(a.sources)),
        weights(data_or_null<accumulate_t<scalar_t>>(a.weights)),
        num_tokens(a.num_tokens),
        top_k(a.top_k),
        num_rows(a.num_rows) {}

  int64_t size() const { return num_tokens * top_k; }

  // Whether a route has a row. One whose slot no source gives back has none.
  bool has_row(int64_t route, Found& found) const {
    const int64_t slot = slots[route];
    if (in_range(slot, num_rows) && sources[slot] == route) return true;
    (slot == -1 ? found.dropped : found.bad_slot).note(route);
    return false;
  }

  // Whether a row has a route; if so, it must be the route's row.
  bool has_route(int64_t row, Found& found) const {
    const int64_t route = sources[row];
    if (route == -1) return false;
    if (!in_range(route, size()) || slots[route] != row) found.bad_source.note(row);
    return true;
  }

  // Whether every row is known to have a route, once has_row was called for all routes: no two
  // routes share a row, and there are as many routes as rows.
  bool are_all_rows_owned(const Found& found) const {
    return size() == num_rows && !found.dropped.found() && !found.bad_slot.found();
  }

  // Zeroes the rows that no route has. Call has_row for all routes first.
  void zero_empty_rows(scalar_t* rows, int64_t hidden, Found& found) const {
    if (are_all_rows_owned(found)) return;
    parallel_for(0, num_rows, grain(hidden * sizeof(scalar_t)), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        if (!has_route(r, found)) {
          std::memset(static_cast<void*>(rows + r * hidden), 0, hidden * sizeof(scalar_t));
        }
      }
    });
  }

  // Raises for the first slot or source at fault.
  void check_all(const char* op) const {
    Found found;
    const int64_t at_a_time = grain(2 * sizeof(int32_t));
    parallel_for(0, size(), at_a_time, [&](int64_t begin, int64_t end) {
      for (int64_t route = begin; route < end; ++route) has_row(route, found);
    });
    const int64_t unknown = are_all_rows_owned(found) ? 0 : num_rows;
    parallel_for(0, unknown, at_a_time, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) has_route(r, found);
    });
    check(op, found);
  }

  void check(const char* op, const Found& found) const {
    const Check check(op);
    if (found.bad_slot.found()) {
      const int64_t route = found.bad_slot.first(), slot = slots[route];
      const int64_t t = route / top_k, k = route % top_k;
      if (slot < -1 || slot >= num_rows) {
        check.fail("slots must be in -1..R-1 with R = ", num_rows, ", got ", slot, " at [", t, ", ",
                   k, "]");
      }
      check.fail("slots and sources must be of one plan, got slot ", slot, " at [", t, ", ", k,
                 "], which sources gives to another route");
    }
    if (found.bad_source.found()) {
      const int64_t row = found.bad_source.first(), route = sources[row];
      if (route < -1 || route >= size()) {
        check.fail("sources must be in -1..T*K-1 with T*K = ", size(), ", got ", route, " at [",
                   row, "]");
      }
      check.fail("slots and sources must be of one plan, got route ", route, " at sources[", row,
                 "], which slots gives to another row");
    }
  }
};

// Writes rows of a result, on one thread; around the caches if it outgrows them.
template <typename scalar_t>
class RowWriter {
 public:
  // size: numbers of the result
  explicit RowWriter(int64_t size)
      : around_(outgrows_caches(size * static_cast<int64_t>(sizeof(scalar_t)))) {}
  RowWriter(const RowWriter&) = delete;
  RowWriter& operator=(const RowWriter&) = delete;
  ~RowWriter() {
    if (around_) finish_around();
  }

  MOE_EXT_INLINE void copy(const scalar_t* from, scalar_t* row, int64_t size) const {
    const int64_t bytes = size * sizeof(scalar_t);
    if (around_) {
      copy_around(reinterpret_cast<const char*>(from), reinterpret_cast<char*>(row), bytes);
    } else {
      std::memcpy(row, from, bytes);
    }
  }

  template <int bytes>
  MOE_EXT_INLINE void scale(const scalar_t* from, accumulate_t<scalar_t> weight, scalar_t* row,
                            int64_t size) const {
    using T = accumulate_t<scalar_t>;
    constexpr int64_t kPiece = 512;
    scalar_t piece[kPiece];
    for (int64_t i = 0; i < size; i += kPiece) {
      const int64_t width = std::min(kPiece, size - i);
      for_registers<bytes, T>(0, width,
                              [&](auto& values, int64_t j) __attribute__((always_inline)) {
                                load_as(values, from + i + j);
                                values *= weight;
                                store_as(values, piece + j);
                              });
      copy(piece, row + i, width);
    }
  }

 private:
  bool around_;
};

// Returns tokens [T, H]; combine.cpp defines it.
Tensor combine(const MoveArgs& a);

// Walks the pieces of routes' rows some way ahead of their use, to fetch them: rows lie anywhere.
// `group` routes one after the other are read side by side, a piece of each in turn.
template <typename scalar_t>
class PiecesAhead {
 public:
  PiecesAhead(const scalar_t* rows, const Routes<scalar_t>& routes, int64_t hidden, int64_t piece,
              int64_t first_route, int64_t group)
      : rows_(rows),
        routes_(routes),
        hidden_(hidden),
        piece_(piece),
        group_(group),
        route_(first_route),
        end_(first_route + group) {
    const int64_t size = std::min(piece, hidden);
    const int64_t bytes = std::max<int64_t>(1, size) * static_cast<int64_t>(sizeof(scalar_t));
    for (int64_t i = 0; i < kAhead; i += bytes) fetch();
  }

  // Asks for a piece.
  MOE_EXT_INLINE void fetch() {
    if (route_ >= routes_.size()) return;
    // Another thread may still have to check it.
    const int64_t slot = routes_.slots[route_];
    if (in_range(slot, routes_.num_rows)) {
      prefetch(rows_ + slot * hidden_ + at_, std::min(piece_, hidden_ - at_));
    }
    if (++route_ < end_) return;
    at_ += piece_;
    if (at_ < hidden_) {
      route_ -= group_;
    } else {
      at_ = 0;
      end_ += group_;
    }
  }

 private:
  static constexpr int64_t kAhead = 1 << 13;  // bytes
  const scalar_t* rows_;                      // [R, H]
  const Routes<scalar_t>& routes_;
  int64_t hidden_, piece_, group_, route_, end_, at_ = 0;
};

struct Nothing {
  void operator()() const {}
};

// The sum runs in kSumLanes interleaved lanes, whatever the registers, and these are added up by
// halves. `meanwhile` is called once for every kDotPiece numbers that are begun.
constexpr int64_t kSumLanes = 32, kDotPiece = 256;

template <int bytes, typename A, typename B, typename Meanwhile = Nothing>
MOE_EXT_INLINE accumulate_t<A> dot(const A* a, const B* b, int64_t size,
                                   const Meanwhile& meanwhile = {}) {
  using T = accumulate_t<A>;
  constexpr int64_t kWidth = bytes / sizeof(T);
  Vector<T, bytes> sums[kSumLanes / kWidth]{}, x, y;
  int64_t i = 0;
  for (int64_t begin = 0; begin < size; begin += kDotPiece) {
    meanwhile();
    for (const int64_t end = std::min(begin + kDotPiece, size); i + kSumLanes <= end;
         i += kSumLanes) {
      for (int64_t part = 0; part < kSumLanes / kWidth; ++part) {
        load_as(x, a + i + part * kWidth);
        load_as(y, b + i + part * kWidth);
        sums[part] += x * y;
      }
    }
  }
  // A constant bound lets GCC keep the sums in registers.
#pragma GCC unroll 16
  for (int64_t part = 0; part < kSumLanes / kWidth && i < size; ++part, i += kWidth) {
    if (size - i < kWidth) {
      load_first_as(x, a + i, size - i);
      load_first_as(y, b + i, size - i);
    } else {
      load_as(x, a + i);
      load_as(y, b + i);
    }
    sums[part] += x * y;
  }
  T lanes[kSumLanes];
  for (int64_t part = 0; part < kSumLanes / kWidth; ++part)
    store(sums[part], lanes + part * kWidth);
  for (int64_t half = kSumLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

}  // namespace moe_ext
