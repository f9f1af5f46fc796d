// The threads of a block as the engine knows them, how errors name them, and their turns.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "cusim.h"
#include "fiber.h"
#include "tensor.h"

namespace cusim {
namespace {

void check_shape(const char* name, const Shape& shape) {
  if (shape.blocks && shape.blocks <= 0x7fffffff && shape.threads && shape.threads <= 1024 &&
      shape.shared_bytes <= options().card.shared_per_block) {
    return;
  }
  throw Error("cusim: invalid launch of " + std::string(name) + ": " +
              std::to_string(shape.blocks) + " blocks of " + std::to_string(shape.threads) +
              " threads, " + std::to_string(shape.shared_bytes) + " bytes of shared memory");
}

struct Wait {
  const char *name, *file;
  int line;
  unsigned mask;
  std::uint64_t value;
  unsigned source_lane;
};

struct Thread : Coordinates {
  Fiber fiber;
  Context context;
  unsigned rank;
  bool returned, waiting;
  Wait wait;  // the operation it waits in, or waited in last
  std::uint64_t result;
};

constexpr unsigned kWholeWarp = 0xffffffff;

// Gives every lane its words of four matrices of 8 lines.
inline void load_matrices(const Thread* lanes) {
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

// As tensor cores round a sum.
inline float towards_zero(double x) {
  const auto nearest = static_cast<float>(x);
  return std::fabs(double{nearest}) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
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

inline void multiply_fragments(const Thread* lanes) {
  const auto* list = reinterpret_cast<const MultiplicationList*>(lanes[0].wait.value);
  for (int item = 0; item < list->count; ++item) {
    switch (list->numbers) {
      case Numbers::kBFloat16: multiply_fragments<__nv_bfloat16>(lanes, item); break;
      case Numbers::kFloat16: multiply_fragments<__half>(lanes, item); break;
      case Numbers::kTF32: multiply_fragments<float>(lanes, item); break;
    }
  }
}

// Lanes of a warp that have arrived at an operation and wait for the others of its mask.
struct Meeting {
  WarpOp op;
  const char* name;
  unsigned mask, arrived;
  void* ordering;
};

struct Warp {
  unsigned lanes;  // those that have not returned
  std::vector<Meeting> meetings;
};

// The copies that a block's threads have not waited for.
class PendingCopies {
 public:
  void start_block(std::size_t threads) {
    if (of_thread_.size() < threads) of_thread_.resize(threads);
    for (unsigned rank : used_) of_thread_[rank] = {};
    used_.clear();
  }

  void add(unsigned rank, Copy copy) {
    OfThread& thread = of_thread_[rank];
    if (thread.copies.empty()) used_.push_back(rank);
    copy.group = thread.groups;
    thread.copies.push_back(copy);
  }

  void commit(unsigned rank) {
    if (!of_thread_[rank].groups++) used_.push_back(rank);
  }

  // pick(n): which of n comes first.
  template <typename Pick>
  bool take(unsigned rank, int left, Copy& copy, const Pick& pick) {
    OfThread& thread = of_thread_[rank];
    std::size_t count = 0;  // in the order of their groups
    while (count < thread.copies.size() && thread.copies[count].group < thread.groups - left)
      ++count;
    if (!count) return false;
    const auto taken = thread.copies.begin() + std::ptrdiff_t(pick(count));
    copy = *taken;
    thread.copies.erase(taken);
    return true;
  }

  std::size_t count(unsigned rank) const { return of_thread_[rank].copies.size(); }

 private:
  struct OfThread {
    std::vector<Copy> copies;
    int groups = 0;
  };
  std::vector<OfThread> of_thread_;
  std::vector<unsigned> used_;
};

bool same(const char* a, const char* b) { return a == b || !std::strcmp(a, b); }

std::string text(const uint3& v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

std::string text(const Wait& wait) {
  char mask[16] = "";
  if (wait.mask) std::snprintf(mask, sizeof mask, "(0x%08x)", wait.mask);
  return wait.name + std::string(mask) + " at " + wait.file + ":" + std::to_string(wait.line);
}

std::string ranges(const std::vector<unsigned>& ascending) {
  std::string out;
  for (std::size_t i = 0, j; i < ascending.size(); i = j) {
    for (j = i + 1; j < ascending.size() && ascending[j] == ascending[j - 1] + 1;) ++j;
    out += (i ? "," : "") + std::to_string(ascending[i]);
    if (j - i > 1) out += "-" + std::to_string(ascending[j - 1]);
  }
  return out;
}

// Where the threads wait, as lines of a message.
std::string waits(const std::vector<Thread>& threads) {
  std::map<std::string, std::vector<unsigned>> groups;
  for (const Thread& thread : threads) {
    const std::string where = thread.returned  ? "returned"
                              : thread.waiting ? text(thread.wait)
                                               : "running";
    groups[where].push_back(thread.rank);
  }
  std::string out;
  for (const auto& [where, ranks] : groups) out += "\n  threads " + ranges(ranks) + ": " + where;
  return out;
}

// Whose turn it is: the threads that can run, and the order of blocks.
class Turns {
 public:
  // Before a launch: the n-th of this process.
  void start_launch(std::uint64_t n) { state_ = options().seed * 0x9e3779b97f4a7c15u + n; }

  std::vector<unsigned> order_of_blocks(std::size_t blocks) {
    std::vector<unsigned> order(blocks);
    std::iota(order.begin(), order.end(), 0u);
    if (options().order == Order::kReverse) std::reverse(order.begin(), order.end());
    if (options().order == Order::kRandom) {
      for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
    }
    return order;
  }

  void start_block() { first_ = count_ = 0; }

  bool any() const { return count_ > 0; }

  void add(Thread& thread) {
    thread.waiting = false;
    slot(count_++) = &thread;
  }

  Thread& take() {
    if (options().order == Order::kForward) {
      Thread& thread = *slot(0);
      ++first_, --count_;
      return thread;
    }
    if (options().order == Order::kRandom) std::swap(slot(random() % count_), slot(count_ - 1));
    return *slot(--count_);
  }

  // Which of n comes next, where any may.
  std::size_t pick(std::size_t n) { return options().order == Order::kRandom ? random() % n : 0; }

  // Whether the running thread gives way here: in random order alone, and not always.
  bool gives_way() { return options().order == Order::kRandom && random() % 4 == 0; }

 private:
  std::uint64_t random() {  // splitmix64
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }

  Thread*& slot(std::size_t i) { return ready_[(first_ + i) % std::size(ready_)]; }

  std::uint64_t state_ = 0;
  Thread* ready_[1024] = {};  // a ring
  std::size_t first_ = 0, count_ = 0;
};

}  // namespace
}  // namespace cusim
