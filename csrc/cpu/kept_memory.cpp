#include "kept_memory.h"

#include <algorithm>
#include <cstdlib>
#include <tuple>

#include "../args.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

// From torch 2.11 on; null before.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);
#endif

namespace moe_ext {
namespace {

// Smaller results are left to torch's allocator.
constexpr size_t kLeast = KeptMemory::kPage;

constexpr size_t whole_pages(size_t bytes) {
  return (bytes + KeptMemory::kPage - 1) / KeptMemory::kPage * KeptMemory::kPage;
}

#if defined(__linux__)

bool is_possible() { return torch_from_blob != nullptr; }

size_t memory_of_machine() {
  return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

char* map(size_t bytes) {
  void* begin = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return begin == MAP_FAILED ? nullptr : static_cast<char*>(begin);
}

void unmap(char* begin, size_t bytes) {
  if (bytes > 0) munmap(begin, bytes);
}

// Null where the system gives none.
char* map_pages(size_t bytes) {
  constexpr size_t kPage = KeptMemory::kPage;
  const auto until_page = [](char* p) { return -reinterpret_cast<uintptr_t>(p) % kPage; };
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
  // Where the advice is refused nothing is lost.
  if (begin) madvise(begin, bytes, MADV_HUGEPAGE);
  return begin;
}

// glibc learns from the blocks that are freed how large those are that it should keep itself. It
// does not see ours, and would give the smaller results of the same steps back each time.
void teach_allocator(size_t bytes) {
  void* volatile block = std::malloc(bytes);
  std::free(block);
}

// The system may take these pages until they are written to.
void offer(char* begin, size_t bytes) { madvise(begin, bytes, MADV_FREE); }

// deleter(begin, context) when nobody has the tensor any more.
Tensor tensor_of(void* begin, const Contiguous& of, void (*deleter)(void*, void*), void* context) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      begin, of.rank, of.size, of.strides, 0, of.dtype, aoti_torch_device_type_cpu(), -1, &handle,
      aoti_torch_layout_strided(), nullptr, 0, deleter, context));
  return Tensor(handle);
}

#else

bool is_possible() { return false; }
size_t memory_of_machine() { return 0; }
char* map_pages(size_t) { return nullptr; }
void unmap(char*, size_t) {}
void teach_allocator(size_t) {}
void offer(char*, size_t) {}
Tensor tensor_of(void*, const Contiguous&, void (*)(void*, void*), void*) { return {}; }

#endif

}  // namespace

KeptMemory::KeptMemory() : limit_(is_possible() ? memory_of_machine() / 8 : 0) {}

KeptMemory& KeptMemory::of_process() {
  static KeptMemory& memory = *new KeptMemory;
  return memory;
}

void* KeptMemory::take(size_t bytes) {
  bytes = whole_pages(bytes);
  if (char* begin = take_kept(bytes)) return begin;
  teach_allocator(bytes);
  return map_pages(bytes);
}

// From the smallest range that holds it: large ones stay for large results.
char* KeptMemory::take_kept(size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto best = ranges_.end();
  for (auto at = ranges_.begin(); at != ranges_.end(); ++at) {
    const size_t size = at->second.bytes;
    if (size >= bytes && (best == ranges_.end() || size < best->second.bytes)) best = at;
  }
  if (best == ranges_.end()) return nullptr;
  const auto [begin, range] = *best;
  ranges_.erase(best);
  if (range.bytes > bytes) {
    ranges_[begin + bytes] = {range.bytes - bytes, range.since, range.is_offered};
  }
  kept_ -= bytes;
  return begin;
}

void KeptMemory::give(void* begin, size_t bytes) {
  std::vector<Span> rest;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    keep({static_cast<char*>(begin), whole_pages(bytes)});
    rest = take_beyond(limit_);
    offer_beyond(limit_ / 8);
  }
  for (const Span& span : rest) unmap(span.begin, span.bytes);
}

void KeptMemory::keep(Span span) {
  kept_ += span.bytes;
  auto next = ranges_.lower_bound(span.begin);
  if (next != ranges_.end() && next->first == span.begin + span.bytes) {
    span.bytes += next->second.bytes;
    next = ranges_.erase(next);
  }
  if (next != ranges_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second.bytes == span.begin) {
      span = {before->first, before->second.bytes + span.bytes};
    }
  }
  ranges_[span.begin] = {span.bytes, ++clock_, false};
}

void KeptMemory::offer_beyond(size_t limit) {
  size_t bytes = 0;
  for (const auto& [begin, range] : ranges_) bytes += range.is_offered ? 0 : range.bytes;
  if (bytes <= limit) return;
  for (auto& [begin, range] : ranges_) {
    if (!range.is_offered) offer(begin, range.bytes);
    range.is_offered = true;
  }
}

std::vector<KeptMemory::Span> KeptMemory::take_beyond(size_t limit) {
  std::vector<Span> rest;
  while (kept_ > limit) {
    const auto oldest = std::min_element(
        ranges_.begin(), ranges_.end(),
        [](const auto& a, const auto& b) { return a.second.since < b.second.since; });
    auto& [begin, range] = *oldest;
    const size_t bytes = std::min(range.bytes, whole_pages(kept_ - limit));
    range.bytes -= bytes;
    kept_ -= bytes;
    rest.push_back({begin + range.bytes, bytes});
    if (range.bytes == 0) ranges_.erase(oldest);
  }
  return rest;
}

size_t KeptMemory::kept() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return kept_;
}

size_t KeptMemory::limit() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return limit_;
}

void KeptMemory::set_limit(size_t bytes) {
  std::vector<Span> rest;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    rest = take_beyond(limit_);
  }
  for (const Span& span : rest) unmap(span.begin, span.bytes);
}

std::optional<Tensor> in_kept_memory(size_t bytes, std::initializer_list<int64_t> size,
                                     ScalarType dtype) {
  if (bytes < kLeast || !is_possible()) return std::nullopt;
  void* begin = KeptMemory::of_process().take(bytes);
  if (!begin) return std::nullopt;
  const auto give = [](void* data, void* context) {
    KeptMemory::of_process().give(data, reinterpret_cast<size_t>(context));
  };
  const Tensor tensor = tensor_of(begin, {size, dtype}, give, reinterpret_cast<void*>(bytes));
  poison(tensor);
  return tensor;
}

namespace {

// Bytes that are kept, and the most that may be; `limit` sets it.
std::tuple<int64_t, int64_t> keep_memory(const Tensor&, std::optional<int64_t> limit) {
  KeptMemory& memory = KeptMemory::of_process();
  const Check check("keep_memory");
  if (limit && *limit < 0) check.fail("limit must be at least 0 bytes, got ", *limit);
  if (limit && is_possible()) memory.set_limit(static_cast<size_t>(*limit));
  return {static_cast<int64_t>(memory.kept()), static_cast<int64_t>(memory.limit())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("keep_memory", TORCH_BOX(&keep_memory)); }

}  // namespace moe_ext
