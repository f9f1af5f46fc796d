// The main loop of every product: a block of four warps adds up kM x kN sums, one slice of both
// operands after another. A ring of slices in shared memory lets copies run ahead:
//
//   ring       slice i      i + 1 ..          to be copied into
//   threads    multiply     on their way      read before the last barrier

#pragma once

#include "operand.cuh"

namespace moe_ext::cuda {

// Rows of a block's sums. For floats, 128 take more registers than there are.
constexpr int kFewRows = 64, kManyRows = 128;
template <typename T>
constexpr int kMostRows = sizeof(T) == 2 ? kManyRows : kFewRows;

// The numbers of a product and its tile. kTerms is 1, or 3 for floats: each float is then the sum
// of two numbers that tensor cores take, and three of their products are added, all but that of
// both small parts. An infinity gives NaN there.
template <typename Element, int kNumTerms, int kRows>
struct Numbers {
  using T = Element;
  static constexpr int kTerms = kNumTerms, kM = kRows, kN = 128;
  // A warp has so many blocks of 16 rows, and of 16 columns.
  static constexpr int kRowBlocks = kM / 32, kColumnBlocks = kN / 32;
  using Sums = Sum16x8[kRowBlocks][kColumnBlocks][2];

  __device__ static int first_row() { return static_cast<int>(threadIdx.x) / kWarp / 2 * (kM / 2); }
  __device__ static int first_column() {
    return static_cast<int>(threadIdx.x) / kWarp % 2 * (kN / 2);
  }
};

// Floats as tensor cores take them. For three terms, what that leaves of each too: of it they take
// the upper bits, and it keeps a NaN, whose bits the sum may turn into a number's.
template <typename N>
__device__ void round_floats(Fragment& big, Fragment& small) {
  if constexpr (sizeof(typename N::T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = __uint_as_float(big[i]);
      if constexpr (N::kTerms == 3) {
        constexpr unsigned kHalf = 1u << 12, kUpper = ~(2 * kHalf - 1);
        big[i] = (big[i] + kHalf) & kUpper;
        small[i] = __float_as_uint(x - __uint_as_float(big[i]));
      } else {
        big[i] = round_to_tf32(x);
      }
    }
  }
}

// sums += left * right, 16 x 8 at a time.
template <typename T>
__device__ void add_both(Multiplications<T>& all, Sum16x8 (&sums)[2], const Fragment& left,
                         const Fragment& right) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
    all.add(sums[half], left, right[2 * half], right[2 * half + 1]);
}

template <typename N, typename Left, typename Right>
__device__ void add_slice(typename N::Sums& sums, const uint4* left, const uint4* right,
                          int left_place, int right_place) {
  using T = typename N::T;
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    Multiplications<T> all;
    Fragment lefts[N::kRowBlocks], small_lefts[N::kRowBlocks];
#pragma unroll
    for (int i = 0; i < N::kRowBlocks; ++i) {
      Left::Of::template read<false>(lefts[i], left, left_place, i, step);
      round_floats<N>(lefts[i], small_lefts[i]);
    }
#pragma unroll
    for (int j = 0; j < N::kColumnBlocks; ++j) {
      Fragment of_right, small_right;
      Right::Of::template read<true>(of_right, right, right_place, j, step);
      round_floats<N>(of_right, small_right);
#pragma unroll
      for (int i = 0; i < N::kRowBlocks; ++i) {
        if constexpr (N::kTerms == 3) {
          add_both(all, sums[i][j], small_lefts[i], of_right);
          add_both(all, sums[i][j], lefts[i], small_right);
        }
        add_both(all, sums[i][j], lefts[i], of_right);
      }
    }
    all.finish();
  }
}

// Tensor cores round sums towards zero. Where three terms are to be worth it, slices are added
// here.
template <typename N, typename Left, typename Right>
__device__ void add_slice_apart(typename N::Sums& sums, const uint4* left, const uint4* right,
                                int left_place, int right_place) {
  typename N::Sums apart = {};
  add_slice<N, Left, Right>(apart, left, right, left_place, right_place);
#pragma unroll
  for (int i = 0; i < N::kRowBlocks; ++i) {
#pragma unroll
    for (int j = 0; j < N::kColumnBlocks * 8; ++j) {
      sums[i][j / 8][j / 4 % 2][j % 4] += apart[i][j / 8][j / 4 % 2][j % 4];
    }
  }
}

template <typename Left, typename Right>
constexpr int slice_vectors = Left::kSliceVectors + Right::kSliceVectors;

// A ring has so many slices: one is multiplied, the others are on their way.
constexpr int kFewSlices = 3, kMostSlices = 4;

// Adds `slices` slices up. Behind it nobody uses the ring.
template <typename N, typename Left, typename Right>
__device__ void add_slices(typename N::Sums& sums, uint4* ring, int ring_slices, int slices,
                           Left& left, Right& right) {
  constexpr int kRightStart = Left::kSliceVectors;
  constexpr int kSliceVectors = slice_vectors<Left, Right>;
  const int left_place = Left::Of::template lane_place<false>(N::first_row());
  const int right_place = Right::Of::template lane_place<true>(N::first_column());
  uint4* const end = ring + ring_slices * kSliceVectors;
  uint4 *target = ring, *slice = ring;
  int to_copy = slices;
  const auto copy = [&] {
    if (to_copy-- > 0) {
      left.copy(target), right.copy(target + kRightStart);
      target += kSliceVectors;
      if (target == end) target = ring;
    }
    commit_copies();  // an empty group too: a wait counts groups
  };
  for (int i = 1; i < ring_slices; ++i) copy();
#pragma unroll 1
  for (int i = 0; i < slices; ++i) {
    ring_slices == kMostSlices ? wait_for_copies<kMostSlices - 2>()
                               : wait_for_copies<kFewSlices - 2>();
    const uint4* const of_right = right.ready(slice + kRightStart);
    __syncthreads();  // all have copied this slice, and read the one before
    copy();
    if constexpr (N::kTerms == 3) {
      add_slice_apart<N, Left, Right>(sums, slice, of_right, left_place, right_place);
    } else {
      add_slice<N, Left, Right>(sums, slice, of_right, left_place, right_place);
    }
    slice += kSliceVectors;
    if (slice == end) slice = ring;
  }
  __syncthreads();  // the groups still on their way are empty
}

// The hardware keeps so much of each block's shared memory.
constexpr std::size_t kReservedBytes = 1024;

// As many slices as let two blocks share a multiprocessor, if three do. More would hide no more
// latency, and leave less to the L1 cache.
struct Ring {
  int slices;
  std::size_t bytes;
};
template <typename Left, typename Right>
Ring ring_for(std::size_t other_bytes) {
  constexpr std::size_t kSlice = slice_vectors<Left, Right> * sizeof(uint4);
  const std::size_t of_block = shared_per_multiprocessor() / 2 - kReservedBytes - other_bytes;
  const int slices = of_block >= kMostSlices * kSlice ? kMostSlices : kFewSlices;
  return {slices, slices * kSlice + other_bytes};
}

// The sums of a warp by vectors of numbers of T, 16 rows after another.
//
// In shared memory a row is 16 vectors of 4 floats. They change places so that neither the
// fragments' pairs nor whole vectors meet a bank twice.
template <typename N>
class WarpSums {
 public:
  static constexpr int kFloats = 16 * N::kN / 2;  // of a warp
  static constexpr int kSize = kFullPack<typename N::T>;
  using Vector = Pack<float, kSize>;

  __device__ explicit WarpSums(uint4* shared)
      : rows_(reinterpret_cast<float*>(shared) + threadIdx.x / kWarp * kFloats) {}

  // Calls body(row, column, read) for every vector of the warp's columns, or of its first half:
  // read(other) gives the sums of the row at another column. The row is the block's, the column
  // the warp's. All lanes of the warp call body together.
  template <typename Body>
  __device__ void visit(const typename N::Sums& sums, bool first_half, const Body& body) {
    constexpr int kVectors = N::kN / 2 / kSize;
    const int lane = threadIdx.x % kWarp, vectors = first_half ? kVectors / 2 : kVectors;
#pragma unroll
    for (int i = 0; i < N::kRowBlocks; ++i) {
      write(sums[i]);
      __syncwarp();
#pragma unroll 1
      for (int v = lane; v < 16 * vectors; v += kWarp) {
        const int row = first_half ? v / (kVectors / 2) : v / kVectors;
        body(N::first_row() + 16 * i + row, (v - row * vectors) * kSize,
             [&](int column) { return read(row, column); });
      }
      __syncwarp();
    }
  }

 private:
  __device__ float* at(int row, int column) const {
    const int vector = column / 4;
    const int place = vector ^ (row % 4 * 2 + row % 2) ^ (vector / 8);
    return rows_ + row * (N::kN / 2) + place * 4 + column % 4;
  }

  __device__ void write(const Sum16x8 (&sums)[N::kColumnBlocks][2]) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int j = 0; j < N::kColumnBlocks * 2; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Sum16x8& sum = sums[j / 2][j % 2];
        float* to = at(lane / 4 + 8 * half, 8 * j + lane % 4 * 2);
        const float2 pair{sum[2 * half], sum[2 * half + 1]};
        *reinterpret_cast<unsigned long long*>(to) = bits_as<unsigned long long>(pair);
      }
    }
  }

  __device__ Vector read(int row, int column) const {
    Vector out;
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const auto four = bits_as<float4>(*reinterpret_cast<const uint4*>(at(row, column + i)));
      out.at[i] = four.x, out.at[i + 1] = four.y, out.at[i + 2] = four.z, out.at[i + 3] = four.w;
    }
    return out;
  }

  float* rows_;
};

}  // namespace moe_ext::cuda
