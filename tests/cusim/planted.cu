// Kernels with one planted fault each, and some of them written right: planted CASE ORDER, where
// ORDER is forward, reverse or random<seed>. test_programs.py has what each build must say of them.
//
// Exit 0: the result is as intended. 1: it is wrong. 2: the launch ended with an error.

#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "planted_tensor.cuh"
#include "vec.cuh"

using namespace moe_ext::cuda;

namespace {

__global__ void out_of_bounds_global(int* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) store(out + i, 1);  // FAULT: i < n
}

__global__ void out_of_bounds_shared(int* out, int n) {
  SharedMemory shared;
  int* first = shared.take<int>(n);
  int* second = shared.take<int>(n);
  first[threadIdx.x] = second[threadIdx.x] = 1;
  if (threadIdx.x == 0) first[n] = 2;  // FAULT: the first array has n elements
  __syncthreads();
  store(out + threadIdx.x, second[threadIdx.x]);
}

__global__ void out_of_bounds_local(int* out, int n) {
  int local[4] = {}, *numbers = local;
  asm volatile("" : "+r"(numbers));             // so that compilers do not know its size
  for (int i = 0; i <= n; ++i) numbers[i] = i;  // FAULT: i < n
  store(out + threadIdx.x, local[threadIdx.x % 4]);
}

__global__ void too_much_shared(int* out) {
  SharedMemory shared;
  shared.take<int>(4);
  int* more = shared.take<int>(1);  // FAULT: the launch gave 16 bytes
  more[0] = 1;
  store(out, 1);
}

template <bool kBarrier>
__global__ void reverse(int* out) {
  SharedMemory shared;
  int* tile = shared.take<int>(blockDim.x);
  tile[threadIdx.x] = threadIdx.x;
  if (kBarrier) __syncthreads();  // FAULT without it
  store(out + threadIdx.x, tile[blockDim.x - 1 - threadIdx.x]);
}

// The second barrier keeps a fast warp from overwriting what a slow one still reads.
template <bool kBarrier>
__global__ void rounds(int* out) {
  SharedMemory shared;
  int* value = shared.take<int>(1);
  for (int round = 0; round < 4; ++round) {
    if (threadIdx.x == 0) *value = round;
    __syncthreads();
    store(out + round * blockDim.x + threadIdx.x, *value);
    if (kBarrier) __syncthreads();  // FAULT without it
  }
}

template <bool kAtomic>
__global__ void count(int* out) {
  SharedMemory shared;
  int* total = shared.take<int>(1);
  if (threadIdx.x == 0) *total = 0;
  __syncthreads();
  if (kAtomic) {
    atomicAdd(total, 1);
  } else {
    *total += 1;  // FAULT: not atomic
  }
  __syncthreads();
  if (threadIdx.x == 0) store(out, *total);
}

__global__ void racy_blocks(int* out) {
  if (threadIdx.x == 0) store(out, load(out) + 1);  // FAULT: blocks are not ordered
}

template <bool kSync>
__global__ void warp_exchange(int* out) {
  SharedMemory shared;
  int* lanes = shared.take<int>(32);
  lanes[threadIdx.x] = threadIdx.x;
  if (kSync) {
    __syncwarp();
  } else {
    __ballot_sync(kAllLanes, 1);  // FAULT: waits for the lanes but orders no memory
  }
  store(out + threadIdx.x, lanes[threadIdx.x ^ 1]);
}

__global__ void uninitialised_shared(int* out) {
  SharedMemory shared;
  int* counts = shared.take<int>(32);  // FAULT: not cleared
  atomicAdd(&counts[threadIdx.x % 32], 1);
  __syncthreads();
  if (threadIdx.x < 32) store(out + threadIdx.x, counts[threadIdx.x]);
}

__global__ void order_of_atomics(int* counter, int* out) {
  store(out + blockIdx.x * blockDim.x + threadIdx.x, atomicAdd(counter, 1));  // FAULT
}

__global__ void barrier_after_return(int* out, int n) {
  if (static_cast<int>(threadIdx.x) >= n) return;  // FAULT: before the barrier
  __syncthreads();
  store(out + threadIdx.x, 1);
}

__global__ void barrier_in_branches(int* out) {
  if (threadIdx.x < 40) {
    __syncthreads();
    store(out + threadIdx.x, 1);
  } else {
    __syncthreads();  // FAULT: not the same barrier
    store(out + threadIdx.x, 2);
  }
}

__global__ void barrier_and_shuffle(int* out) {
  if (threadIdx.x < 16) {  // FAULT: half a warp, with the mask of all
    store(out + threadIdx.x, __shfl_xor_sync(kAllLanes, static_cast<int>(threadIdx.x), 8));
  }
  __syncthreads();
}

__global__ void masks_disagree(int* out) {
  const unsigned mask = threadIdx.x < 16 ? 0xffffff : kAllLanes;  // FAULT
  store(out + threadIdx.x, static_cast<int>(__reduce_max_sync(mask, threadIdx.x)));
}

__global__ void operations_disagree(int* out) {
  const int mine = threadIdx.x;
  if (mine % 2) {  // FAULT: another operation in each branch
    store(out + mine, static_cast<int>(__ballot_sync(kAllLanes, 1)));
  } else {
    store(out + mine, __shfl_sync(kAllLanes, mine, 0));
  }
}

__global__ void shuffle_from_absent(int* out) {
  // FAULT: the warp has 20 threads
  store(out + threadIdx.x, __shfl_xor_sync(kAllLanes, static_cast<int>(threadIdx.x), 16));
}

__global__ void misaligned(const float* in, int* out) {
  const auto* packs = reinterpret_cast<const Pack<float, 4>*>(in + 1);  // FAULT: + 1
  store(out + threadIdx.x, static_cast<int>(load(packs + threadIdx.x).at[0]));
}

__global__ void nothing() {}

struct Case {
  std::function<void()> launch;
  int results = 0;  // of the output that are as expected
  std::function<int(int)> expected = nullptr;
};

// A launch of one kernel, for later.
template <typename... Parameters, typename... Arguments>
std::function<void()> launched(void (*kernel)(Parameters...), int blocks, int threads, int shared,
                               Arguments... arguments) {
  return [=] { launch("f", kernel, blocks, threads, shared, nullptr, arguments...); };
}

int neighbour(int i) { return i ^ 1; }

int product(int i) { return planted::sum_of_products(i / 16, i % 16); }

// Two slices of 16 x 16 numbers.
template <typename Number>
std::vector<__nv_bfloat16> slices(const Number& number) {
  std::vector<__nv_bfloat16> all;
  for (int i = 0; i < 512; ++i) {
    all.push_back(__nv_bfloat16(static_cast<float>(number(i / 256, i / 16 % 16, i % 16))));
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  // Each of exactly so many elements: AddressSanitizer sees the first access past the end.
  std::vector<int> outs(4096), ints(128), counters(1);
  std::vector<float> some(128);
  int *out = outs.data(), *small = ints.data(), *counter = counters.data();
  float* floats = some.data();
  std::map<std::string, Case> cases{
      {"out_of_bounds_global", {launched(out_of_bounds_global, 3, 64, 0, small, 128)}},
      {"out_of_bounds_shared", {launched(out_of_bounds_shared, 1, 33, 288, out, 33)}},
      {"out_of_bounds_local", {launched(out_of_bounds_local, 1, 32, 0, out, 4)}},
      {"too_much_shared", {launched(too_much_shared, 1, 1, 16, out)}},
      {"racy_blocks", {launched(racy_blocks, 4, 64, 0, out), 1, [](int) { return 4; }}},
      {"warp_exchange", {launched(warp_exchange<false>, 1, 32, 128, out), 32, neighbour}},
      {"right_warp_exchange", {launched(warp_exchange<true>, 1, 32, 128, out), 32, neighbour}},
      {"uninitialised_shared",
       {launched(uninitialised_shared, 1, 128, 128, out), 32, [](int) { return 4; }}},
      {"order_of_atomics",
       {launched(order_of_atomics, 2, 64, 0, counter, out), 128, [](int i) { return i; }}},
      {"barrier_after_return", {launched(barrier_after_return, 1, 64, 0, out, 50)}},
      {"barrier_in_branches", {launched(barrier_in_branches, 1, 64, 0, out)}},
      {"barrier_and_shuffle", {launched(barrier_and_shuffle, 1, 64, 0, out)}},
      {"masks_disagree", {launched(masks_disagree, 1, 32, 0, out)}},
      {"operations_disagree", {launched(operations_disagree, 1, 32, 0, out)}},
      {"shuffle_from_absent", {launched(shuffle_from_absent, 1, 20, 0, out)}},
      {"misaligned", {launched(misaligned, 1, 16, 0, floats, out)}},
      {"too_many_threads", {launched(nothing, 1, 1056, 0)}},
      {"right_much_shared",
       {launched(reverse<true>, 1, 64, 64 << 10, out), 64, [](int i) { return 63 - i; }}},
      {"more_shared_than_there_is", {launched(nothing, 1, 32, (64 << 10) + 16)}}};
  const auto lefts = slices(planted::left_number), rights = slices(planted::right_number);
  const auto plant = [&](const char* name, auto kernel, int results) {
    const auto* left = reinterpret_cast<const uint4*>(lefts.data());
    const auto* right = reinterpret_cast<const uint4*>(rights.data());
    cases[name] = {launched(kernel, 1, 64, 2048, left, right, out), results, product};
  };
  using planted::Fault;
  plant("right_product", planted::multiply_slices<Fault::kNone>, 256);
  plant("short_wait", planted::multiply_slices<Fault::kShortWait>, 256);
  plant("product_without_barrier", planted::multiply_slices<Fault::kNoBarrier>, 256);
  plant("swapped_words", planted::multiply_slices<Fault::kSwappedWords>, 256);
  plant("wrong_place", planted::multiply_slices<Fault::kWrongPlace>, 256);
  plant("not_transposed", planted::multiply_slices<Fault::kNotTransposed>, 256);
  plant("copies_on_their_way", planted::multiply_slices<Fault::kNoWait>, 256);
  cases["misaligned_copy"] = {launched(planted::misaligned_copy, 1, 1, 16, floats)};
  for (const int n : {64, 256, 1024}) {
    for (const bool right : {false, true}) {
      const std::string prefix = right ? "right_" : "", size = "_" + std::to_string(n);
      cases[prefix + "reverse" + size] = {
          launched(right ? reverse<true> : reverse<false>, 1, n, n * int{sizeof(int)}, out), n,
          [=](int i) { return n - 1 - i; }};
      cases[prefix + "rounds" + size] = {
          launched(right ? rounds<true> : rounds<false>, 1, n, 16, out), 4 * n,
          [=](int i) { return i / n; }};
      cases[prefix + "count" + size] = {launched(right ? count<true> : count<false>, 1, n, 16, out),
                                        1, [=](int) { return n; }};
    }
  }

  if (argc < 3) {
    for (const auto& named : cases) std::puts(named.first.c_str());
    return 0;
  }
  cusim::set_order(argv[2]);
  const Case& chosen = cases.at(argv[1]);
  try {
    chosen.launch();
  } catch (const std::runtime_error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  for (int i = 0; i < chosen.results; ++i) {
    if (out[i] == chosen.expected(i)) continue;
    std::printf("out[%d] is %d, not %d\n", i, out[i], chosen.expected(i));
    return 1;
  }
  return 0;
}
