// The memory that a block's threads see beside global memory: shared arrays, and stacks.

#pragma once

#include <pthread.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <vector>

namespace cusim {
namespace {

// Bytes at an address.
struct Range {
  void* begin = nullptr;
  std::size_t bytes = 0;

  bool has(const void* address) const {
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    const auto first = reinterpret_cast<std::uintptr_t>(begin);
    return at >= first && at < first + bytes;
  }
};

// The calling thread's stack.
inline Range host_stack() {
  Range stack;
  pthread_attr_t attributes;
  if (pthread_getattr_np(pthread_self(), &attributes)) return stack;
  pthread_attr_getstack(&attributes, &stack.begin, &stack.bytes);
  pthread_attr_destroy(&attributes);
  return stack;
}

// Shared arrays, each of its exact size. As launch.cuh has it, each starts at a multiple of 16
// bytes from the first.
class SharedArrays {
 public:
  SharedArrays() = default;
  SharedArrays(const SharedArrays&) = delete;
  ~SharedArrays() { clear(); }

  std::size_t count() const { return arrays_.size(); }
  const Range& operator[](std::size_t index) const { return arrays_[index]; }
  std::size_t bytes() const { return bytes_; }
  static std::size_t rounded(std::size_t bytes) { return (bytes + 15) / 16 * 16; }

  void add(std::size_t bytes) {
    // aligned_alloc would round the size up, and an access past the end would not be seen.
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, bytes)) throw std::bad_alloc();
    std::memset(memory, 0xff, bytes);  // NaN as a float, -1 as an integer
    arrays_.push_back({memory, bytes});
    bytes_ += rounded(bytes);
  }

  void clear() {
    for (const Range& array : arrays_) std::free(array.begin);
    arrays_.clear();
    bytes_ = 0;
  }

  // From the start of all; none where the address is in no array.
  std::optional<std::uint64_t> offset_of(const void* address) const {
    std::uint64_t before = 0;
    for (const Range& array : arrays_) {
      if (array.has(address)) {
        const auto begin = reinterpret_cast<std::uintptr_t>(array.begin);
        return before + reinterpret_cast<std::uintptr_t>(address) - begin;
      }
      before += rounded(array.bytes);
    }
    return std::nullopt;
  }

 private:
  std::vector<Range> arrays_;
  std::size_t bytes_ = 0;
};

}  // namespace
}  // namespace cusim
