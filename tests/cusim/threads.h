// The threads of a block as the engine knows them, and how errors name them.

#pragma once

#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cusim.h"
#include "fiber.h"

namespace cusim {
namespace {

constexpr std::size_t kMaxSharedBytes = 48 << 10;  // a block may have so many without asking

void check_shape(const char* name, const Shape& shape) {
  if (shape.blocks && shape.blocks <= 0x7fffffff && shape.threads && shape.threads <= 1024 &&
      shape.shared_bytes <= kMaxSharedBytes) {
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

}  // namespace
}  // namespace cusim
