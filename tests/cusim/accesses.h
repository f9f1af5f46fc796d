// Counts a launch's memory accesses as a profiler would.
//
// Global memory is seen by `load` and `store`. Kernels compiled with -fsanitize=thread call a
// function at every access; here these functions are not ThreadSanitizer's, but show what happens
// in shared memory, and that no access to global memory goes past `load` and `store`. Accesses are
// kept until their block ends: those of a warp's lanes from one place in the machine code are one
// request, the n-th of each lane together.

#pragma once

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "tensor.h"

namespace cusim {

struct Counts {
  // Shared memory: a wavefront serves each of 32 banks of 4 bytes once.
  std::uint64_t requests, wavefronts, least_wavefronts;
  // Global memory: different bytes that requests ask for, and whole sectors of 32 bytes.
  std::uint64_t bytes_asked, sector_bytes;
  std::uint64_t atomics;
  std::uint64_t past;  // bytes of global memory accessed, but not by `load` and `store`
};

struct Access {
  std::uintptr_t site;
  std::uint64_t address;  // in shared memory: from its start
  std::uint32_t warp, lane, size;
  bool shared;
  std::uint32_t turn;

  auto request() const { return std::tie(shared, warp, site, turn); }
};

class AccessCounter {
 public:
  // By `load` and `store`.
  void add_global(const void* address, std::size_t size, void* site) {
    add(reinterpret_cast<std::uintptr_t>(address), size, site, false);
    counts_.past -= size;
  }

  // By the machine code.
  void add_any(const void* address, std::size_t size, void* site) {
    if (!current || poisoning) return;
    const Place place = place_of(address);
    if (place.memory == Memory::kShared) add(place.offset, size, site, true);
    if (place.memory == Memory::kGlobal) counts_.past += size;
  }

  void add_atomic() { ++counts_.atomics; }

  void end_block() {
    const auto by_lane = [](const Access& a) { return std::tie(a.shared, a.warp, a.site, a.lane); };
    std::stable_sort(block_.begin(), block_.end(),
                     [&](const Access& a, const Access& b) { return by_lane(a) < by_lane(b); });
    for (std::size_t i = 1; i < block_.size(); ++i) {
      if (by_lane(block_[i - 1]) == by_lane(block_[i])) block_[i].turn = block_[i - 1].turn + 1;
    }
    std::stable_sort(block_.begin(), block_.end(),
                     [](const Access& a, const Access& b) { return a.request() < b.request(); });
    for (auto first = block_.begin(); first != block_.end();) {
      const auto last = std::find_if(first, block_.end(), [&](const Access& access) {
        return access.request() != first->request();
      });
      first->shared ? count_shared(first, last) : count_global(first, last);
      first = last;
    }
    block_.clear();
  }

  // The counts since the last call.
  Counts take() { return std::exchange(counts_, {}); }

 private:
  using Lanes = std::vector<Access>::const_iterator;

  void add(std::uint64_t address, std::size_t size, void* site, bool shared) {
    const unsigned thread = current->thread_idx.x;
    block_.push_back({reinterpret_cast<std::uintptr_t>(site), address, thread / 32, thread % 32,
                      static_cast<std::uint32_t>(size), shared, 0});
  }

  void count_global(Lanes first, Lanes last) {
    bytes_.clear();
    for (; first != last; ++first) {
      for (std::uint64_t i = 0; i < first->size; ++i) bytes_.push_back(first->address + i);
    }
    counts_.bytes_asked += distinct(bytes_);
    for (std::uint64_t& byte : bytes_) byte /= 32;
    counts_.sector_bytes += 32 * distinct(bytes_);
  }

  void count_shared(Lanes first, Lanes last) {
    ++counts_.requests;
    // Lanes that ask for more than a word take their turns in halves or quarters of a warp.
    const std::uint32_t together = 32 / std::max<std::uint32_t>(first->size / 4, 1);
    for (; first != last;) {
      std::vector<std::uint64_t> words;
      const std::uint32_t part = first->lane / together;
      for (; first != last && first->lane / together == part; ++first) {
        for (std::uint64_t i = 0; i < first->size; i += 4)
          words.push_back(first->address / 4 + i / 4);
      }
      distinct(words);
      std::uint64_t of_bank[32] = {};
      for (const std::uint64_t word : words) ++of_bank[word % 32];
      counts_.wavefronts += *std::max_element(of_bank, of_bank + 32);
      ++counts_.least_wavefronts;
    }
  }

  static std::uint64_t distinct(std::vector<std::uint64_t>& values) {
    std::sort(values.begin(), values.end());
    values.erase(std::unique(values.begin(), values.end()), values.end());
    return values.size();
  }

  std::vector<Access> block_;
  std::vector<std::uint64_t> bytes_;
  Counts counts_{};
};

}  // namespace cusim
