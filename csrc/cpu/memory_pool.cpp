#include "memory_pool.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <string>
#include <tuple>

#include "../args.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

// torch has it from 2.11 on; the address is null before.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);
#endif

namespace moe_ext {
namespace {

constexpr size_t kPage = MemoryPool::kPage;

// torch's allocator holds smaller results.
constexpr size_t kLeast = kPage;

constexpr size_t kMostByDefault = size_t{16} << 30;

constexpr size_t whole_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

#if defined(__linux__)

bool is_possible() { return torch_from_blob != nullptr; }

// The least that a file has, of a control group "/a/b" and of those around it.
size_t limit_of(const std::string& folder, std::string group, const char* file) {
  size_t least = SIZE_MAX, limit;
  while (!group.empty()) {
    group.resize(group.rfind('/'));
    // A group without a limit has "max", which is no number.
    if (std::ifstream(folder + group + file) >> limit) least = std::min(least, limit);
  }
  return least;
}

// The memory that this process may have: of the machine, or of a container.
size_t memory_of_process() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  size_t least = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * page;
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // number:controllers:group
    const size_t begin = line.find(':') + 1, end = line.find(':', begin);
    if (begin == 0 || end == std::string::npos) continue;
    const std::string controllers = line.substr(begin, end - begin);
    const std::string group = line.substr(end + 1) + '/';
    if (group[0] != '/') continue;
    if (controllers.empty()) {
      least = std::min(least, limit_of("/sys/fs/cgroup", group, "/memory.max"));
    } else if (("," + controllers + ",").find(",memory,") != std::string::npos) {
      const char* file = "/memory.limit_in_bytes";
      least = std::min(least, limit_of("/sys/fs/cgroup/memory", group, file));
    }
  }
  return least;
}

// Bytes from an address to the next page.
size_t until_page(const char* p) { return -reinterpret_cast<uintptr_t>(p) % kPage; }

char* map(size_t bytes) {
  void* begin = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return begin == MAP_FAILED ? nullptr : static_cast<char*>(begin);
}

void unmap(char* begin, size_t bytes) {
  if (bytes > 0) munmap(begin, bytes);
}

// Returns null if the system has no memory.
char* map_pages(size_t bytes) {
  char* begin = map(bytes);
  if (begin && until_page(begin) > 0) {
    unmap(begin, bytes);
    begin = map(bytes + kPage);
    if (!begin) return nullptr;
    const size_t before = until_page(begin);
    unmap(begin, before);
    begin += before;
    unmap(begin + bytes, kPage - before);
  }
  if (begin) ask_for_pages(begin, bytes);
  return begin;
}

// The system may take these pages until they are written to.
void offer(char* begin, size_t bytes) { madvise(begin, bytes, MADV_FREE); }

// glibc reuses freed blocks up to the largest size that it has seen freed, at most 32 MiB. It does
// not see the pool's results, so this shows it a block of their size. Without it, glibc returns the
// smaller blocks of each step to the system.
void teach_allocator(size_t bytes) {
  constexpr size_t kMost = size_t{31} << 20;  // 32 MiB would be more with the block's header
  void* volatile block = std::malloc(std::min(bytes, kMost));
  std::free(block);
}

// A fork copies a held lock, but not the thread that would release it.
void lock_over_fork(void (*lock)(), void (*unlock)()) { pthread_atfork(lock, unlock, unlock); }

// A contiguous tensor in this memory. deleter(begin, context) runs when its last reference dies.
Tensor tensor_of(char* begin, std::initializer_list<int64_t> size, ScalarType dtype,
                 void (*deleter)(void*, void*), void* context) {
  int64_t strides[4] = {}, stride = 1;
  for (size_t i = size.size(); i-- > 0; stride *= size.begin()[i]) strides[i] = stride;
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(begin, static_cast<int64_t>(size.size()), size.begin(),
                                         strides, 0, type, aoti_torch_device_type_cpu(), -1,
                                         &handle, aoti_torch_layout_strided(), nullptr, 0, deleter,
                                         context));
  return Tensor(handle);
}

#else

bool is_possible() { return false; }
size_t memory_of_process() { return 0; }
char* map_pages(size_t) { return nullptr; }
void unmap(char*, size_t) {}
void offer(char*, size_t) {}
void teach_allocator(size_t) {}
void lock_over_fork(void (*)(), void (*)()) {}
Tensor tensor_of(char*, std::initializer_list<int64_t>, ScalarType, void (*)(void*, void*), void*) {
  return {};
}

#endif

}  // namespace

void Spans::add(Span span) {
  bytes_ += span.bytes;
  auto next = spans_.lower_bound(span.begin);
  if (next != spans_.end() && next->first == span.begin + span.bytes) {
    span.bytes += next->second;
    next = spans_.erase(next);
  }
  if (next != spans_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == span.begin) {
      before->second += span.bytes;
      return;
    }
  }
  spans_[span.begin] = span.bytes;
}

void Spans::remove(Span span) {
  char* const end = span.begin + span.bytes;
  auto at = spans_.upper_bound(span.begin);
  if (at != spans_.begin()) --at;
  while (at != spans_.end() && at->first < end) {
    const auto [begin, bytes] = *at;
    char* const last = begin + bytes;
    if (last <= span.begin) {
      ++at;
      continue;
    }
    at = spans_.erase(at);
    if (begin < span.begin) spans_[begin] = span.begin - begin;
    if (last > end) spans_[end] = last - end;
    bytes_ -= std::min(last, end) - std::max(begin, span.begin);
  }
}

void Spans::clear() {
  spans_.clear();
  bytes_ = 0;
}

std::optional<Span> Spans::smallest(size_t least) const {
  std::optional<Span> best;
  for (const auto& [begin, bytes] : spans_) {
    if (bytes >= least && (!best || bytes < best->bytes)) best = Span{begin, bytes};
  }
  return best;
}

std::vector<Span> Spans::all() const {
  std::vector<Span> spans;
  for (const auto& [begin, bytes] : spans_) spans.push_back({begin, bytes});
  return spans;
}

MemoryPool::MemoryPool()
    : limit_(is_possible() ? std::min(memory_of_process() / 4, kMostByDefault) : 0) {
  lock_over_fork([] { of_process().mutex_.lock(); }, [] { of_process().mutex_.unlock(); });
}

MemoryPool& MemoryPool::of_process() {
  static MemoryPool& pool = *new MemoryPool;
  return pool;
}

char* MemoryPool::take(size_t bytes) {
  bytes = whole_pages(bytes);
  if (char* begin = take_kept(bytes)) return begin;
  teach_allocator(bytes);
  if (char* begin = map_pages(bytes)) return begin;
  give_back(0);  // a process with a limit may have no addresses left
  return map_pages(bytes);
}

// Takes the smallest span that is large enough, so that large spans serve large results.
char* MemoryPool::take_kept(size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::optional<Span> span = kept_.smallest(bytes);
  if (!span) return nullptr;
  forget({span->begin, bytes});
  return span->begin;
}

void MemoryPool::forget(Span span) {
  kept_.remove(span);
  unoffered_.remove(span);
}

void MemoryPool::give(char* begin, size_t bytes) {
  const Span span{begin, whole_pages(bytes)};
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.add(span);
    unoffered_.add(span);
  }
  give_back(limit());
}

// Gives kept memory beyond `most` bytes back to the system. Small spans go first, because a large
// span serves small results too.
void MemoryPool::give_back(size_t most) {
  std::vector<Span> rest;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (kept_.bytes() > most) {
      const Span span = *kept_.smallest(0);
      const size_t bytes = std::min(span.bytes, whole_pages(kept_.bytes() - most));
      rest.push_back({span.begin + span.bytes - bytes, bytes});
      forget(rest.back());
    }
    if (unoffered_.bytes() > limit_ / 8) {
      for (const Span& span : unoffered_.all()) offer(span.begin, span.bytes);
      unoffered_.clear();
    }
  }
  for (const Span& span : rest) unmap(span.begin, span.bytes);
}

size_t MemoryPool::kept() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return kept_.bytes();
}

size_t MemoryPool::limit() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return limit_;
}

void MemoryPool::set_limit(size_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
  }
  give_back(bytes);
}

std::optional<Tensor> in_pool(size_t bytes, std::initializer_list<int64_t> size, ScalarType dtype) {
  if (bytes < kLeast || !is_possible()) return std::nullopt;
  char* begin = MemoryPool::of_process().take(bytes);
  if (!begin) return std::nullopt;
  const auto give = [](void* data, void* context) {
    MemoryPool::of_process().give(static_cast<char*>(data), reinterpret_cast<size_t>(context));
  };
  const Tensor tensor = tensor_of(begin, size, dtype, give, reinterpret_cast<void*>(bytes));
  poison(tensor);
  return tensor;
}

void ask_for_pages(char* begin, size_t bytes) {
#if defined(__linux__)
  char* const first = begin + until_page(begin);
  char* const last = begin + bytes - reinterpret_cast<uintptr_t>(begin + bytes) % kPage;
  // Where the advice is refused nothing is lost.
  if (first < last) madvise(first, last - first, MADV_HUGEPAGE);
#endif
}

namespace {

std::tuple<int64_t, int64_t> keep_memory(const Tensor&, std::optional<int64_t> limit) {
  MemoryPool& pool = MemoryPool::of_process();
  if (limit && *limit < 0) {
    Check("keep_memory").fail("limit must be at least 0 bytes, got ", *limit);
  }
  if (limit && is_possible()) pool.set_limit(static_cast<size_t>(*limit));
  return {static_cast<int64_t>(pool.kept()), static_cast<int64_t>(pool.limit())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("keep_memory", TORCH_BOX(&keep_memory)); }

}  // namespace moe_ext
