// Weights in 8 and 4 bits as the right operand. Codes come to shared memory as they are, and are
// numbers of T there before their slice is multiplied:
//
//   ring       codes of slice i + 1     of slice i + 2 ..       on their way
//   unpacked   numbers of slice i       numbers of slice i - 1  the next are written here
//
// A thread has 32 numbers of a line in every slice: of one group, so with one scale. It unpacks
// what it has copied itself, before the barrier behind which all multiply the slice.

#pragma once

#include "../../weight_format.h"
#include "operand.cuh"

namespace moe_ext::cuda {

struct PackedWeights {
  const uint8_t* values;  // [E, N, M * bits / 8]
  const void* scales;     // [E, N, S]
  const uint8_t* zeros;   // [E, N, (S + 1) / 2] or null
  WeightFormat format;
  int lines, width, num_scales;  // N, M, S
  int group_shift;               // a group has 2^group_shift numbers, or all of a row
  CodeNumbers numbers;           // of codes of 4 bits
};

// The scale of a thread's numbers, and what they are less for it: read a slice ahead.
class Scale {
 public:
  // line: of all groups' weights
  __device__ Scale(const PackedWeights& weights, int64_t line, int column)
      : weights_(weights), at_(line * weights.num_scales), zero_at_(line * zeros_of_line()) {
    read(column);
  }

  __device__ float factor() const {
    switch (weights_.format) {
      case WeightFormat::kInt4: return __uint_as_float(bits_ << 16);
      case WeightFormat::kMxfp4: {  // 255 is NaN
        const uint32_t nonzero = bits_ == 255 ? 0x7fc00000u : bits_ << 23;
        return __uint_as_float(bits_ ? nonzero : 1u << 22);
      }
      default: return __uint_as_float(bits_);
    }
  }
  __device__ float shift() const { return weights_.zeros ? static_cast<float>(zero_ - 8) : 0; }

  // For numbers from this column on, so many lines below.
  __device__ void next(int lines, int column) {
    at_ += lines * weights_.num_scales, zero_at_ += lines * zeros_of_line();
    read(column);
  }

 private:
  __device__ int zeros_of_line() const { return (weights_.num_scales + 1) / 2; }

  __device__ void read(int column) {
    const int group = column >> weights_.group_shift;
    switch (weights_.format) {
      case WeightFormat::kInt4: bits_ = scale<uint16_t>(group); break;
      case WeightFormat::kMxfp4: bits_ = scale<uint8_t>(group); break;
      default: bits_ = scale<uint32_t>(group);
    }
    if (!weights_.zeros) return;
    zero_ = load(weights_.zeros + zero_at_ + group / 2) >> group % 2 * 4 & 15;
  }
  template <typename Bits>
  __device__ unsigned scale(int group) const {
    return load(static_cast<const Bits*>(weights_.scales) + at_ + group);
  }

  const PackedWeights& weights_;
  int64_t at_, zero_at_;
  unsigned bits_ = 0;
  int zero_ = 0;
};

// kRows columns of a product: lines of the weights or, transposed, columns of theirs.
template <typename T, int kBits, int kRows, bool kTransposed>
class Packed {
 public:
  using Of = Slice<T, kRows, kTransposed>;
  // A thread's share of a slice: numbers, their vectors, and those of their codes.
  static constexpr int kNumbers = 32, kUnpacked = kNumbers / kFullPack<T>;
  static constexpr int kCodeVectors = kNumbers * kBits / 128;
  static constexpr int kSliceVectors = kCodeVectors * kProductThreads;
  static constexpr int kUnpackedVectors = 2 * Of::kVectors;  // of shared memory
  static_assert(Of::kVectors == kUnpacked * kProductThreads);
  static_assert(kTransposed || kSliceDepth<T> == kNumbers);

  // first: the tile's first column; nobody looks at the sums of columns that do not exist. table:
  // the numbers of codes, like `unpacked` in shared memory.
  __device__ Packed(const PackedWeights& weights, int group, int first, uint4* unpacked,
                    const float* table)
      : weights_(weights),
        line_(line() + (kTransposed ? 0 : first)),
        column_(kTransposed ? first + vector() * kFullPack<T> : 0),
        next_line_(line_),
        next_column_(column_),
        scale_(weights, int64_t{group} * weights.lines + existing(line_, weights.lines),
               existing(column_, weights.width)),
        from_(weights.values + (int64_t{group} * weights.lines + line_) * bytes_of(weights.width) +
              bytes_of(column_)),
        unpacked_(unpacked),
        table_(table) {}

  // The codes of the next slice, 0 where there is nothing: depths that do not exist are multiplied
  // by zeros.
  __device__ void copy(uint4* slice) {
#pragma unroll
    for (int i = 0; i < kCodeVectors; ++i) {
      const int column = column_ + i * (kNumbers / kCodeVectors);
      copy_async(slice + i * kProductThreads + threadIdx.x, from_ + 16 * i,
                 line_ < weights_.lines && column < weights_.width);
    }
    step(line_, column_);
    from_ += kTransposed ? kSliceDepth<T> * bytes_of(weights_.width) : bytes_of(kSliceDepth<T>);
  }

  // The numbers of a slice, for all behind a barrier. This thread's copies are done.
  __device__ const uint4* ready(const uint4* slice) {
    const float factor = scale_.factor(), shift = scale_.shift();
    const int before = next_line_;
    step(next_line_, next_column_);
    if (next_line_ < weights_.lines && next_column_ < weights_.width) {
      scale_.next(next_line_ - before, next_column_);
    }
    uint4* const to = unpacked_ + (is_odd_ ? Of::kVectors : 0);
    is_odd_ = !is_odd_;
#pragma unroll
    for (int i = 0; i < kCodeVectors; ++i) {
      // The threads of a line's second half go another way, else they meet the first in a bank.
      const int vector_of_codes = kCodeVectors == 2 ? i ^ half() : i;
      const auto codes = read_codes(slice + vector_of_codes * kProductThreads + threadIdx.x);
      constexpr int kOfVector = kUnpacked / kCodeVectors, kWords = 4 / kOfVector;
#pragma unroll
      for (int j = 0; j < kOfVector; ++j) {
        const int unpacked = kCodeVectors == 2 ? vector_of_codes * kOfVector + j : j ^ 2 * half();
        Pack<float, kFullPack<T>> numbers;
#pragma unroll
        for (int k = 0; k < kFullPack<T>; ++k) {
          numbers.at[k] =
              (number(codes.at[j * kWords + k * kBits / 32], k * kBits % 32) - shift) * factor;
        }
        to[Of::place(line(), vector() + unpacked)] = bits_as<uint4>(narrowed<T>(numbers));
      }
    }
    return to;
  }

 private:
  static constexpr int kThreadsOfLine = Of::kOfLine / kUnpacked;
  __device__ static int line() { return static_cast<int>(threadIdx.x) / kThreadsOfLine; }
  __device__ static int vector() {
    return static_cast<int>(threadIdx.x) % kThreadsOfLine * kUnpacked;
  }
  // Which half of a transposed line this thread has.
  __device__ static int half() { return static_cast<int>(threadIdx.x) % kThreadsOfLine / 2; }
  // A vector whose words are in the order in which this thread unpacks them.
  __device__ static Pack<unsigned, 4> read_codes(const uint4* from) {
    const auto codes = bits_as<Pack<unsigned, 4>>(*from);
    if (kCodeVectors == 2 || half() == 0) return codes;
    return {codes.at[2], codes.at[3], codes.at[0], codes.at[1]};
  }
  __device__ static int existing(int i, int count) { return i < count ? i : 0; }
  __device__ static int64_t bytes_of(int numbers) { return int64_t{numbers} * kBits / 8; }
  // From a slice's numbers to those of the next.
  __device__ static void step(int& line, int& column) {
    (kTransposed ? line : column) += kSliceDepth<T>;
  }

  // The number that the code at a bit of a word stands for.
  __device__ float number(unsigned word, int bit) const {
    if constexpr (kBits == 4) return table_[word >> bit & 15];
    // 2^23 + 128 and more, exactly.
    const unsigned code = word >> bit & 255;
    return __uint_as_float(0x4b000000u | (code ^ 128)) - 8388736.0f;
  }

  const PackedWeights& weights_;
  int line_, column_;            // of the codes to copy
  int next_line_, next_column_;  // of those to unpack
  Scale scale_;
  const uint8_t* from_;
  uint4* unpacked_;
  const float* table_;
  bool is_odd_ = false;
};

}  // namespace moe_ext::cuda
