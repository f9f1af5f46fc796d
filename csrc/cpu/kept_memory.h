// Memory of large results. What a freed one leaves serves the next, because new pages cost more
// than what most operators do with them: the system zeroes them, and a virtual machine may have to
// get them back from its host.
//
//   mapped  |####|----|########|--|###|   in pages of two megabytes, where the system gives some
//    in use  ####      ########    ###
//    kept         ----          --        at most a limit; what was kept longest goes back first
//
// An eighth of the limit stays as it is. What is kept beyond it is offered to the system, which
// takes it when it runs out of memory: to offer pages costs as much as to zero a part of them.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

namespace moe_ext {

class KeptMemory {
 public:
  static constexpr size_t kPage = size_t{1} << 21;

  // That of this process, which outlives every tensor.
  static KeptMemory& of_process();

  // So many bytes, in whole pages; null where the system gives none.
  void* take(size_t bytes);
  void give(void* begin, size_t bytes);

  // Bytes that are kept now, and the most that may be.
  size_t kept() const;
  size_t limit() const;
  void set_limit(size_t bytes);

 private:
  struct Range {
    size_t bytes;
    uint64_t since;  // the larger, the later it was given
    bool is_offered;
  };
  struct Span {
    char* begin;
    size_t bytes;
  };

  KeptMemory();
  char* take_kept(size_t bytes);
  void keep(Span span);
  void offer_beyond(size_t limit);
  std::vector<Span> take_beyond(size_t limit);

  mutable std::mutex mutex_;
  std::map<char*, Range> ranges_;  // by address; neighbours are one
  size_t kept_ = 0, limit_;
  uint64_t clock_ = 0;
};

// A contiguous tensor of so many bytes there; none where it is small, or where torch takes no
// memory of others.
std::optional<torch::stable::Tensor> in_kept_memory(size_t bytes,
                                                    std::initializer_list<int64_t> size,
                                                    torch::headeronly::ScalarType dtype);

}  // namespace moe_ext
