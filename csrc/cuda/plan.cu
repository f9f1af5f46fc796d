// Plan: give every kept route a row, by a stable counting sort of the queue.
//
// The queue is cut into chunks of equal length, one for each block. count() counts the routes of
// every chunk and expert. place() then knows, for its chunk, how many routes of each expert come
// before it, and gives each of its own routes its rank; a rank below the expert's room is a row.
// A single chunk needs no count(): two launches, or one.
//
// With a priority the sort makes a dropless plan in scratch memory, which groups the routes by
// expert in the order of the queue, and keep() in plan_keep.cuh lets each expert choose from its
// group: a third launch. No order of threads shows in a result: atomics only count.

#include "plan_keep.cuh"

namespace moe_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kOneChunk = 4096;      // routes up to which one block does all
constexpr int64_t kMinChunk = 1024;      // routes of a chunk, at least
constexpr int64_t kMaxChunks = 128;      // since place() reads the counts of all
constexpr int kAhead = 4;                // places that a thread reads at once
constexpr int kCountsAhead = 16;         // and counts
constexpr int64_t kRowsPerBlock = 4096;  // to look through for empty ones, beside one chunk

// The order in which routes ask for rows. route = t * K + k.
struct Queue {
  const int32_t* expert_ids;
  int64_t num_routes, num_tokens, top_k, chunk;
  int num_experts;
  bool choice_major;

  __device__ int64_t route_at(int64_t place) const {
    if (!choice_major) return place;
    // Below 2 ** 31, where divisions are cheap.
    const unsigned p = static_cast<unsigned>(place), T = static_cast<unsigned>(num_tokens);
    return p % T * top_k + p / T;
  }
  // Negative where the route asks no expert.
  __device__ int expert_of(int64_t route) const {
    const int e = load(expert_ids + route);
    return e < num_experts ? e : -1;
  }
};

int64_t chunk_size(int64_t num_routes) {
  if (num_routes <= kOneChunk) return kOneChunk;
  const int64_t least = divide_up(num_routes, kMaxChunks);
  return divide_up(least > kMinChunk ? least : kMinChunk, kThreads) * kThreads;
}

int64_t num_chunks(int64_t num_routes) { return divide_up(num_routes, chunk_size(num_routes)); }

KERNEL(kThreads)
void count_kernel(Queue queue, int32_t* counts) {  // counts: [chunks, E]
  const int E = queue.num_experts;
  SharedMemory shared;
  int* mine = shared.take<int>(E);
  for (int e = threadIdx.x; e < E; e += kThreads) mine[e] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * queue.chunk;
  const int64_t end = min(begin + queue.chunk, queue.num_routes);
  for (int64_t place = begin + threadIdx.x; place < end; place += kThreads) {
    const int e = queue.expert_of(queue.route_at(place));
    if (e >= 0) atomicAdd(&mine[e], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += kThreads) {
    store(counts + blockIdx.x * int64_t{E} + e, mine[e]);
  }
}

// The number of rows that an expert's routes and their alignment take.
struct Room {
  int capacity;    // -1: dropless
  unsigned align;  // at most R, where there is a route
  __device__ int of(int load) const {
    if (capacity >= 0) return capacity;
    if (align == 1 || load == 0) return load;
    return static_cast<int>((load + align - 1) / align * align);
  }
};

// offsets[0 .. E], the sums of the rooms before each expert. Called by the whole block, and ends
// with a barrier; a thread reads the loads of the experts threadIdx.x + i * kThreads. of_warps has
// room for a sum of each warp.
__device__ void scan_rooms(const int* load, int num_experts, const Room& room, int* of_warps,
                           int* offsets) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int before = 0;
  if (threadIdx.x == 0) offsets[0] = 0;
  for (int first = 0; first < num_experts; first += kThreads) {
    const int e = first + static_cast<int>(threadIdx.x);
    int sum = running_sum(e < num_experts ? room.of(load[e]) : 0);
    if (lane == kWarp - 1) of_warps[warp] = sum;
    __syncthreads();
    sum += before;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) sum += of_warps[w];
      before += of_warps[w];
    }
    if (e < num_experts) offsets[e + 1] = sum;
    __syncthreads();
  }
}

// Adds up the routes of every expert: in the chunks before this block's, and in all. The threads
// share the counts [chunks, E] by columns, and by parts of a column where there are threads left.
__device__ void sum_counts(const int32_t* counts, int num_experts, int* before, int* total) {
  const int columns = min(num_experts, kThreads), parts = kThreads / columns;
  const int part = threadIdx.x / columns, chunks = gridDim.x, mine = blockIdx.x;
  if (part >= parts) return;
  for (int e = threadIdx.x % columns; e < num_experts; e += columns) {
    int below = 0, sum = 0;
    for (int first = part; first < chunks; first += kCountsAhead * parts) {
      int in[kCountsAhead];
#pragma unroll
      for (int i = 0; i < kCountsAhead; ++i) {
        const int c = first + i * parts;
        in[i] = c < chunks ? load(counts + c * int64_t{num_experts} + e) : 0;
      }
#pragma unroll
      for (int i = 0; i < kCountsAhead; ++i) {
        if (first + i * parts < mine) below += in[i];
        sum += in[i];
      }
    }
    atomicAdd(&before[e], below);
    atomicAdd(&total[e], sum);
  }
}

// Every warp of the grid takes an expert, or a part of its empty rows where there are warps left;
// the rows past all experts are everyone's.
__device__ void clear_empty_rows(const int* offsets, const int* load, int num_experts,
                                 int64_t num_rows, int32_t* sources) {
  const int lane = threadIdx.x % kWarp, num_warps = gridDim.x * kWarps;
  const int first_warp = blockIdx.x * kWarps + threadIdx.x / kWarp;
  const int parts = max(num_warps / num_experts, 1);
  for (int i = first_warp; i < num_experts * parts; i += num_warps) {
    const int e = i / parts, first = i % parts * kWarp + lane;
    for (int64_t row = int64_t{offsets[e]} + load[e] + first; row < offsets[e + 1];
         row += parts * kWarp) {
      store(sources + row, -1);
    }
  }
  const int64_t stride = int64_t{num_warps} * kWarp;
  for (int64_t row = int64_t{offsets[num_experts]} + first_warp * kWarp + lane; row < num_rows;
       row += stride) {
    store(sources + row, -1);
  }
}

// A warp walks its part of a chunk in the order of the queue, 32 places at a time; it reads kAhead
// times as many at once. body(route or -1, expert or negative) is called by all lanes together.
template <typename Body>
__device__ void for_each_place(const Queue& queue, int64_t chunk, const Body& body) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t part = queue.chunk / kWarps;
  const int64_t begin = chunk * queue.chunk + warp * part;
  const int64_t end = min(begin + part, queue.num_routes);
  for (int64_t first = begin; first < end; first += kAhead * kWarp) {
    int64_t routes[kAhead];
    int expert_ids[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t place = first + i * kWarp + lane;
      routes[i] = place < end ? queue.route_at(place) : -1;
      expert_ids[i] = place < end ? queue.expert_of(routes[i]) : -1;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) body(routes[i], expert_ids[i]);
  }
}

// counts: null where there is one chunk. Then every block counts it, the first gives rows to its
// routes, and the others only help with the empty rows.
KERNEL(kThreads, 4)
void place_kernel(Queue queue,
                  const int32_t* __restrict__ counts,  // [chunks, E] or null
                  Room room, int64_t num_rows,
                  int32_t* __restrict__ slots,        // [T, K]
                  int32_t* __restrict__ sources,      // [R]
                  int32_t* __restrict__ all_offsets,  // [E+1]
                  int32_t* __restrict__ all_load) {   // [E]
  const int E = queue.num_experts, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  SharedMemory shared;
  int* cursors = shared.take<int>(int64_t{kWarps} * E);  // [warps, E]
  int* offsets = shared.take<int>(E + 1);
  int* before = shared.take<int>(E);
  int* total = shared.take<int>(E);
  int* of_warps = shared.take<int>(kWarps);
  int* cursor = cursors + warp * E;

  const int64_t chunk = counts ? blockIdx.x : 0;

  // Count each warp's part, and in all chunks.
  for (int e = lane; e < E; e += kWarp) cursor[e] = 0;
  for (int e = threadIdx.x; e < E; e += kThreads) before[e] = total[e] = 0;
  __syncthreads();
  for_each_place(queue, chunk, [&](int64_t, int e) {
    if (e >= 0) atomicAdd(&cursor[e], 1);
  });
  if (counts) sum_counts(counts, E, before, total);
  __syncthreads();

  // The ranks that each warp starts from.
  for (int e = threadIdx.x; e < E; e += kThreads) {
    int rank = before[e];
    for (int w = 0; w < kWarps; ++w) {
      const int count = cursors[w * E + e];
      cursors[w * E + e] = rank;
      rank += count;
    }
    if (!counts) total[e] = rank;
  }
  scan_rooms(total, E, room, of_warps, offsets);

  const auto place = [&](int64_t route, int e) {
    // Lanes of the same expert are in the order of the queue.
    const unsigned same = __match_any_sync(kAllLanes, e);
    const int earlier = __popc(same & ((1u << lane) - 1));
    const int rank = e >= 0 ? cursor[e] + earlier : 0;
    __syncwarp();
    if (e >= 0 && earlier == 0) cursor[e] += __popc(same);
    __syncwarp();
    if (route < 0) return;
    const bool kept = e >= 0 && rank < offsets[e + 1] - offsets[e];
    store(slots + route, kept ? offsets[e] + rank : -1);
    if (kept) store(sources + offsets[e] + rank, static_cast<int32_t>(route));
  };
  if (counts || blockIdx.x == 0) for_each_place(queue, chunk, place);

  clear_empty_rows(offsets, total, E, num_rows, sources);
  if (blockIdx.x > 0) return;
  for (int e = threadIdx.x; e < E; e += kThreads) store(all_load + e, total[e]);
  for (int e = threadIdx.x; e <= E; e += kThreads) store(all_offsets + e, offsets[e]);
}

void sort_queue(const Plan& call, const Room& room, int64_t num_rows, int32_t* sources,
                int32_t* offsets, CUstream_st* stream) {
  const int64_t N = call.num_tokens * call.top_k, chunks = num_chunks(N);
  const Queue queue{
      call.expert_ids,  N, call.num_tokens, call.top_k, chunk_size(N), call.num_experts,
      call.choice_major};
  const int32_t* counts = nullptr;
  if (chunks > 1) {
    launch("plan_count", count_kernel, chunks, kThreads, shared_bytes<int>(call.num_experts),
           stream, queue, call.scratch);
    counts = call.scratch;
  }
  const std::size_t shared = shared_bytes<int>(int64_t{kWarps} * call.num_experts) +
                             shared_bytes<int>(call.num_experts + 1) +
                             2 * shared_bytes<int>(call.num_experts) + shared_bytes<int>(kWarps);
  int64_t blocks = chunks;
  if (!counts) {
    // Also where nothing asks: offsets, load and empty rows are written.
    blocks = divide_up(num_rows, kRowsPerBlock);
    blocks = blocks < 1 ? 1 : blocks > kMaxChunks ? kMaxChunks : blocks;
  }
  launch("plan_place", place_kernel, blocks, kThreads, shared, stream, queue, counts, room,
         num_rows, call.slots, sources, offsets, call.load);
}

int64_t counts_size(int64_t num_routes, int64_t num_experts) {
  return num_chunks(num_routes) * num_experts;
}

}  // namespace

int64_t plan_scratch(int64_t num_routes, int64_t num_experts, bool with_priority) {
  const int64_t grouped = with_priority ? 2 * num_routes + num_experts + 1 : 0;
  return counts_size(num_routes, num_experts) + grouped;
}

void plan(const Plan& call, CUstream_st* stream) {
  if (!call.priority || call.capacity < 0) {
    const Room room{static_cast<int>(call.capacity), static_cast<unsigned>(call.align)};
    return sort_queue(call, room, call.num_rows, call.sources, call.offsets, stream);
  }
  const int64_t N = call.num_tokens * call.top_k;
  int32_t* group = call.scratch + counts_size(N, call.num_experts);
  int32_t* starts = group + N;
  unsigned* keys = reinterpret_cast<unsigned*>(starts + call.num_experts + 1);
  sort_queue(call, {-1, 1}, N, group, starts, stream);
  launch("plan_keep", keep_kernel, call.num_experts, kKeepThreads, keep_shared_bytes(), stream,
         call.priority, group, starts, call.load, call.capacity, keys, call.slots, call.sources,
         call.offsets);
}

}  // namespace moe_ext::cuda
