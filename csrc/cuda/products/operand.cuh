// One operand of a product: how its numbers come to shared memory, a slice after another, and from
// there to the registers of a warp.
//
// A slice has kRows rows and is 64 bytes deep: as lines of one row each, or transposed, as lines of
// one depth each. Either way it is kRows * 4 vectors of 16 bytes, and those of a line change places
// so that neither copies nor fragments meet a bank twice:
//
//   lines of rows, 4 vectors each          transposed, 16-bit numbers: lines of 8 vectors or more
//     line 0   0 1 2 3   line 1   0 1 2 3    line 0   0 1 2 3 4 5 6 7 ..
//     line 2   1 0 3 2   line 3   1 0 3 2    line 1   1 0 3 2 5 4 7 6 ..
//     line 4   2 3 0 1   line 5   2 3 0 1    line 2   2 3 0 1 6 7 4 5 ..

#pragma once

#include <algorithm>

#include "../rows.cuh"
#include "tensor.cuh"

namespace moe_ext::cuda {

constexpr int kProductThreads = 128;

// Numbers along the depth of a slice.
template <typename T>
constexpr int kSliceDepth = 64 / sizeof(T);

template <typename T, int kRows, bool kTransposed>
struct Slice {
  static constexpr bool kIsTransposed = kTransposed;
  static constexpr int kVectors = kRows * 4;
  static constexpr int kOfLine = kTransposed ? kRows / kFullPack<T> : 4;
  // A thread copies so many vectors: the same of every kApart-th line.
  static constexpr int kCopies = kVectors / kProductThreads, kApart = kProductThreads / kOfLine;

  __device__ static int first_line() { return static_cast<int>(threadIdx.x) / kOfLine; }
  __device__ static int vector() { return static_cast<int>(threadIdx.x) % kOfLine; }

  __device__ static int place(int line, int vector) {
    if constexpr (!kTransposed) return line * kOfLine + (vector ^ (line / 2 % 4));
    // A fragment of floats has four depths of eight rows: two vectors of four lines.
    return line * kOfLine + (vector ^ (sizeof(T) == 2 ? line % 8 : line % 4 * 2));
  }

  // Where this thread copies to, but for the multiples of kApart lines, which keep the places.
  __device__ static int copy_place() { return place(first_line(), vector()); }
  static constexpr int kCopiesApart = kApart * kOfLine;
  static_assert(kApart % (kTransposed && sizeof(T) == 4 ? 4 : 8) == 0, "places come again then");

  // Where a lane reads of the fragment of rows first_row to first_row + 15, step 0. first_row is a
  // multiple of 32: what lies in between for others changes bits that are 0 in it. An operand on
  // the right has its words by depth first, so that those of eight rows are neighbours.
  template <bool kIsRight>
  __device__ static int lane_place(int first_row) {
    const int lane = threadIdx.x % kWarp, of_eight = lane % 8;
    const int row_half = kIsRight ? lane / 16 : lane / 8 % 2;
    const int depth_half = kIsRight ? lane / 8 % 2 : lane / 16;
    if constexpr (!kTransposed) return place(first_row + row_half * 8 + of_eight, depth_half);
    if constexpr (sizeof(T) == 2) {
      return place(depth_half * 8 + of_eight, first_row / 8 + row_half);
    }
    return place(lane % 4, first_row / 4 + lane / 16);
  }

  // The fragment of rows 16 * block and 15 more, behind the first, at bytes 32 * step to
  // 32 * step + 31.
  template <bool kIsRight>
  __device__ static void read(Fragment& out, const uint4* slice, int lane_place, int block,
                              int step) {
    if constexpr (!kTransposed) {
      load_matrices(out, slice + (lane_place ^ 2 * step) + 16 * kOfLine * block);
    } else if constexpr (sizeof(T) == 2) {
      load_matrices_transposed(out, slice + (lane_place ^ 2 * block) + 16 * kOfLine * step);
    } else {
      const auto* words = reinterpret_cast<const unsigned*>(slice) + threadIdx.x % kWarp / 4 % 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row_half = kIsRight ? i / 2 : i % 2, depth_half = kIsRight ? i % 2 : i / 2;
        const int vectors = lane_place ^ (4 * block + 2 * row_half);
        out[i] = words[(vectors + (8 * step + 4 * depth_half) * kOfLine) * 4];
      }
    }
  }
};

// An operand whose copies are what is multiplied.
template <typename Slice>
struct Copied {
  static constexpr int kSliceVectors = Slice::kVectors;
  __device__ static const uint4* ready(const uint4* slice) { return slice; }
};

// n / divisor by a product, for 0 <= n < 2^31 and 1 <= divisor < 2^31.
struct Divisor {
  unsigned factor;  // 2^shift / divisor, rounded up
  int shift;

  explicit Divisor(int64_t divisor) : shift(31) {
    while (int64_t{1} << (shift - 31) < divisor) ++shift;
    factor = static_cast<unsigned>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }
  __device__ int divide(int n) const {
    return static_cast<int>(__umulhi(2 * static_cast<unsigned>(n), factor) >> (shift - 31));
  }
};

// Where the rows of a matrix are that a group's rows r stand for: in row r, or in that of the token
// whose route has row r.
struct RowSource {
  const void* matrix;
  int width;
  bool gathers;
  Routes routes;
  int num_routes;
  Divisor top_k;

  // The row of the token of a row's route, -1 if it has none. What is found for a row that its
  // route does not have is multiplied by zeros.
  __device__ int find(int row) const {
    const int route = load(routes.sources + row);
    const bool is_route = static_cast<unsigned>(route) < static_cast<unsigned>(num_routes);
    return is_route ? top_k.divide(route) : -1;
  }
  template <typename T>
  __device__ const T* at(int row, int column) const {
    return static_cast<const T*>(matrix) + int64_t{row} * width + column;
  }
};

inline int narrowed_size(int64_t size) {
  constexpr int64_t kMost = 1 << 28;  // so that rows have 2 GiB at most
  if (size <= kMost) return static_cast<int>(size);
  throw std::runtime_error("a product of more than " + std::to_string(kMost) + " columns");
}

inline RowSource source_of(const void* matrix, int64_t width, bool gathers, const Routes& routes) {
  return {matrix,
          narrowed_size(width),
          gathers,
          routes,
          static_cast<int>(routes.num_tokens * routes.top_k),
          Divisor(std::max<int64_t>(routes.top_k, 1))};
}

// Lines of rows, wherever each of them is.
template <typename T, int kRows>
class Lines : public Copied<Slice<T, kRows, false>> {
 public:
  using Of = Slice<T, kRows, false>;

  // find(i): the first number of row i. Where there is no such row it may be another: nobody looks
  // at its sums.
  template <typename Find>
  __device__ Lines(int depth, const Find& find)
      : place_(Of::copy_place()), left_(depth - Of::vector() * kFullPack<T>) {
#pragma unroll
    for (int i = 0; i < Of::kCopies; ++i) {
      rows_[i] = find(Of::first_line() + i * Of::kApart) + Of::vector() * kFullPack<T>;
    }
  }

  // The next slice.
  __device__ void copy(uint4* slice) {
#pragma unroll
    for (int i = 0; i < Of::kCopies; ++i) {
      copy_async(slice + place_ + i * Of::kCopiesApart, rows_[i], left_ > 0);
      rows_[i] += kSliceDepth<T>;
    }
    left_ -= kSliceDepth<T>;
  }

 private:
  int place_;
  int left_;  // of the depth, from this thread's vector on
  const T* rows_[Of::kCopies];
};

// Lines of a matrix [depth, width], from a column on that each thread has for itself.
template <typename T, int kRows>
class Columns : public Copied<Slice<T, kRows, true>> {
 public:
  using Of = Slice<T, kRows, true>;

  // column: of this thread's vector. Where there is none it may be another.
  __device__ Columns(const T* matrix, int depth, int width, int column)
      : place_(Of::copy_place()),
        left_(depth - Of::first_line()),
        from_(matrix + int64_t{Of::first_line()} * width + column),
        apart_(int64_t{Of::kApart} * width) {}

  __device__ void copy(uint4* slice) {
#pragma unroll
    for (int i = 0; i < Of::kCopies; ++i) {
      copy_async(slice + place_ + i * Of::kCopiesApart, from_, left_ > i * Of::kApart);
      from_ += apart_;
    }
    left_ -= kSliceDepth<T>;
  }

 private:
  int place_;
  int left_;  // of the depth, from this thread's first line on
  const T* from_;
  int64_t apart_;  // from a line to this thread's next, in the next slice too
};

// Lines of gathered rows first_row to last_row - 1, from a column on. They are found a slice ahead.
template <typename T, int kRows>
class GatheredColumns : public Copied<Slice<T, kRows, true>> {
 public:
  using Of = Slice<T, kRows, true>;

  __device__ GatheredColumns(const RowSource& source, int first_row, int last_row, int column)
      : source_(source),
        place_(Of::copy_place()),
        next_(first_row + Of::first_line()),
        last_row_(last_row),
        column_(static_cast<const uint4*>(source.matrix), source.width / kFullPack<T>,
                column / kFullPack<T>) {
    if (first_row < last_row) find();
  }

  __device__ void copy(uint4* slice) {
#pragma unroll
    for (int i = 0; i < Of::kCopies; ++i) {
      copy_async(slice + place_ + i * Of::kCopiesApart, column_.of(max(rows_[i], 0)),
                 rows_[i] >= 0);
    }
    find();
  }

 private:
  __device__ void find() {
#pragma unroll
    for (int i = 0; i < Of::kCopies; ++i) {
      const int row = next_ + i * Of::kApart, found = source_.find(min(row, last_row_ - 1));
      rows_[i] = row < last_row_ ? found : -1;
    }
    next_ += kSliceDepth<T>;
  }

  const RowSource& source_;
  int place_, next_, last_row_;
  const Column<const uint4> column_;
  int rows_[Of::kCopies];
};

}  // namespace moe_ext::cuda
