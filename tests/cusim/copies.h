// Asynchronous copies wait here for their threads.

#pragma once

#include <vector>

#include "tensor.h"

namespace cusim {
namespace {

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

}  // namespace
}  // namespace cusim
