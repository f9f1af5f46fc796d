// Formats of weights in 8 and 4 bits. moe_ext/formats/codes.py says what they are.

#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string_view>

namespace moe_ext {

enum class WeightFormat { kInt8, kInt4, kMxfp4, kNf4 };

// Numbers of a row that share one scale at least, where codes have 4 bits.
constexpr int kLeastGroup = 32;
constexpr int kCodes = 16;

inline std::optional<WeightFormat> weight_format(std::string_view name) {
  if (name == "int8") return WeightFormat::kInt8;
  if (name == "int4") return WeightFormat::kInt4;
  if (name == "mxfp4") return WeightFormat::kMxfp4;
  if (name == "nf4") return WeightFormat::kNf4;
  return std::nullopt;
}

constexpr int bits_of(WeightFormat format) { return format == WeightFormat::kInt8 ? 8 : 4; }

inline bool has_group(WeightFormat format, int64_t size) {
  switch (format) {
    case WeightFormat::kInt4: return size == 32 || size == 64 || size == 128;
    case WeightFormat::kMxfp4: return size == 32;
    default: return size == 64;
  }
}

// The numbers of 16 codes. With zero points those of int4 are 8 less than the codes too.
struct CodeNumbers {
  float of[kCodes];
};

constexpr CodeNumbers numbers_of(WeightFormat format) {
  switch (format) {
    case WeightFormat::kMxfp4:
      return {{0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6}};
    case WeightFormat::kNf4:
      return {{-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
               -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
               0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f,
               0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f,
               1.0f}};
    default: return {{-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7}};
  }
}

}  // namespace moe_ext
