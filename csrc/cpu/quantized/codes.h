// Steps of a weight in 8 or 4 bits as registers, and their products with rows.
//
//   Codes        bits   rows         register p of a step
//   FloatCodes   4      floats       codes 8 i + p, of lanes i: a shift and a table
//   PairCodes    4      bfloat16     codes 4 j + p, of halves j of lanes: the same (AVX512-BF16)
//   ByteCodes    4      8 bits       codes 2 b + p, of bytes b (AVX512-VNNI)
//   FloatBytes   8      floats       a quarter of the step
//   ByteBytes    8      8 bits       the step (AVX512-VNNI)
//
// place(i) is where a row has the number for code i of a step; complete() fills what else its words
// have. add() adds a step's products with some rows to their totals, for codes of 4 bits times the
// scales of the lanes.

#pragma once

#include "../gemm/lines.h"
#include "quantized.h"

namespace moe_ext {

// Codes whose totals are a sum for each lane, by the scales of its group.
template <int bytes>
struct LaneTotals {
  using Lanes = Vector<float, bytes>;
  using Totals = Lanes;
  static constexpr bool kHasGroups = true;

  template <int64_t count>
  static MOE_EXT_INLINE void to_floats(const Totals (&totals)[count], int64_t j, Lanes& out) {
    out = totals[j];
  }
};

template <int bytes>
struct FloatCodes : LaneTotals<bytes> {
  using typename LaneTotals<bytes>::Lanes;
  using typename LaneTotals<bytes>::Totals;
  using Word = Lanes;
  using Element = float;
  static constexpr int kNumbers = 2 * bytes, kParts = 8, kWords = kParts;
  static constexpr float unit = 1;

  CodeTable<bytes> table;
  MOE_EXT_INLINE explicit FloatCodes(WeightFormat format) : table(format) {}

  static MOE_EXT_INLINE int64_t place(int64_t i) { return i % 8 * (bytes / 4) + i / 8; }
  static MOE_EXT_INLINE float element(float x) { return x; }
  MOE_EXT_INLINE void complete(Word*) const {}

  template <int64_t count>
  MOE_EXT_INLINE void add(const uint8_t* from, const Word* words, int64_t stride,
                          const Lanes& scales, Totals (&totals)[count]) const {
    Vector<uint32_t, bytes> codes;
    load(codes, from);
    Lanes sums[count]{};
    for (int p = 0; p < kParts; ++p) {
      Lanes numbers;
      table.find(codes >> (4 * p), numbers);
      for (int64_t j = 0; j < count; ++j) add_product(sums[j], numbers, words[j * stride + p]);
    }
    for (int64_t j = 0; j < count; ++j) add_product(totals[j], sums[j], scales);
  }
};

template <int bytes>
struct FloatBytes {
  using Lanes = Vector<float, bytes>;
  using Word = Lanes;
  using Element = float;
  static constexpr int kNumbers = bytes, kParts = 4, kWords = kParts;
  static constexpr bool kHasGroups = false;
  static constexpr float unit = 1;
  // More than one sum: the next addition need not wait for the last.
  static constexpr int kSums = bytes == 64 ? 4 : 2;
  struct Totals {
    Lanes of_parts[kSums];
  };

  MOE_EXT_INLINE explicit FloatBytes(WeightFormat) {}

  static MOE_EXT_INLINE int64_t place(int64_t i) { return i; }
  static MOE_EXT_INLINE float element(float x) { return x; }
  MOE_EXT_INLINE void complete(Word*) const {}

  template <int64_t count>
  MOE_EXT_INLINE void add(const uint8_t* from, const Word* words, int64_t stride, const Lanes&,
                          Totals (&totals)[count]) const {
    for (int p = 0; p < kParts; ++p) {
      Vector<int32_t, bytes> wide;
      widen_bytes(reinterpret_cast<const int8_t*>(from) + p * (bytes / 4), wide);
      const Lanes numbers = __builtin_convertvector(wide, Lanes);
      for (int64_t j = 0; j < count; ++j) {
        add_product(totals[j].of_parts[p % kSums], numbers, words[j * stride + p]);
      }
    }
  }
  template <int64_t count>
  static MOE_EXT_INLINE void to_floats(const Totals (&totals)[count], int64_t j, Lanes& out) {
    out = totals[j].of_parts[0] + totals[j].of_parts[1];
    if constexpr (kSums == 4) out += totals[j].of_parts[2] + totals[j].of_parts[3];
  }
};

// Whether products of 8 bits are made by AVX512-VNNI: nf4 has no whole numbers, and sums of longer
// rows do not fit into 32 bits.
inline bool multiplies_bytes([[maybe_unused]] WeightFormat format,
                             [[maybe_unused]] int64_t columns) {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
  __builtin_cpu_init();
  return register_bytes() == 64 && __builtin_cpu_supports("avx512vnni") &&
         format != WeightFormat::kNf4 && columns <= 1 << 20;
#else
  return false;
#endif
}

#if defined(MOE_EXT_ASSEMBLES_VECTORS)
// The numbers of codes as bfloat16: those of nf4 are rounded to it, as rows are.
struct PairCodes : LaneTotals<64> {
  using Word = Vector<uint16_t, 64>;
  using Element = uint16_t;
  static constexpr int kNumbers = 128, kParts = 4, kWords = kParts;
  static constexpr float unit = 1;

  Word table;  // twice, for the bit above a code
  MOE_EXT_INLINE explicit PairCodes(WeightFormat format) {
    const CodeNumbers numbers = numbers_of(format);
    for (int i = 0; i < 2 * kCodes; ++i) {
      table[i] = torch::headeronly::BFloat16(numbers.of[i % kCodes]).x;
    }
  }

  static MOE_EXT_INLINE int64_t place(int64_t i) { return i % 4 * 32 + i / 4; }
  static MOE_EXT_INLINE uint16_t element(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return static_cast<uint16_t>(bits >> 16);
  }
  MOE_EXT_INLINE void complete(Word*) const {}

  template <int64_t count>
  MOE_EXT_INLINE void add(const uint8_t* from, const Word* words, int64_t stride,
                          const Lanes& scales, Totals (&totals)[count]) const {
    Word codes;
    load(codes, from);
    Lanes sums[count]{};
    for (int p = 0; p < kParts; ++p) {
      Word numbers;
      asm("vpermw %2, %1, %0" : "=v"(numbers) : "v"(codes >> (4 * p)), "v"(table));
      for (int64_t j = 0; j < count; ++j) {
        Lanes sum = sums[j];
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(numbers), "vm"(words[j * stride + p]));
        sums[j] = sum;
      }
    }
    for (int64_t j = 0; j < count; ++j) add_product(totals[j], sums[j], scales);
  }
};

using Bytes = Vector<uint8_t, 64>;
using Integers = Vector<int32_t, 64>;

// sums += the products of four unsigned bytes of a and four signed ones of b, of each lane.
MOE_EXT_INLINE void add_bytes(Integers& sums, const Bytes& a, const Bytes& b) {
  Integers sum = sums;
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "vm"(b));
  sums = sum;
}

// Numbers are unit * (byte - bias), of bytes that are whole and not negative. The last word holds
// minus the row's sum times the bias.
struct ByteCodes : LaneTotals<64> {
  using Word = Bytes;
  using Element = int8_t;
  static constexpr int kNumbers = 128, kParts = 2, kWords = 3;

  Bytes table;  // for each quarter of a register
  uint8_t bias;
  float unit;
  MOE_EXT_INLINE explicit ByteCodes(WeightFormat format)
      : bias(format == WeightFormat::kMxfp4 ? 12 : 8),
        unit(format == WeightFormat::kMxfp4 ? 0.5f : 1) {
    const CodeNumbers numbers = numbers_of(format);
    for (int i = 0; i < 64; ++i) {
      table[i] = static_cast<uint8_t>(static_cast<int>(numbers.of[i % kCodes] / unit) + bias);
    }
  }
  MOE_EXT_INLINE void complete(Word* words) const {
    Integers sums{};
    for (int p = 0; p < kParts; ++p) add_bytes(sums, Bytes{} + bias, words[p]);
    sums = -sums;
    store(sums, words + kParts);
  }

  static MOE_EXT_INLINE int64_t place(int64_t i) { return i % 2 * 64 + i / 2; }
  static MOE_EXT_INLINE int8_t element(float x) { return static_cast<int8_t>(x); }

  template <int64_t count>
  MOE_EXT_INLINE void add(const uint8_t* from, const Word* words, int64_t stride,
                          const Lanes& scales, Totals (&totals)[count]) const {
    Bytes codes;
    load(codes, from);
    Integers sums[count];
    for (int64_t j = 0; j < count; ++j) load(sums[j], words + j * stride + kParts);
    for (int p = 0; p < kParts; ++p) {
      const Bytes of_part = (p ? codes >> 4 : codes & 15);
      Bytes numbers;
      asm("vpshufb %2, %1, %0" : "=v"(numbers) : "v"(table), "v"(of_part));
      for (int64_t j = 0; j < count; ++j) add_bytes(sums[j], numbers, words[j * stride + p]);
    }
    for (int64_t j = 0; j < count; ++j) {
      add_product(totals[j], __builtin_convertvector(sums[j], Lanes), scales);
    }
  }
};

// The rows' numbers are 128 more, so that they are not negative: totals hold 128 times the weight's
// sum too much.
struct ByteBytes {
  using Lanes = Vector<float, 64>;
  using Word = Bytes;
  using Element = uint8_t;
  struct Totals {
    Integers products, numbers;  // numbers: in the first row's alone
  };
  static constexpr int kNumbers = 64, kParts = 1, kWords = kParts;
  static constexpr bool kHasGroups = false;
  static constexpr float unit = 1;

  MOE_EXT_INLINE explicit ByteBytes(WeightFormat) {}

  static MOE_EXT_INLINE int64_t place(int64_t i) { return i; }
  static MOE_EXT_INLINE uint8_t element(float x) {
    return static_cast<uint8_t>(static_cast<int>(x) + 128);
  }
  MOE_EXT_INLINE void complete(Word*) const {}

  template <int64_t count>
  MOE_EXT_INLINE void add(const uint8_t* from, const Word* words, int64_t stride, const Lanes&,
                          Totals (&totals)[count]) const {
    Bytes numbers;
    load(numbers, from);
    add_bytes(totals[0].numbers, Bytes{} + 1, numbers);
    for (int64_t j = 0; j < count; ++j) add_bytes(totals[j].products, words[j * stride], numbers);
  }
  template <int64_t count>
  static MOE_EXT_INLINE void to_floats(const Totals (&totals)[count], int64_t j, Lanes& out) {
    out = __builtin_convertvector(totals[j].products - totals[0].numbers * 128, Lanes);
  }
};
#endif

}  // namespace moe_ext
