// What dispatch, route_dot and dispatch_dot do with one row.

#pragma once

#include <cstring>

#include "common.h"

namespace moe_ext {

template <typename scalar_t>
void write_row(const scalar_t* token, const accumulate_t<scalar_t>* weight, scalar_t* row,
               int64_t hidden) {
  if (!weight) {
    std::memcpy(row, token, hidden * sizeof(scalar_t));
    return;
  }
  using T = accumulate_t<scalar_t>;
  const T w = *weight;
  for (int64_t h = 0; h < hidden; ++h) {
    row[h] = static_cast<scalar_t>(w * static_cast<T>(token[h]));
  }
}

// Zeroes the rows that no route has, and notes those whose route has another one.
template <typename scalar_t>
void zero_empty_rows(const int32_t* slots, const int32_t* sources, int64_t num_routes,
                     int64_t num_rows, scalar_t* rows, int64_t hidden, Fault& bad_source) {
  parallel_for(0, num_rows, grain(hidden * sizeof(scalar_t)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t route = sources[r];
      if (route == -1) {
        std::memset(static_cast<void*>(rows + r * hidden), 0, hidden * sizeof(scalar_t));
      } else if (!in_range(route, num_routes) || slots[route] != r) {
        bad_source.note(r);
      }
    }
  });
}

constexpr int64_t kLanes = 16;

// The sum runs in kLanes interleaved lanes, which the compiler turns into vector registers, and the
// lanes are added in their order.
template <typename scalar_t>
accumulate_t<scalar_t> dot(const scalar_t* a, const scalar_t* b, int64_t size) {
  using T = accumulate_t<scalar_t>;
  T lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += static_cast<T>(a[i + lane]) * static_cast<T>(b[i + lane]);
    }
  }
  for (; i < size; ++i) lanes[i % kLanes] += static_cast<T>(a[i]) * static_cast<T>(b[i]);
  T sum = 0;
  for (const T lane : lanes) sum += lane;
  return sum;
}

}  // namespace moe_ext
