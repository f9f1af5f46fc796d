// The engine of cusim: fibers and their turns, barriers, warp operations, shared memory.
//
// Compile this file without -fsanitize: its own data passes between fibers by design, and it tells
// the sanitizers itself what orders the fibers' accesses.

#include "cusim.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iterator>
#include <map>
#include <mutex>
#include <numeric>

#include "fiber.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace cusim {

Coordinates* current = nullptr;

Options& options() {
  static Options options;
  return options;
}

void set_order(const std::string& name) {
  if (name == "forward" || name == "reverse") {
    options().order = name == "forward" ? Order::kForward : Order::kReverse;
  } else if (name.rfind("random", 0) == 0 && name.size() > 6 &&
             name.find_first_not_of("0123456789", 6) == std::string::npos) {
    options().order = Order::kRandom;
    options().seed = std::stoull(name.substr(6));
  } else {
    throw std::invalid_argument("order must be forward, reverse or random<seed>, got " + name);
  }
}

std::vector<Launch>& launches() {
  static std::vector<Launch> launches;
  return launches;
}

namespace {

constexpr std::size_t kMaxSharedBytes = 48 << 10;  // what a block may have without asking for more

// ---- Threads, warps and the block that runs -----------------------------------------------------

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

class Engine {
 public:
  void launch(const char* name, const Shape& shape, void (*thread)(void*), void* argument) {
    std::lock_guard lock(mutex_);
    struct Finally {
      Engine& engine;
      // Not sooner: no block comes after another.
      ~Finally() { acquire(&engine.launch_ordering_[1]); }
    } finally{*this};
    name_ = name, shape_ = &shape, thread_ = thread, argument_ = argument;
    loads_ = {}, stores_ = {};
    check_shape();
    random_state_ = options().seed * 0x9e3779b97f4a7c15u + ++num_launches_;
    if (__tsan_get_current_fiber) host_.tsan_fiber = __tsan_get_current_fiber();
    threads_.resize(shape.threads);
    warps_.resize((threads_.size() + 31) / 32);
    for (Warp& warp : warps_) warp.meetings.reserve(32);
    fibers_.prepare(threads_.size());
    release(&launch_ordering_[0]);

    std::vector<unsigned> order(shape.blocks);
    std::iota(order.begin(), order.end(), 0u);
    if (options().order == Order::kReverse) std::reverse(order.begin(), order.end());
    if (options().order == Order::kRandom) {
      for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
    }
    for (unsigned block : order) run_block(block);
    if (options().recording) {
      launches().push_back(
          {name, shape.blocks, shape.threads, shape.shared_bytes, loads_, stores_});
    }
  }

  Thread& self() { return static_cast<Thread&>(*current); }

  // Ends the launch: the other threads that have not returned are abandoned where they are.
  [[noreturn]] void fail(const std::string& what) {
    std::string message = "cusim: " + what + "\n  in block " + std::to_string(block_) + " of " +
                          std::to_string(shape_->blocks) + " x " + std::to_string(shape_->threads) +
                          " of " + name_;
    if (options().order == Order::kRandom) message += ", seed " + std::to_string(options().seed);
    throw Error(message);
  }

  [[noreturn]] void fail(const Thread& thread, const std::string& what) {
    fail("thread " + std::to_string(thread.rank) + ", lane " + std::to_string(thread.lane) + ": " +
         what);
  }

  // Often enough to vary the order of atomic operations when it is random.
  void preempt() {
    if (options().order != Order::kRandom || random() % 4) return;
    make_ready(self());
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
             " wait for each other in different operations or with different masks:" + waits());
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
    if (index == shared_.size()) {
      // Each array starts at a multiple of 16 bytes, as launch.cuh has it.
      shared_bytes_ += (bytes + 15) / 16 * 16;
      if (shared_bytes_ > shape_->shared_bytes) {
        fail(thread, "takes " + std::to_string(shared_bytes_) +
                         " bytes of shared memory, the launch gave " +
                         std::to_string(shape_->shared_bytes));
      }
      shared_.push_back({allocate_shared(bytes), bytes});
    }
    if (shared_[index].bytes != bytes)
      fail(thread, "threads take shared arrays of different sizes");
    return shared_[index].memory;
  }

  void count_load(std::size_t bytes) { ++loads_[unsigned(__builtin_ctzll(bytes))]; }
  void count_store(std::size_t bytes) { ++stores_[unsigned(__builtin_ctzll(bytes))]; }

  static Engine& engine() {
    static Engine engine;
    return engine;
  }

 private:
  struct SharedArray {
    void* memory;
    std::size_t bytes;
  };

  // What ThreadSanitizer knows one barrier or __syncwarp() by.
  void* new_ordering() { return &orderings_[last_ordering_++ % std::size(orderings_)]; }

  std::uint64_t random() {  // splitmix64
    std::uint64_t z = random_state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }

  void suspend() { switch_context(self().context, host_); }

  Thread*& slot(std::size_t i) { return ready_[(ready_first_ + i) % std::size(ready_)]; }

  void make_ready(Thread& thread) {
    thread.waiting = false;
    slot(ready_count_++) = &thread;
  }

  Thread& take_ready() {
    if (options().order == Order::kForward) {
      Thread& thread = *slot(0);
      ++ready_first_, --ready_count_;
      return thread;
    }
    if (options().order == Order::kRandom) {
      std::swap(slot(random() % ready_count_), slot(ready_count_ - 1));
    }
    return *slot(--ready_count_);
  }

  void check_shape() const {
    const Shape& shape = *shape_;
    if (shape.blocks && shape.blocks <= 0x7fffffff && shape.threads && shape.threads <= 1024 &&
        shape.shared_bytes <= kMaxSharedBytes) {
      return;
    }
    throw Error("cusim: invalid launch of " + std::string(name_) + ": " +
                std::to_string(shape.blocks) + " blocks of " + std::to_string(shape.threads) +
                " threads, " + std::to_string(shape.shared_bytes) + " bytes of shared memory");
  }

  void run_block(unsigned index) {
    struct Finally {
      Engine& engine;
      ~Finally() { engine.end_block(); }
    } finally{*this};
    start_block(index);
    while (ready_count_) {
      Thread& thread = take_ready();
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
           ":" + waits());
    }
  }

  void start_block(unsigned index) {
    block_ = index;
    ready_first_ = ready_count_ = arrived_ = 0;
    live_ = threads_.size();
    for (Warp& warp : warps_) warp.lanes = 0, warp.meetings.clear();
    for (unsigned rank = 0; rank < threads_.size(); ++rank) {
      Thread& thread = threads_[rank];
      thread = Thread{};
      thread.thread_idx = {rank, 0, 0}, thread.block_idx = {index, 0, 0};
      thread.block_dim = dim3(unsigned(threads_.size())),
      thread.grid_dim = dim3(unsigned(shape_->blocks));
      thread.rank = rank, thread.lane = rank % 32;
      warps_[rank / 32].lanes |= 1u << thread.lane;
      make_ready(thread);
    }
  }

  void end_block() {
    Unowned scope;
    for (Thread& thread : threads_) end_thread(thread);
    for (const SharedArray& array : shared_) std::free(array.memory);
    shared_.clear();
    shared_bytes_ = 0;
  }

  void start_thread(Thread& thread) {
    Unowned scope;
    thread.fiber = fibers_.take();
    Context& context = thread.context;
    context.stack_size = kStackBytes;
    context.stack_bottom = thread.fiber.stack;
    context.stack_pointer =
        prepare_stack(thread.fiber.stack, kStackBytes, [] { engine().thread_main(); });
    context.tsan_fiber = thread.fiber.tsan_fiber;
    if (__tsan_set_fiber_name) {
      const std::string name =
          "block " + text(thread.block_idx) + " thread " + text(thread.thread_idx);
      __tsan_set_fiber_name(context.tsan_fiber, name.c_str());
    }
  }

  void end_thread(Thread& thread) {
    if (!thread.fiber.stack) return;
    Unowned scope;
    if (thread.returned) {
      fibers_.give_back(thread.fiber);
    } else {
      if (__tsan_switch_to_fiber) {  // and back: what the thread did comes before what the host
                                     // does
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
        fail("divergent barrier: the threads of the block wait at different places:" + waits());
      }
    }
    for (Thread& thread : threads_) make_ready(thread);
    arrived_ = 0;
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
      complete(meeting, &threads_[warp_index * 32]);
    }
  }

  void complete(const Meeting& meeting, Thread* lanes) {
    std::uint64_t ballot = 0, least = ~std::uint64_t{0}, largest = 0;
    for (unsigned rest = meeting.arrived; rest; rest &= rest - 1) {
      const Thread& thread = lanes[__builtin_ctz(rest)];
      ballot |= std::uint64_t(thread.wait.value != 0) << thread.lane;
      least = std::min(least, thread.wait.value);
      largest = std::max(largest, thread.wait.value);
    }
    for (unsigned rest = meeting.arrived; rest; rest &= rest - 1) {
      Thread& thread = lanes[__builtin_ctz(rest)];
      const Wait& wait = thread.wait;
      switch (meeting.op) {
        case WarpOp::kSync: break;
        case WarpOp::kBallot: thread.result = ballot; break;
        case WarpOp::kMin: thread.result = least; break;
        case WarpOp::kMax: thread.result = largest; break;
        case WarpOp::kShuffle:
          if (!(meeting.arrived >> wait.source_lane & 1)) {
            fail(thread, text(wait) + " reads lane " + std::to_string(wait.source_lane) +
                             ", which takes no part");
          }
          thread.result = lanes[wait.source_lane].wait.value;
          break;
        case WarpOp::kMatch:
          thread.result = 0;
          for (unsigned others = meeting.arrived; others; others &= others - 1) {
            const Thread& other = lanes[__builtin_ctz(others)];
            thread.result |= std::uint64_t(other.wait.value == wait.value) << other.lane;
          }
          break;
      }
      make_ready(thread);
    }
  }

  static void* allocate_shared(std::size_t bytes) {
    // aligned_alloc would round the size up, and an access past the end would not be seen.
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, bytes)) throw std::bad_alloc();
    std::memset(memory, 0xff, bytes);  // NaN as a float, -1 as an integer
    return memory;
  }

  // Where the threads wait, as lines of a message.
  std::string waits() const {
    std::map<std::string, std::vector<unsigned>> groups;
    for (const Thread& thread : threads_) {
      const std::string where = thread.returned  ? "returned"
                                : thread.waiting ? text(thread.wait)
                                                 : "running";
      groups[where].push_back(thread.rank);
    }
    std::string out;
    for (const auto& [where, ranks] : groups) out += "\n  threads " + ranges(ranks) + ": " + where;
    return out;
  }

  std::mutex mutex_;
  const char* name_ = nullptr;
  const Shape* shape_ = nullptr;
  void (*thread_)(void*) = nullptr;
  void* argument_ = nullptr;
  std::uint64_t random_state_ = 0, num_launches_ = 0;
  std::exception_ptr exception_;
  Context host_;
  FiberPool fibers_;
  Accesses loads_{}, stores_{};

  unsigned block_ = 0;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::size_t live_ = 0;
  Thread* ready_[1024] = {};  // a ring
  std::size_t ready_first_ = 0, ready_count_ = 0;
  std::size_t arrived_ = 0;  // at the block's barrier
  void* barrier_ordering_ = nullptr;
  std::uint64_t orderings_[4096] = {}, last_ordering_ = 0;
  std::uint64_t launch_ordering_[2] = {};  // [0]: before the launch, [1]: after a thread
  std::vector<SharedArray> shared_;
  std::size_t shared_bytes_ = 0;
};

Engine& engine() { return Engine::engine(); }

}  // namespace

void run(const char* name, const Shape& shape, void (*thread)(void*), void* argument) {
  engine().launch(name, shape, thread, argument);
}

std::uint64_t warp_operation(WarpOp op, const char* name, unsigned mask, std::uint64_t value,
                             unsigned source_lane, const char* file, int line) {
  return engine().warp_operation(op, {name, file, line, mask, value, source_lane});
}

void block_barrier(const char* name, const char* file, int line) {
  engine().barrier({name, file, line, 0, 0, 0});
}

void* take_shared(std::size_t bytes) { return engine().take_shared(bytes); }
void count_load(std::size_t bytes) { engine().count_load(bytes); }
void count_store(std::size_t bytes) { engine().count_store(bytes); }
void preempt() { engine().preempt(); }

}  // namespace cusim
