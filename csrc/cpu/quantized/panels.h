// Panels: lines of a weight in 8 or 4 bits as numbers that another product takes.

#pragma once

#include "quantized.h"

namespace moe_ext {

// The order of numbers in panels, as registers unpack codes: in a step of kOfLane * kLanes the
// first of each lane's, then the second, ... Codes of 8 bits stay where they are.
template <int64_t kOfLane, int64_t kLanes>
struct PanelOrder {
  static constexpr int64_t kStep = kOfLane * kLanes;

  static constexpr int64_t place(int64_t i) {
    return i / kStep * kStep + i % kOfLane * kLanes + i % kStep / kOfLane;
  }

  template <typename T>
  static MOE_EXT_INLINE void pack(const T* row, int64_t size, T* out) {
    int64_t done = 0;
    if constexpr (sizeof(T) == 2 && kOfLane == 4) {
      for (; done + kStep <= size; done += kStep) {
        uint64_t fours[kLanes];
        std::memcpy(fours, row + done, sizeof(fours));
        for (int64_t p = 0; p < kOfLane; ++p) {
          uint16_t part[kLanes];
          for (int64_t l = 0; l < kLanes; ++l) part[l] = static_cast<uint16_t>(fours[l] >> 16 * p);
          std::memcpy(static_cast<void*>(out + done + p * kLanes), part, sizeof(part));
        }
      }
    }
    for (; done < size; ++done) out[place(done)] = row[done];
  }
  template <typename T>
  static MOE_EXT_INLINE void unpack(const T* row, int64_t size, T* out) {
    for (int64_t i = 0; i < size; ++i) out[i] = row[place(i)];
  }
};

// Calls body(order) with that of panels of scalar_t. pairs: AVX512-BF16 makes bfloat16 of floats.
template <int bytes, typename scalar_t, typename Body>
MOE_EXT_INLINE void with_panel_order(bool pairs, const Body& body) {
  if constexpr (bytes == 64 && is_bfloat16<scalar_t>) {
    if (pairs) return body(PanelOrder<4, bytes / 2>{});
  }
  body(PanelOrder<8, bytes / 4>{});
}

// Numbers of a weight's rows as a panel has them, from column `begin` on, where a step and a group
// of codes begin. The panel may have more columns than the weight: zeros.
template <typename scalar_t>
struct DecodePanel {
  const QuantizedMatrix& weight;
  int64_t begin;
  Matrix to;
  bool converts_pairs;  // by AVX512-BF16, for which subnormal numbers are zero
  bool scales_bytes;    // or the numbers of 8 bits stay whole

  template <int bytes>
  MOE_EXT_INLINE void run(Panel& memory) const {
    constexpr int64_t kLanes = bytes / 4;
    const int64_t group = std::max<int64_t>(1, weight.group()), first = begin / group;
    const int64_t groups = std::min((to.columns + group - 1) / group, weight.groups - first);
    const int64_t odd = first % 2;  // zero points are in pairs
    const int64_t size = groups + 4 * kLanes;
    const Matrix floats = memory.get(ScalarType::Float, 1, 2 * size);
    auto* scales = reinterpret_cast<float*>(floats.data);
    float* zeros = scales + size + odd;
    std::fill_n(scales, 2 * size, 0.0f);
    const CodeTable<bytes> table(weight.format);
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
    const bool finds_bytes = __builtin_cpu_supports("avx512vbmi");
#endif
    for (int64_t r = 0; r < weight.rows; ++r) {
      weight.scales_of<bytes>(r * weight.groups + first, groups, scales);
      if (weight.zeros) weight.some_zeros<bytes>(r, first - odd, groups + odd, zeros - odd);
      auto* out = reinterpret_cast<scalar_t*>(to.data) + r * to.row_stride;
      if (weight.has_codes()) {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
        if constexpr (bytes == 64 && is_bfloat16<scalar_t>) {
          if (converts_pairs) {
            pairs_of_codes(r, scales, zeros, out);
            continue;
          }
        }
#endif
        codes_of<bytes>(table, r, scales, zeros, out);
      } else if (scales_bytes) {
        bytes_of<bytes, true>(r, scales[0], out);
      } else {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
        if constexpr (bytes == 64 && is_bfloat16<scalar_t>) {
          if (finds_bytes && whole_bytes(r, out)) continue;
        }
#endif
        bytes_of<bytes, false>(r, 1, out);
      }
    }
  }

 private:
  static constexpr int64_t kAhead = 1 << 12;  // bytes

  // The codes of a step from column `begin` + c on, zeros behind the last.
  template <typename V>
  MOE_EXT_INLINE void load_step(V& codes, const uint8_t* from, int64_t c) const {
    const int64_t rest = (weight.columns - begin - c) / 2;
    codes = V{};
    if (rest >= static_cast<int64_t>(sizeof(V))) {
      load(codes, from);
    } else if (rest > 0) {
      std::memcpy(&codes, from, rest);
    }
    __builtin_prefetch(from + kAhead, 0, 3);
  }

  template <int bytes>
  MOE_EXT_INLINE void codes_of(const CodeTable<bytes>& table, int64_t row, const float* scales,
                               const float* zeros, scalar_t* out) const {
    constexpr int64_t kLanes = bytes / 4, kNumbers = 8 * kLanes;
    const LaneScales<bytes> of_lanes(weight.group());
    const uint8_t* from = weight.values + row * weight.row_bytes() + begin / 2;
    for (int64_t c = 0; c < to.columns; c += kNumbers, from += bytes, out += kNumbers) {
      Vector<uint32_t, bytes> codes;
      load_step(codes, from, c);
      Vector<float, bytes> scale, zero, parts[8];
      of_lanes.find(scales, c / kNumbers, scale);
      of_lanes.find(zeros, c / kNumbers, zero);
      for (int p = 0; p < 8; ++p) {
        table.find(codes >> (4 * p), parts[p]);
        parts[p] = (parts[p] - zero) * scale;
      }
      for (int p = 0; p < 8; p += 2) store_pair<bytes>(parts + p, out + p * kLanes);
    }
  }

#if defined(MOE_EXT_ASSEMBLES_VECTORS)
  using Pairs = Vector<uint16_t, 64>;
  using Floats = Vector<float, 64>;

  MOE_EXT_INLINE void pairs_of_codes(int64_t row, const float* scales, const float* zeros,
                                     scalar_t* out) const {
    switch (weight.group()) {
      case 32: return pairs_of_codes<4>(row, scales, zeros, out);
      case 64: return pairs_of_codes<2>(row, scales, zeros, out);
      default: return pairs_of_codes<1>(row, scales, zeros, out);
    }
  }

  // A step has so many groups. Its table has the numbers of each group, times its scale and rounded
  // already: a lane takes those of its own.
  template <int kGroups>
  MOE_EXT_INLINE void pairs_of_codes(int64_t row, const float* scales, const float* zeros,
                                     scalar_t* out) const {
    constexpr int64_t kNumbers = 128;
    const CodeNumbers of_codes = numbers_of(weight.format);
    Floats numbers;
    load(numbers, of_codes.of);
    Pairs first;  // of a lane's group in the table
    for (int j = 0; j < 32; ++j) first[j] = static_cast<uint16_t>(j * kGroups / 32 * kCodes);
    const uint8_t* from = weight.values + row * weight.row_bytes() + begin / 2;
    for (int64_t c = 0; c < to.columns; c += kNumbers) {
      Pairs codes;
      load_step(codes, from, c);
      Floats scaled[kGroups];
      for (int g = 0; g < kGroups; ++g) scaled[g] = (numbers - zeros[g]) * scales[g];
      Pairs table = pair_of(scaled[0], scaled[kGroups > 1]), more{};
      if constexpr (kGroups == 4) more = pair_of(scaled[2], scaled[3]);
      for (int p = 0; p < 4; ++p) {
        Pairs place = codes >> (4 * p);
        asm("vpternlogd $0xea, %2, %1, %0" : "+v"(place) : "v"(Pairs{} + 15), "v"(first));
        if constexpr (kGroups == 4) {
          asm("vpermi2w %2, %1, %0" : "+v"(place) : "v"(table), "v"(more));
        } else {
          asm("vpermw %2, %1, %0" : "=v"(place) : "v"(place), "v"(table));
        }
        store(place, static_cast<void*>(out + p * 32));
      }
      from += 64, out += kNumbers, scales += kGroups, zeros += kGroups;
    }
  }

  using Bytes = Vector<uint8_t, 64>;

  // 0 to 127 as bfloat16: their low bytes, and their high ones.
  struct WholeNumbers {
    uint8_t low[128]{}, high[128]{};
    constexpr WholeNumbers() {
      for (int i = 1, exponent = 0; i < 128; ++i) {
        if (i == 2 << exponent) ++exponent;
        const int bits = (127 + exponent) << 7 | (i << (7 - exponent) & 127);
        low[i] = bits & 255, high[i] = bits >> 8;
      }
    }
  };

  // Whole numbers of 8 bits by these; false if there is a -128, which has no place in them.
  MOE_EXT_INLINE bool whole_bytes(int64_t row, scalar_t* out) const {
    static constexpr WholeNumbers kWhole;
    Bytes lows[2], highs[2];
    std::memcpy(lows, kWhole.low, sizeof(lows));
    std::memcpy(highs, kWhole.high, sizeof(highs));
    constexpr int64_t kNumbers = sizeof(Bytes);
    const Vector<uint64_t, 64> order = {0, 4, 1, 5, 2, 6, 3, 7};
    const uint8_t* from = weight.values + row * weight.row_bytes() + begin;
    Bytes all{};
    int64_t c = 0;
    for (; c + kNumbers <= to.columns; c += kNumbers) {
      Bytes numbers, sizes, first, second;
      load(numbers, from + c);
      __builtin_prefetch(from + c + kAhead, 0, 3);
      asm("vpermq %1, %2, %0" : "=v"(numbers) : "v"(numbers), "v"(order));
      asm("vpabsb %1, %0" : "=v"(sizes) : "v"(numbers));
      all |= sizes;
      Bytes low = sizes, high = sizes;
      asm("vpermi2b %2, %1, %0" : "+v"(low) : "v"(lows[0]), "v"(lows[1]));
      asm("vpermi2b %2, %1, %0" : "+v"(high) : "v"(highs[0]), "v"(highs[1]));
      asm("vpternlogd $0xf8, %2, %1, %0" : "+v"(high) : "v"(numbers), "v"(Bytes{} + 128));
      asm("vpunpcklbw %2, %1, %0" : "=v"(first) : "v"(low), "v"(high));
      asm("vpunpckhbw %2, %1, %0" : "=v"(second) : "v"(low), "v"(high));
      store(first, static_cast<void*>(out + c));
      store(second, static_cast<void*>(out + c + kNumbers / 2));
    }
    for (; c < to.columns; ++c) {
      out[c] = static_cast<scalar_t>(static_cast<float>(static_cast<int8_t>(from[c])));
    }
    Vector<uint64_t, 64> tops;
    std::memcpy(&tops, &all, sizeof(tops));
    uint64_t top = 0;
    for (int i = 0; i < 8; ++i) top |= tops[i];
    return (top & 0x8080808080808080u) == 0;
  }

  static MOE_EXT_INLINE Pairs pair_of(const Floats& low, const Floats& high) {
    Pairs pair;
    narrow_to_pairs(low, high, pair);
    return pair;
  }
#endif

  template <int bytes, bool scaled>
  MOE_EXT_INLINE void bytes_of(int64_t row, float scale, scalar_t* out) const {
    constexpr int64_t kLanes = bytes / 4;
    const auto* from =
        reinterpret_cast<const int8_t*>(weight.values) + row * weight.row_bytes() + begin;
    int64_t c = 0;
    for (; c + 2 * kLanes <= to.columns; c += 2 * kLanes) {
      __builtin_prefetch(from + c + kAhead, 0, 3);
      Vector<float, bytes> numbers[2];
      for (int p = 0; p < 2; ++p) {
        Vector<int32_t, bytes> wide;
        widen_bytes(from + c + p * kLanes, wide);
        numbers[p] = __builtin_convertvector(wide, Vector<float, bytes>);
        if constexpr (scaled) numbers[p] *= scale;
      }
      store_pair<bytes>(numbers, out + c);
    }
    for (; c < to.columns; ++c) out[c] = static_cast<scalar_t>(static_cast<float>(from[c]) * scale);
  }

  template <int bytes>
  MOE_EXT_INLINE void store_pair(const Vector<float, bytes>* numbers, scalar_t* out) const {
    constexpr int64_t kLanes = bytes / 4;
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
    if constexpr (bytes == 64 && is_bfloat16<scalar_t>) {
      if (converts_pairs) return store(pair_of(numbers[0], numbers[1]), static_cast<void*>(out));
    }
#endif
    if constexpr (std::is_same_v<scalar_t, double>) {
      for (int64_t i = 0; i < 2 * kLanes; ++i) out[i] = numbers[i / kLanes][i % kLanes];
    } else {
      for (int p = 0; p < 2; ++p) store_as(numbers[p], out + p * kLanes);
    }
  }
};

}  // namespace moe_ext
