// Tokens side by side, one in each lane of a vector: no lane looks at another one's.
//
//   logits [T, E]            values [E, kLanes]
//   t0 e0 e1 e2 ..    ->     e0: t0 t1 t2 ..
//   t1 e0 e1 e2 ..           e1: t0 t1 t2 ..

#pragma once

#include <limits>

#include "common.h"
#include "machine/vector.h"

namespace moe_ext {

constexpr int64_t kLanes = 16;

template <typename T>
struct alignas(64) Lanes {
  T at[kLanes];
};

// Integers that order as the numbers do: NaN above all, -0 as 0.
template <typename T>
using key_t = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// Squares of four rows and four columns are turned in registers.
constexpr int64_t kSquare = 4;

// Rows of a matrix [n, E] side by side. Lanes without a row repeat the last one.
template <typename T, typename scalar_t>
MOE_EXT_INLINE void read_rows(const scalar_t* rows, int64_t n, int64_t num_experts,
                              Lanes<T>* values) {
  for (int64_t lane = 0; lane < kLanes; lane += kSquare) {
    const scalar_t* row[kSquare];
    for (int64_t i = 0; i < kSquare; ++i) row[i] = rows + std::min(lane + i, n - 1) * num_experts;
    int64_t e = 0;
    for (; e + kSquare <= num_experts; e += kSquare) {
      Vector<T, kSquare * sizeof(T)> square[kSquare];
      for (int64_t i = 0; i < kSquare; ++i) load_as(square[i], row[i] + e);
      transpose(square);
      for (int64_t j = 0; j < kSquare; ++j) store(square[j], values[e + j].at + lane);
    }
    for (; e < num_experts; ++e) {
      for (int64_t i = 0; i < kSquare; ++i) values[e].at[lane + i] = static_cast<T>(row[i][e]);
    }
  }
}

template <typename T>
MOE_EXT_INLINE void write_rows(const Lanes<T>* values, int64_t n, int64_t num_experts, T* rows) {
  for (int64_t lane = 0; lane < n; lane += kSquare) {
    const int64_t height = std::min(kSquare, n - lane);
    T* row = rows + lane * num_experts;
    int64_t e = 0;
    for (; height == kSquare && e + kSquare <= num_experts; e += kSquare) {
      Vector<T, kSquare * sizeof(T)> square[kSquare];
      for (int64_t j = 0; j < kSquare; ++j) load(square[j], values[e + j].at + lane);
      transpose(square);
      for (int64_t i = 0; i < kSquare; ++i) store(square[i], row + i * num_experts + e);
    }
    for (; e < num_experts; ++e) {
      for (int64_t i = 0; i < height; ++i) row[i * num_experts + e] = values[e].at[lane + i];
    }
  }
}

template <typename T>
MOE_EXT_INLINE void make_keys(const Lanes<T>* values, int64_t num_experts, Lanes<key_t<T>>* keys) {
  using Key = key_t<T>;
  for (int64_t e = 0; e < num_experts; ++e) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const T value = values[e].at[lane] + T{0};
      Key bits;
      std::memcpy(&bits, &value, sizeof(bits));
      constexpr Key kLargest = std::numeric_limits<Key>::max();
      const Key key = bits < 0 ? bits ^ kLargest : bits;
      keys[e].at[lane] = value == value ? key : kLargest;
    }
  }
}

// The ids of the K largest keys of every lane, equal ones by lower id. Takes the keys.
template <int bytes, typename Key>
MOE_EXT_INLINE void choose(Lanes<Key>* keys, int64_t num_experts, int64_t top_k,
                           Lanes<Key>* chosen) {
  using V = Vector<Key, bytes>;
  constexpr int64_t kWidth = bytes / sizeof(Key);
  // No key is as small.
  constexpr Key kNone = std::numeric_limits<Key>::min();
  // Four parts of the experts, so that no comparison waits for the one before.
  constexpr int64_t kParts = 4;
  const Key part = static_cast<Key>(num_experts / kParts);
  for (int64_t k = 0; k < top_k; ++k) {
    for (int64_t lane = 0; lane < kLanes; lane += kWidth) {
      V best[kParts], id[kParts];
      for (int64_t p = 0; p < kParts; ++p) best[p] = V{} + kNone, id[p] = V{};
      const auto look_at = [&](int64_t p, Key e) __attribute__((always_inline)) {
        V key;
        load(key, keys[e].at + lane);
        const V larger = key > best[p];
        best[p] = larger ? key : best[p];
        id[p] = larger ? V{} + e : id[p];
      };
      for (Key e = 0; e < part; ++e) {
        for (int64_t p = 0; p < kParts; ++p) look_at(p, static_cast<Key>(p * part + e));
      }
      for (Key e = kParts * part; e < num_experts; ++e) look_at(kParts - 1, e);
      for (int64_t p = 1; p < kParts; ++p) {
        const V larger = best[p] > best[0];
        best[0] = larger ? best[p] : best[0];
        id[0] = larger ? id[p] : id[0];
      }
      store(id[0], chosen[k].at + lane);
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) keys[chosen[k].at[lane]].at[lane] = kNone;
  }
}

}  // namespace moe_ext
