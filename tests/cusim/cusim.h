// Runs CUDA kernels, written in ordinary CUDA C++, on the CPU.
//
// A .cu file is compiled as C++ with this header in place of the CUDA runtime's. Every CUDA thread
// is a fiber that gives way at barriers and warp operations only, so a run is deterministic for a
// given order and seed. Misuse of a barrier or of a warp operation ends the launch with an
// exception that names the threads and source lines. AddressSanitizer and ThreadSanitizer are told
// of the fibers and of what CUDA says orders memory, so they find what they find in threads: see
// README.md.
//
// Shared memory is what launch.cuh's SharedMemory hands out; there is no __shared__ here.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#undef __shared__
#define __launch_bounds__(...)
#define threadIdx (::cusim::current->thread_idx)
#define blockIdx (::cusim::current->block_idx)
#define blockDim (::cusim::current->block_dim)
#define gridDim (::cusim::current->grid_dim)

// Default arguments that capture the caller's position.
#define CUSIM_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace cusim {

// ---- Host interface -----------------------------------------------------------------------------

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The card that kernels run on.
struct Card {
  std::size_t shared_per_block, shared_per_multiprocessor;
  int multiprocessors;
};
// The least of what every architecture gives that is built for: 7.5 has the least shared memory.
constexpr Card kLeast{64 << 10, 64 << 10, 2};

// The order in which runnable threads, and the blocks of a grid, take their turns.
enum class Order { kForward, kReverse, kRandom };

struct Launch;

struct Options {
  Card card = kLeast;
  Order order = Order::kForward;
  std::uint64_t seed = 0;  // for Order::kRandom
  bool recording = false;  // keep a Launch of every launch
  // Called at every access to global memory, with the place in the machine code.
  void (*access)(const void* address, std::size_t bytes, void* site) = nullptr;
  void (*end_block)() = nullptr;
  void (*end_launch)(const Launch& launch) = nullptr;
};

// Changes apply to later launches.
Options& options();

// Whether this is a program with ThreadSanitizer.
bool sees_races();

// Sets the order, and the seed, by name: forward, reverse, or random<seed>.
void set_order(const std::string& name);

// Accesses to global memory by their size: [i] counts those of 1 << i bytes, up to 16.
using Accesses = std::array<std::uint64_t, 5>;

struct Launch {
  std::string name;
  std::size_t blocks, threads, shared_bytes;
  Accesses loads, stores;
  std::uint64_t barriers;  // of all blocks
};

// The launches made while options().recording was set; the caller empties the list.
std::vector<Launch>& launches();

struct Shape {
  std::size_t blocks, threads, shared_bytes;
};

void run(const char* name, const Shape& shape, void (*thread)(void*), void* argument);

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Shape& shape,
            Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...));
  const auto with = [&](Parameters... parameters) {
    auto thread = [&] { kernel(parameters...); };
    run(name, shape, [](void* t) { (*static_cast<decltype(thread)*>(t))(); }, &thread);
  };
  with(std::forward<Arguments>(arguments)...);
}

// ---- Engine interface, used by the device functions below ---------------------------------------

struct Coordinates {
  uint3 thread_idx, block_idx;
  dim3 block_dim, grid_dim;
  unsigned lane;
  unsigned shared_taken;  // arrays of shared memory it has asked for
};
extern Coordinates* current;  // the running thread

enum class WarpOp : std::uint8_t {
  kSync,
  kShuffle,
  kBallot,
  kMatch,
  kMin,
  kMax,
  kLoadMatrices,
  kMultiply
};

// Joins the lanes of `mask`; returns this lane's result.
std::uint64_t warp_operation(WarpOp op, const char* name, unsigned mask, std::uint64_t value,
                             unsigned source_lane, const char* file, int line);
// Joins the threads of the block.
void block_barrier(const char* name, const char* file, int line);
// The block's next array of shared memory: of this very size, filled with 0xff, the same for every
// thread that asks for its next one.
void* take_shared(std::size_t bytes);
void count_load(const void* address, std::size_t bytes);
void count_store(const void* address, std::size_t bytes);
void preempt();  // lets another thread run, now and then

enum class Memory : std::uint8_t { kGlobal, kShared, kPrivate };

// Where the running thread finds an address. The offset is from the start of the block's shared
// memory, in other memory the address itself.
struct Place {
  Memory memory;
  std::uint64_t offset;
};
Place place_of(const void* address);

// A result of the special function unit: two units in the last place too small, and 0 where a
// number is too small to be normal.
inline float approximate(float x) {
  if (std::fabs(x) < 0x1p-126f) return std::copysign(0.0f, x);
  unsigned bits = 0;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isfinite(x) && (bits & 0x7fffffff) > 0x00800002) bits -= 2;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

template <typename To, typename From>
To bits_as(const From& from) {
  To to{};
  std::memcpy(static_cast<void*>(&to), &from,
              sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
  return to;
}

template <typename T>
T shuffle(const char* name, unsigned mask, T value, int source, bool in_segment, const char* file,
          int line) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "CUDA has no shuffle for this type");
  const unsigned lane = in_segment ? unsigned(source) : current->lane;
  return bits_as<T>(warp_operation(WarpOp::kShuffle, name, mask, bits_as<std::uint64_t>(value),
                                   lane, file, line));
}

}  // namespace cusim

// ---- Synchronisation ----------------------------------------------------------------------------

inline void __syncthreads(CUSIM_SITE) { cusim::block_barrier("__syncthreads", file, line); }
inline void __syncwarp(unsigned mask = 0xffffffff, CUSIM_SITE) {
  cusim::warp_operation(cusim::WarpOp::kSync, "__syncwarp", mask, 0, 0, file, line);
}

// ---- Warp operations ----------------------------------------------------------------------------

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUSIM_SITE) {
  const int segment = int(cusim::current->lane) & -width;
  const int lane = segment + (source & (width - 1));
  return cusim::shuffle("__shfl_sync", mask, value, lane, true, file, line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUSIM_SITE) {
  const int lane = int(cusim::current->lane), source = lane - int(delta);
  const bool inside = source >= (lane & -width);
  return cusim::shuffle("__shfl_up_sync", mask, value, source, inside, file, line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUSIM_SITE) {
  const int lane = int(cusim::current->lane), source = lane ^ lanes;
  const bool inside = source < (lane & -width) + width;
  return cusim::shuffle("__shfl_xor_sync", mask, value, source, inside, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUSIM_SITE) {
  return unsigned(cusim::warp_operation(cusim::WarpOp::kBallot, "__ballot_sync", mask,
                                        predicate != 0, 0, file, line));
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, CUSIM_SITE) {
  return unsigned(cusim::warp_operation(cusim::WarpOp::kMatch, "__match_any_sync", mask,
                                        cusim::bits_as<std::uint64_t>(value), 0, file, line));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, CUSIM_SITE) {
  return unsigned(
      cusim::warp_operation(cusim::WarpOp::kMin, "__reduce_min_sync", mask, value, 0, file, line));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, CUSIM_SITE) {
  return unsigned(
      cusim::warp_operation(cusim::WarpOp::kMax, "__reduce_max_sync", mask, value, 0, file, line));
}

// ---- Atomics, bits ------------------------------------------------------------------------------

// Orders no other access.
template <typename T>
T atomicAdd(T* address, T value) {
  cusim::preempt();
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(std::uint64_t(x) * y >> 32); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __uint_as_float(unsigned x) { return cusim::bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return cusim::bits_as<unsigned>(x); }
inline long long __double_as_longlong(double x) { return cusim::bits_as<long long>(x); }

template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
