// Memory for large results. A new result takes the memory of a freed one, because new pages cost
// more than what most operators do with them: the system zeroes them, and a virtual machine may
// have to get them back from its host.
//
//   mapped  |####|----|########|--|###|   in pages of two megabytes, where the system gives some
//   in use   ####      ########    ###
//   kept          ----          --        at most a limit
//
// Kept memory is offered to the system, which takes it when it runs out of memory, without writing
// it to disk. A call that offers memory takes tens of microseconds, so it offers many pages.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <initializer_list>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

namespace moe_ext {

struct Span {
  char* begin;
  size_t bytes;
};

// A set of addresses.
class Spans {
 public:
  void add(Span span);
  void remove(Span span);
  void clear();

  // The smallest span of at least so many bytes.
  std::optional<Span> smallest(size_t least) const;
  std::vector<Span> all() const;
  size_t bytes() const { return bytes_; }

 private:
  std::map<char*, size_t> spans_;  // neighbours are one
  size_t bytes_ = 0;
};

class MemoryPool {
 public:
  static constexpr size_t kPage = size_t{1} << 21;

  // The pool of this process. It outlives every tensor.
  static MemoryPool& of_process();

  // Both round up to whole pages. take returns null if the system has no memory.
  char* take(size_t bytes);
  void give(char* begin, size_t bytes);

  // Bytes that are kept now, and the most that may be.
  size_t kept() const;
  size_t limit() const;
  void set_limit(size_t bytes);

 private:
  MemoryPool();
  char* take_kept(size_t bytes);
  void forget(Span span);
  void give_back(size_t most);

  mutable std::mutex mutex_;
  Spans kept_, unoffered_;  // the second is a part of the first
  size_t limit_;
};

// Returns a contiguous tensor in memory of the pool; nothing if the tensor is small, or if torch is
// older than 2.11 and cannot take memory of others.
std::optional<torch::stable::Tensor> in_pool(size_t bytes, std::initializer_list<int64_t> size,
                                             torch::headeronly::ScalarType dtype);

// Asks the system for pages of two megabytes. Call it before the memory is first written.
void ask_for_pages(char* begin, size_t bytes);

}  // namespace moe_ext
