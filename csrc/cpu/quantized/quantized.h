// A weight in 8 or 4 bits, and its numbers.

#pragma once

#include "../../weight_format.h"
#include "../machine/lanes.h"

namespace moe_ext {

// As many bytes as V has lanes, as whole numbers of 32 bits.
template <typename byte_t, typename V>
MOE_EXT_INLINE void widen_bytes(const byte_t* from, V& out) {
  Vector<byte_t, sizeof(V) / 4> bytes;
  load(bytes, from);
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
  if constexpr (sizeof(V) >= 32) {
    if constexpr (std::is_signed_v<byte_t>) {
      asm("vpmovsxbd %1, %0" : "=v"(out) : "v"(bytes));
    } else {
      asm("vpmovzxbd %1, %0" : "=v"(out) : "v"(bytes));
    }
    return;
  }
#endif
  out = __builtin_convertvector(bytes, V);
}

// Numbers of two registers in turn: 2 * kLanes floats.
template <typename V, int... i>
MOE_EXT_INLINE void interleave(const V& even, const V& odd, float* out,
                               std::integer_sequence<int, i...>) {
  constexpr int kLanes = sizeof...(i);
  V low, high;
  pick<(i / 2 + i % 2 * kLanes)...>(low, even, odd);
  pick<(kLanes / 2 + i / 2 + i % 2 * kLanes)...>(high, even, odd);
  store(low, out);
  store(high, out + kLanes);
}
template <typename V>
MOE_EXT_INLINE void interleave(const V& even, const V& odd, float* out) {
  interleave(even, odd, out, places<V>{});
}

// Rounds a row to whole numbers up to 127; returns their scale. A row with an infinity or a NaN has
// none: all its products are NaN.
template <int bytes, typename T>
MOE_EXT_INLINE T round_row(T* row, int64_t size) {
  constexpr int64_t kLanes = bytes / sizeof(T);
  Vector<T, bytes> mosts{}, nones{};
  int64_t done = 0;
  for (; done + kLanes <= size; done += kLanes) {
    Vector<T, bytes> numbers;
    load(numbers, row + done);
    const Vector<T, bytes> sizes = numbers < 0 ? -numbers : numbers;
    mosts = sizes > mosts ? sizes : mosts;
    nones += numbers * 0;
  }
  T most = 0, none = 0;
  const auto add = [&](T size, T zero) {
    most = size > most ? size : most;
    none += zero;
  };
  for (int64_t i = 0; i < kLanes; ++i) add(mosts[i], nones[i]);
  for (int64_t m = done; m < size; ++m) add(std::abs(row[m]), row[m] * 0);
  if (!(none == 0)) {
    std::fill_n(row, size, T{0});
    return std::numeric_limits<T>::quiet_NaN();
  }
  const T scale = most / 127 > 0 ? most / 127 : 1;
  // 3 * 2^22, or 3 * 2^51, has no bits behind the point: to nearest, ties to even.
  constexpr T kRound = sizeof(T) == 4 ? T{12582912} : T{6755399441055744};
  for (int64_t m = 0; m < size; ++m) {
    // Quotients by a subnormal scale may be larger than 127.
    const T whole = (row[m] / scale + kRound) - kRound;
    row[m] = std::min(std::max(whole, T{-127}), T{127});
  }
  return scale;
}

// One expert's weight [rows, columns].
struct QuantizedMatrix {
  WeightFormat format;
  const uint8_t* values;  // [rows, row_bytes]
  const uint8_t* scales;  // [rows, groups], of the format's dtype
  const uint8_t* zeros;   // [rows, (groups + 1) / 2], null without
  int64_t rows, columns, groups;

  int64_t row_bytes() const { return columns * bits_of(format) / 8; }
  int64_t group() const { return columns / groups; }
  bool has_codes() const { return format != WeightFormat::kInt8; }

  QuantizedMatrix row_range(int64_t begin, int64_t end) const {
    QuantizedMatrix part = *this;
    part.values += begin * row_bytes();
    part.scales += begin * groups * scale_bytes();
    if (zeros) part.zeros += begin * ((groups + 1) / 2);
    part.rows = end - begin;
    return part;
  }

  // Asks for the scales and zero points of some rows ahead of their use.
  MOE_EXT_INLINE void prefetch_scales(int64_t begin, int64_t end) const {
    const int64_t size = groups * scale_bytes(), pairs = (groups + 1) / 2;
    prefetch(scales + begin * size, (end - begin) * size);
    if (zeros) prefetch(zeros + begin * pairs, (end - begin) * pairs);
  }

  // The scales of `size` groups from the `begin`-th of all rows' on.
  template <int bytes>
  MOE_EXT_INLINE void scales_of(int64_t begin, int64_t size, float* out) const {
    const uint8_t* from = scales + begin * scale_bytes();
    if (format == WeightFormat::kInt4) {
      convert<bytes>(reinterpret_cast<const torch::headeronly::BFloat16*>(from), size, out);
    } else if (format == WeightFormat::kMxfp4) {
      constexpr int kLanes = bytes / 4;
      int64_t g = 0;
      for (; g + kLanes <= size; g += kLanes) {
        Vector<uint32_t, bytes> exponents, bits;
        widen_bytes(from + g, exponents);
        bits = exponents << 23;
        bits = exponents == 0 ? Vector<uint32_t, bytes>{} + kLeastPower : bits;
        bits = exponents == 0xffu ? Vector<uint32_t, bytes>{} + kNan : bits;
        store(bits, out + g);
      }
      for (; g < size; ++g) {
        const uint32_t bits = from[g] == 0      ? kLeastPower
                              : from[g] == 0xff ? kNan
                                                : uint32_t{from[g]} << 23;
        std::memcpy(out + g, &bits, sizeof(bits));
      }
    } else {
      std::memcpy(out, from, size * sizeof(float));
    }
  }

  // The zero points of `size` groups from the `begin`-th of a row on, which is even, less 8 as the
  // numbers of codes are.
  template <int bytes>
  MOE_EXT_INLINE void some_zeros(int64_t row, int64_t begin, int64_t size, float* out) const {
    unpack_zeros<bytes>(zeros + row * ((groups + 1) / 2) + begin / 2, size, out);
  }

  // The same of some rows: [count, groups].
  template <int bytes>
  MOE_EXT_INLINE void zeros_of(int64_t row, int64_t count, float* out) const {
    if (groups % 2 == 0) return some_zeros<bytes>(row, 0, count * groups, out);
    for (int64_t i = 0; i < count; ++i) some_zeros<bytes>(row + i, 0, groups, out + i * groups);
  }

 private:
  static constexpr uint32_t kLeastPower = 1u << 22, kNan = 0x7fc00000u;  // of exponents 0 and 255

  template <int bytes>
  static MOE_EXT_INLINE void unpack_zeros(const uint8_t* from, int64_t size, float* out) {
    using Lanes = Vector<float, bytes>;
    constexpr int64_t kPairs = bytes / 4;
    int64_t g = 0;
    for (; g + 2 * kPairs <= size; g += 2 * kPairs) {
      Vector<int32_t, bytes> pairs;
      widen_bytes(from + g / 2, pairs);
      interleave(__builtin_convertvector(pairs & 15, Lanes) - 8,
                 __builtin_convertvector(pairs >> 4, Lanes) - 8, out + g);
    }
    for (; g < size; ++g) {
      out[g] = static_cast<float>(g % 2 ? from[g / 2] >> 4 : from[g / 2] & 15) - 8;
    }
  }

  int64_t scale_bytes() const {
    return format == WeightFormat::kInt4 ? 2 : format == WeightFormat::kMxfp4 ? 1 : 4;
  }
};

// The e-th of stacks.
inline QuantizedMatrix quantized_matrix(const QuantizedMMArgs& a, int64_t e) {
  const int64_t N = a.values.size(1);
  const QuantizedMatrix all{a.format,
                            const_data<uint8_t>(a.values),
                            static_cast<const uint8_t*>(a.scales.const_data_ptr()),
                            a.zeros ? const_data<uint8_t>(*a.zeros) : nullptr,
                            a.groups.num_experts * N,
                            a.values.size(2) * 8 / bits_of(a.format),
                            a.scales.size(2)};
  return all.row_range(e * N, (e + 1) * N);
}

// The numbers of codes by registers. Bits above the code may be anything.
template <int bytes>
struct CodeTable {
  using Lanes = Vector<float, bytes>;
  using Index = Vector<uint32_t, bytes>;

  MOE_EXT_INLINE explicit CodeTable(WeightFormat format) {
    const CodeNumbers numbers = numbers_of(format);
    std::memcpy(numbers_, numbers.of, sizeof(numbers_));
  }

  MOE_EXT_INLINE void find(const Index& code, Lanes& out) const {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
    if constexpr (bytes == 64) {
      asm("vpermps %2, %1, %0" : "=v"(out) : "v"(code), "v"(numbers_[0]));
      return;
    } else if constexpr (bytes == 32) {
      Lanes low, high;
      asm("vpermps %2, %1, %0" : "=v"(low) : "v"(code), "v"(numbers_[0]));
      asm("vpermps %2, %1, %0" : "=v"(high) : "v"(code), "v"(numbers_[1]));
      out = (code & 8u) != 0 ? high : low;
      return;
    }
#endif
    const float* numbers = reinterpret_cast<const float*>(numbers_);
    float found[bytes / 4];
    for (int i = 0; i < bytes / 4; ++i) found[i] = numbers[code[i] & 15];
    load(out, found);
  }

 private:
  Lanes numbers_[kCodes * 4 / bytes];
};

// The scales of a step's lanes.
template <int bytes>
class LaneScales {
 public:
  using Lanes = Vector<float, bytes>;

  MOE_EXT_INLINE explicit LaneScales(int64_t group) : shift_(0) {
    while (int64_t{1} << shift_ < group) ++shift_;
    for (int i = 0; i < kLanes; ++i) index_[i] = static_cast<uint32_t>(8 * i) >> shift_;
  }
  MOE_EXT_INLINE void find(const float* scales, int64_t step, Lanes& out) const {
    const float* first = scales + ((step * 2 * bytes) >> shift_);
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
    if constexpr (bytes >= 32) {
      Lanes some, found;
      load(some, first);
      asm("vpermps %2, %1, %0" : "=v"(found) : "v"(index_), "v"(some));
      out = found;
      return;
    }
#endif
    float found[kLanes];
    for (int i = 0; i < kLanes; ++i) found[i] = first[index_[i]];
    load(out, found);
  }

 private:
  static constexpr int kLanes = bytes / 4;
  int shift_;  // a group has 2^shift_ codes
  Vector<uint32_t, bytes> index_;
};

}  // namespace moe_ext
