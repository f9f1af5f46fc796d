// The results of warp operations, those of tensor cores among them.

#pragma once

#include <algorithm>
#include <cmath>

#include "tensor.h"
#include "threads.h"

namespace cusim {
namespace {

constexpr unsigned kWholeWarp = 0xffffffff;

// Gives every lane its words of four matrices of 8 lines.
void load_matrices(const Thread* lanes) {
  std::uint16_t numbers[32][8];
  for (int lane = 0; lane < 32; ++lane) {
    const uint4& line = reinterpret_cast<const MatrixLine*>(lanes[lane].wait.value)->line;
    const unsigned words[] = {line.x, line.y, line.z, line.w};
    for (int i = 0; i < 8; ++i) numbers[lane][i] = std::uint16_t(words[i / 2] >> i % 2 * 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *reinterpret_cast<const MatrixLine*>(lanes[lane].wait.value);
    const int row = lane / 4, first = lane % 4 * 2;
    for (int m = 0; m < 4; ++m) {
      const auto* matrix = numbers + 8 * m;
      const unsigned low = mine.transposed ? matrix[first][row] : matrix[row][first];
      const unsigned high = mine.transposed ? matrix[first + 1][row] : matrix[row][first + 1];
      mine.out[m] = low | high << 16;
    }
  }
}

// The numbers of a word, as tensor cores take them.
template <typename T>
void widen_word(unsigned word, float* out) {
  if constexpr (std::is_same_v<T, float>) {
    out[0] = bits_as<float>(word & 0xffffe000u);
  } else {
    for (int i = 0; i < 2; ++i) {
      out[i] = static_cast<float>(bits_as<T>(static_cast<std::uint16_t>(word >> 16 * i)));
    }
  }
}

// As tensor cores round a sum. One less in its bits is the next float towards zero.
float towards_zero(double x) {
  const auto nearest = static_cast<float>(x);
  return std::fabs(double{nearest}) > std::fabs(x)
             ? bits_as<float>(bits_as<std::uint32_t>(nearest) - 1)
             : nearest;
}

// The item-th product that all lanes of a warp compute together: fragments as
// csrc/cuda/products/tensor.cuh has them.
template <typename T>
void multiply_fragments(const Thread* lanes, int item) {
  constexpr int kOfWord = 4 / sizeof(T), kDepth = 8 * kOfWord;
  float left[16][kDepth], right[kDepth][8];
  const auto part_of = [&](int lane) {
    return &reinterpret_cast<const MultiplicationList*>(lanes[lane].wait.value)->items[item];
  };
  for (int lane = 0; lane < 32; ++lane) {
    const Multiplication& part = *part_of(lane);
    const int row = lane / 4, first = lane % 4 * kOfWord;
    for (int i = 0; i < 4; ++i) {
      widen_word<T>(part.left[i], &left[row + i % 2 * 8][first + i / 2 * (kDepth / 2)]);
    }
    for (int i = 0; i < 2; ++i) {
      float numbers[kOfWord];
      widen_word<T>(part.right[i], numbers);
      for (int n = 0; n < kOfWord; ++n) right[first + n + i * (kDepth / 2)][row] = numbers[n];
    }
  }
  double sums[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      for (int column = 0; column < 8; ++column)
        sums[row][column] += double(left[row][k]) * right[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* sum = part_of(lane)->sum;
    for (int i = 0; i < 4; ++i) {
      sum[i] = towards_zero(sum[i] + sums[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
    }
  }
}

void multiply_fragments(const Thread* lanes) {
  const auto* list = reinterpret_cast<const MultiplicationList*>(lanes[0].wait.value);
  for (int item = 0; item < list->count; ++item) {
    switch (list->numbers) {
      case Numbers::kBFloat16: multiply_fragments<__nv_bfloat16>(lanes, item); break;
      case Numbers::kFloat16: multiply_fragments<__half>(lanes, item); break;
      case Numbers::kTF32: multiply_fragments<float>(lanes, item); break;
    }
  }
}

// Calls body(lane) for each lane of the mask.
template <typename Body>
void each_lane(unsigned mask, Thread* lanes, const Body& body) {
  for (; mask; mask &= mask - 1) body(lanes[__builtin_ctz(mask)]);
}

// Gives the lanes that have arrived their results.
void complete(const Meeting& meeting, Thread* lanes) {
  if (meeting.op == WarpOp::kLoadMatrices) load_matrices(lanes);
  if (meeting.op == WarpOp::kMultiply) multiply_fragments(lanes);
  std::uint64_t ballot = 0, least = ~std::uint64_t{0}, largest = 0;
  each_lane(meeting.arrived, lanes, [&](const Thread& thread) {
    ballot |= std::uint64_t(thread.wait.value != 0) << thread.lane;
    least = std::min(least, thread.wait.value);
    largest = std::max(largest, thread.wait.value);
  });
  each_lane(meeting.arrived, lanes, [&](Thread& thread) {
    const Wait& wait = thread.wait;
    thread.result = 0;
    switch (meeting.op) {
      case WarpOp::kBallot: thread.result = ballot; break;
      case WarpOp::kMin: thread.result = least; break;
      case WarpOp::kMax: thread.result = largest; break;
      case WarpOp::kShuffle: thread.result = lanes[wait.source_lane].wait.value; break;
      case WarpOp::kMatch:
        each_lane(meeting.arrived, lanes, [&](const Thread& other) {
          thread.result |= std::uint64_t(other.wait.value == wait.value) << other.lane;
        });
        break;
      case WarpOp::kSync:
      case WarpOp::kLoadMatrices:
      case WarpOp::kMultiply: break;
    }
  });
}

}  // namespace
}  // namespace cusim
