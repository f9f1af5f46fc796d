// Fibers for the engine of cusim. The sanitizers are told of them.
//
// Include this file once, in a file compiled without -fsanitize.

#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <deque>
#include <new>

// The sanitizers' run-time functions; each is null in a program without that sanitizer.
extern "C" {
#define WEAK __attribute__((weak))
WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, std::size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom,
                                          std::size_t* old_size);
// Or every fiber would have a second stack for what may be used after a return.
const char* __asan_default_options() { return "detect_stack_use_after_return=0"; }
// Or every program would wait a second for threads that it does not have.
const char* __tsan_default_options() { return "atexit_sleep_ms=0"; }
const char* __ubsan_default_options() { return "print_stacktrace=1"; }
WEAK void __asan_unpoison_memory_region(const volatile void* address, std::size_t size);
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_destroy_fiber(void* fiber);
WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
WEAK void __tsan_set_fiber_name(void* fiber, const char* name);
WEAK void __tsan_acquire(void* address);
WEAK void __tsan_release(void* address);
WEAK void AnnotateIgnoreWritesBegin(const char* file, int line);
WEAK void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace cusim {
namespace {

constexpr std::size_t kStackBytes = 1 << 17;

void release(void* address) {
  if (__tsan_release) __tsan_release(address);
}

void acquire(void* address) {
  if (__tsan_acquire) __tsan_acquire(address);
  // With more fibers than its 255 slots ThreadSanitizer drops reports of accesses that follow an
  // acquire directly.
  static char never_acquired;
  release(&never_acquired);
}

// Memory allocated or freed in this scope belongs to no thread in particular.
struct Unowned {
  Unowned() {
    if (AnnotateIgnoreWritesBegin) AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unowned() {
    if (AnnotateIgnoreWritesEnd) AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  }
};

struct Context {
  void* stack_pointer = nullptr;
  const void* stack_bottom = nullptr;
  std::size_t stack_size = 0;
  void* tsan_fiber = nullptr;
};

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer at *from (rdi), and goes on where `to`
// (rsi) was saved. Twenty times faster than swapcontext, which enters the kernel.
__attribute__((naked, noinline)) void switch_stack(void**, void*) {
  asm volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
      "movq %rsp, (%rdi); movq %rsi, %rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; retq");
}

void* prepare_stack(std::byte* bottom, std::size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(bottom + size);
  *--top = nullptr;  // entry's return address; it never returns
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  return top;
}
#else
void switch_stack(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

void* prepare_stack(std::byte* bottom, std::size_t size, void (*entry)()) {
  auto* context = new (bottom + size - (sizeof(ucontext_t) + 63) / 64 * 64) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = bottom;
  context->uc_stack.ss_size = std::size_t(reinterpret_cast<std::byte*>(context) - bottom);
  makecontext(context, entry, 0);
  return context;
}
#endif

void leave_context(const Context& to, void** fake_stack) {
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(fake_stack, to.stack_bottom, to.stack_size);
  }
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan_fiber, 1 /* orders nothing */);
}

void enter_context(void* fake_stack, Context* left) {
  if (!__sanitizer_finish_switch_fiber) return;
  __sanitizer_finish_switch_fiber(fake_stack, left ? &left->stack_bottom : nullptr,
                                  left ? &left->stack_size : nullptr);
}

void switch_context(Context& from, const Context& to) {
  void* fake_stack = nullptr;
  leave_context(to, &fake_stack);
  switch_stack(&from.stack_pointer, to.stack_pointer);
  enter_context(fake_stack, nullptr);
}

[[noreturn]] void end_context(Context& from, const Context& to) {
  leave_context(to, nullptr);
  switch_stack(&from.stack_pointer, to.stack_pointer);
  std::abort();
}

// A stack above a guard page, with the identity that ThreadSanitizer gives to what runs on it.
struct Fiber {
  std::byte* stack = nullptr;
  void* tsan_fiber = nullptr;
};

class FiberPool {
 public:
  // Before a launch of blocks of so many threads. To ThreadSanitizer what runs on a fiber comes
  // after all that its creator knew of and all that ran on it before: so there fibers are created
  // in advance, and several blocks' worth, which take turns.
  void prepare(std::size_t threads) {
    if (!__tsan_create_fiber) return;
    while (idle_.size() < std::max<std::size_t>(2 * threads, 1024)) idle_.push_back(create());
  }
  Fiber take() {
    if (idle_.empty()) return create();
    const bool last = !__tsan_create_fiber;  // the one used last is in the cache
    const Fiber fiber = last ? idle_.back() : idle_.front();
    last ? idle_.pop_back() : idle_.pop_front();
    return fiber;
  }
  void give_back(const Fiber& fiber) { idle_.push_back(fiber); }
  void destroy(const Fiber& fiber) {
    if (__tsan_destroy_fiber) __tsan_destroy_fiber(fiber.tsan_fiber);
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(fiber.stack, kStackBytes);
    munmap(fiber.stack - kGuardBytes, kGuardBytes + kStackBytes);
  }

 private:
  static constexpr std::size_t kGuardBytes = 4096;

  static Fiber create() {
    Fiber fiber;
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE)) throw std::bad_alloc();
    fiber.stack = static_cast<std::byte*>(memory) + kGuardBytes;
    if (__tsan_create_fiber) fiber.tsan_fiber = __tsan_create_fiber(0);
    return fiber;
  }

  std::deque<Fiber> idle_;
};

}  // namespace
}  // namespace cusim
