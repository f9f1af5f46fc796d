// Whose turn it is: the threads that can run, and the order of blocks.

#pragma once

#include <algorithm>
#include <iterator>
#include <numeric>
#include <vector>

#include "threads.h"

namespace cusim {
namespace {

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
