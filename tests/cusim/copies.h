// Asynchronous copies wait here for their threads.

#pragma once

#include <vector>

#include "tensor.h"
#include "threads.h"

namespace cusim {
namespace {

// The copies that a block's threads have not waited for. The running thread calls all but
// start_block().
class PendingCopies {
 public:
  explicit PendingCopies(Turns& turns) : turns_(turns) {}

  void start_block(std::size_t threads) {
    if (of_thread_.size() < threads) of_thread_.resize(threads);
    for (unsigned rank : used_) of_thread_[rank] = {};
    used_.clear();
  }

  void add(Copy copy) {
    Unowned scope;
    if (mine().copies.empty()) used_.push_back(rank());
    copy.group = mine().groups;
    mine().copies.push_back(copy);
  }

  void commit() {
    Unowned scope;
    if (!mine().groups++) used_.push_back(rank());
  }

  // False where all but the last `left` groups are done.
  bool take(int left, Copy& copy) {
    Unowned scope;
    auto& [copies, groups] = mine();
    std::size_t count = 0;  // in the order of their groups
    while (count < copies.size() && copies[count].group < groups - left) ++count;
    if (!count) return false;
    const auto taken = copies.begin() + std::ptrdiff_t(turns_.pick(count));
    copy = *taken;
    copies.erase(taken);
    return true;
  }

  std::size_t count() { return mine().copies.size(); }

 private:
  struct OfThread {
    std::vector<Copy> copies;
    int groups = 0;
  };

  static unsigned rank() { return current->thread_idx.x; }
  OfThread& mine() { return of_thread_[rank()]; }

  Turns& turns_;
  std::vector<OfThread> of_thread_;
  std::vector<unsigned> used_;
};

}  // namespace
}  // namespace cusim
