// The threads of a block as the engine knows them, how errors name them, and their turns.

#pragma once

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "cusim.h"
#include "fiber.h"

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
