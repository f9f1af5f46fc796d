// The engine of cusim: fibers and their turns, barriers, warp operations, shared memory.
//
// Compile this file without -fsanitize: its own data passes between fibers by design, and it tells
// the sanitizers itself what orders the fibers' accesses.

#include "cusim.h"

#include <exception>
#include <iterator>
#include <mutex>

#include "copies.h"
#include "memory.h"
#include "threads.h"
#include "warps.h"

namespace cusim {

Coordinates* current = nullptr;
bool poisoning = false;

namespace {

class Engine;
Engine& engine();

class Engine {
 public:
  void launch(const char* name, const Shape& shape, void (*thread)(void*), void* argument) {
    std::lock_guard lock(mutex_);
    struct Finally {
      Engine& engine;
      // Not sooner: no block comes after another.
      ~Finally() { acquire(&engine.launch_ordering_[1]); }
    } finally{*this};
    launch_ = {name, shape.blocks, shape.threads, shape.shared_bytes, {}, {}, 0};
    thread_ = thread, argument_ = argument;
    check_shape(name, shape);
    turns_.start_launch(++num_launches_);
    if (__tsan_get_current_fiber) host_.tsan_fiber = __tsan_get_current_fiber();
    threads_.resize(shape.threads);
    warps_.resize((threads_.size() + 31) / 32);
    for (Warp& warp : warps_) warp.meetings.reserve(32);
    fibers_.prepare(threads_.size());
    release(&launch_ordering_[0]);

    for (unsigned block : turns_.order_of_blocks(shape.blocks)) run_block(block);
    if (options().recording) launches().push_back(launch_);
    if (options().end_launch) options().end_launch(launch_);
  }

  Thread& self() { return static_cast<Thread&>(*current); }

  // Ends the launch: the other threads that have not returned are abandoned where they are.
  [[noreturn]] void fail(const std::string& what) {
    std::string message = "cusim: " + what + "\n  in block " + std::to_string(block_) + " of " +
                          std::to_string(launch_.blocks) + " x " + std::to_string(launch_.threads) +
                          " of " + launch_.name;
    if (options().order == Order::kRandom) message += ", seed " + std::to_string(options().seed);
    throw Error(message);
  }

  [[noreturn]] void fail(const Thread& thread, const std::string& what) {
    fail("thread " + std::to_string(thread.rank) + ", lane " + std::to_string(thread.lane) + ": " +
         what);
  }

  // Often enough to vary the order of atomic operations when it is random.
  void preempt() {
    if (!turns_.gives_way()) return;
    turns_.add(self());
    suspend();
  }

  void barrier(const Wait& wait) {
    Thread& thread = self();
    thread.wait = wait, thread.waiting = true;
    if (!arrived_++) barrier_ordering_ = new_ordering();
    void* ordering = barrier_ordering_;
    release(ordering);
    complete_barrier();
    suspend();
    acquire(ordering);
  }

  std::uint64_t warp_operation(WarpOp op, const Wait& wait) {
    Thread& thread = self();
    thread.wait = wait, thread.waiting = true;
    Warp& warp = warps_[thread.rank / 32];
    const unsigned bit = 1u << thread.lane;
    if (!(wait.mask & bit)) fail(thread, text(wait) + ": the calling lane is not in the mask");
    Meeting* meeting = nullptr;
    for (Meeting& open : warp.meetings) {
      if (open.op == op && open.mask == wait.mask && same(open.name, wait.name)) {
        meeting = &open;
      } else if ((open.mask & bit) && (open.arrived & wait.mask)) {
        fail("lanes of warp " + std::to_string(thread.rank / 32) +
             " wait for each other in different operations or with different masks:" +
             waits(threads_));
      }
    }
    if (!meeting) {
      warp.meetings.push_back({op, wait.name, wait.mask, 0, new_ordering()});
      meeting = &warp.meetings.back();
    }
    // Only __syncwarp orders memory accesses.
    void* ordering = op == WarpOp::kSync ? meeting->ordering : nullptr;
    if (ordering) release(ordering);
    meeting->arrived |= bit;
    complete_meetings(warp, thread.rank / 32);
    suspend();
    if (ordering) acquire(ordering);
    return thread.result;
  }

  void* take_shared(std::size_t bytes) {
    Thread& thread = self();
    const std::size_t index = thread.shared_taken++;
    Unowned scope;
    if (index == shared_.count()) {
      const std::size_t taken = shared_.bytes() + SharedArrays::rounded(bytes);
      if (taken > launch_.shared_bytes) {
        fail(thread, "takes " + std::to_string(taken) +
                         " bytes of shared memory, the launch gave " +
                         std::to_string(launch_.shared_bytes));
      }
      shared_.add(bytes);
    }
    if (shared_[index].bytes != bytes)
      fail(thread, "threads take shared arrays of different sizes");
    return shared_[index].begin;
  }

  Place place_of(const void* address) {
    if (const auto offset = shared_.offset_of(address)) return {Memory::kShared, *offset};
    // Kernels take their parameters from the host's stack, and their coordinates from here.
    const bool is_private = Range{self().fiber.stack, kStackBytes}.has(address) ||
                            Range{threads_.data(), threads_.size() * sizeof(Thread)}.has(address) ||
                            address == &current || host_stack_.has(address);
    const Memory memory = is_private ? Memory::kPrivate : Memory::kGlobal;
    return {memory, reinterpret_cast<std::uintptr_t>(address)};
  }

  PendingCopies& copies() { return copies_; }

  void count_load(std::size_t bytes) { ++launch_.loads[unsigned(__builtin_ctzll(bytes))]; }
  void count_store(std::size_t bytes) { ++launch_.stores[unsigned(__builtin_ctzll(bytes))]; }

 private:
  // By this address ThreadSanitizer knows one barrier or __syncwarp().
  void* new_ordering() { return &orderings_[last_ordering_++ % std::size(orderings_)]; }

  void suspend() { switch_context(self().context, host_); }

  void run_block(unsigned index) {
    struct Finally {
      Engine& engine;
      ~Finally() { engine.end_block(); }
    } finally{*this};
    start_block(index);
    while (turns_.any()) {
      Thread& thread = turns_.take();
      if (!thread.fiber.stack) start_thread(thread);
      current = &thread;
      switch_context(host_, thread.context);
      current = nullptr;
      if (exception_) std::rethrow_exception(std::exchange(exception_, nullptr));
      if (thread.returned) end_thread(thread);
    }
    if (live_) {
      const bool returned = live_ < threads_.size();
      fail("deadlock: no thread can go on" +
           std::string(returned ? ", and some have returned before a barrier or warp operation"
                                : "") +
           ":" + waits(threads_));
    }
  }

  void start_block(unsigned index) {
    block_ = index;
    turns_.start_block();
    arrived_ = 0;
    live_ = threads_.size();
    copies_.start_block(threads_.size());
    for (Warp& warp : warps_) warp.lanes = 0, warp.meetings.clear();
    for (unsigned rank = 0; rank < threads_.size(); ++rank) {
      Thread& thread = threads_[rank];
      thread = Thread{};
      thread.thread_idx = {rank, 0, 0}, thread.block_idx = {index, 0, 0};
      thread.block_dim = dim3(unsigned(threads_.size()));
      thread.grid_dim = dim3(unsigned(launch_.blocks));
      thread.rank = rank, thread.lane = rank % 32;
      warps_[rank / 32].lanes |= 1u << thread.lane;
      turns_.add(thread);
    }
  }

  void end_block() {
    Unowned scope;
    if (options().end_block) options().end_block();
    for (Thread& thread : threads_) end_thread(thread);
    shared_.clear();
  }

  void start_thread(Thread& thread) {
    Unowned scope;
    thread.fiber = fibers_.take();
    const auto [stack, tsan_fiber] = thread.fiber;
    void* top = prepare_stack(stack, kStackBytes, [] { engine().thread_main(); });
    thread.context = {top, stack, kStackBytes, tsan_fiber};
    if (__tsan_set_fiber_name) {
      const std::string name =
          "block " + text(thread.block_idx) + " thread " + text(thread.thread_idx);
      __tsan_set_fiber_name(tsan_fiber, name.c_str());
    }
  }

  void end_thread(Thread& thread) {
    if (!thread.fiber.stack) return;
    Unowned scope;
    if (thread.returned) {
      fibers_.give_back(thread.fiber);
    } else {
      if (__tsan_switch_to_fiber) {  // and back: orders the thread's work before the host's
        __tsan_switch_to_fiber(thread.fiber.tsan_fiber, 1);
        __tsan_switch_to_fiber(host_.tsan_fiber, 0);
      }
      fibers_.destroy(thread.fiber);
    }
    thread.fiber.stack = nullptr;
  }

  [[noreturn]] void thread_main() {
    enter_context(nullptr, &host_);
    acquire(&launch_ordering_[0]);
    Thread& thread = self();
    try {
      thread_(argument_);
      if (const std::size_t count = copies_.count())
        fail(thread, "returns before " + std::to_string(count) + " of its copies are done");
      thread.returned = true;
      --live_;
      Warp& warp = warps_[thread.rank / 32];
      warp.lanes &= ~(1u << thread.lane);
      complete_meetings(warp, thread.rank / 32);
      complete_barrier();
    } catch (...) {
      exception_ = std::current_exception();
    }
    release(&launch_ordering_[1]);
    end_context(thread.context, host_);
  }

  // A barrier that some threads have returned before never completes: a deadlock, reported later.
  void complete_barrier() {
    if (arrived_ < threads_.size()) return;
    for (const Thread& thread : threads_) {
      const Wait &wait = thread.wait, &first = threads_[0].wait;
      if (wait.line != first.line || !same(wait.file, first.file)) {
        fail("divergent barrier: the threads of the block wait at different places:" +
             waits(threads_));
      }
    }
    for (Thread& thread : threads_) turns_.add(thread);
    arrived_ = 0;
    ++launch_.barriers;
  }

  // Ends the meetings at which all lanes of the mask have arrived, but for those that have
  // returned.
  void complete_meetings(Warp& warp, unsigned warp_index) {
    auto& meetings = warp.meetings;
    for (std::size_t i = 0; i < meetings.size();) {
      if (meetings[i].arrived != (meetings[i].mask & warp.lanes)) {
        ++i;
        continue;
      }
      const Meeting meeting = meetings[i];
      meetings.erase(meetings.begin() + std::ptrdiff_t(i));
      Thread* lanes = &threads_[warp_index * 32];
      each_lane(meeting.arrived, lanes, [&](const Thread& thread) {
        const unsigned source = thread.wait.source_lane;
        if (meeting.op != WarpOp::kShuffle || meeting.arrived >> source & 1) return;
        fail(thread,
             text(thread.wait) + " reads lane " + std::to_string(source) + ", which takes no part");
      });
      complete(meeting, lanes);
      each_lane(meeting.arrived, lanes, [&](Thread& thread) { turns_.add(thread); });
    }
  }

  std::mutex mutex_;
  const Range host_stack_ = host_stack();  // of the thread that launched first
  Launch launch_{};                        // the one that runs
  void (*thread_)(void*) = nullptr;
  void* argument_ = nullptr;
  Turns turns_;
  std::uint64_t num_launches_ = 0;
  std::exception_ptr exception_;
  Context host_;
  FiberPool fibers_;

  unsigned block_ = 0;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::size_t live_ = 0;
  std::size_t arrived_ = 0;  // at the block's barrier
  void* barrier_ordering_ = nullptr;
  std::uint64_t orderings_[4096] = {}, last_ordering_ = 0;
  std::uint64_t launch_ordering_[2] = {};  // [0]: before the launch, [1]: after a thread
  SharedArrays shared_;
  PendingCopies copies_{turns_};
};

Engine& engine() {
  static Engine engine;
  return engine;
}

}  // namespace

void run(const char* name, const Shape& shape, void (*thread)(void*), void* argument) {
  engine().launch(name, shape, thread, argument);
}

std::uint64_t warp_operation(WarpOp op, const char* name, unsigned mask, std::uint64_t value,
                             unsigned source_lane, const char* file, int line) {
  return engine().warp_operation(op, {name, file, line, mask, value, source_lane});
}

void warp_load_matrices(const char* name, const MatrixLine& mine, const char* file, int line) {
  const auto value = reinterpret_cast<std::uint64_t>(&mine);
  engine().warp_operation(WarpOp::kLoadMatrices, {name, file, line, kWholeWarp, value, 0});
}

void warp_multiply(const MultiplicationList& mine, const char* file, int line) {
  const auto value = reinterpret_cast<std::uint64_t>(&mine);
  engine().warp_operation(WarpOp::kMultiply, {"mma", file, line, kWholeWarp, value, 0});
}

void set_poisoning(bool on) { poisoning = on; }
bool sees_races() { return __tsan_get_current_fiber; }
void add_copy(const Copy& copy) { engine().copies().add(copy); }
void commit_copies() { engine().copies().commit(); }
bool take_copy(int left, Copy& copy) { return engine().copies().take(left, copy); }

void block_barrier(const char* name, const char* file, int line) {
  engine().barrier({name, file, line, 0, 0, 0});
}

void* take_shared(std::size_t bytes) { return engine().take_shared(bytes); }
void count_load(const void* address, std::size_t bytes) {
  engine().count_load(bytes);
  if (options().access) options().access(address, bytes, __builtin_return_address(0));
}
void count_store(const void* address, std::size_t bytes) {
  engine().count_store(bytes);
  if (options().access) options().access(address, bytes, __builtin_return_address(0));
}
void preempt() { engine().preempt(); }
Place place_of(const void* address) { return engine().place_of(address); }

}  // namespace cusim
