// out [n, N] = rows [n, M] @ weight [N, M]^T + bias [1, N] for few rows and a weight in 8 or 4
// bits. One thread of an x86 CPU.
//
// The limit is the memory of the weight, which is read once: its lines one after the other, or a
// few side by side. A step is as many bytes as a register has, which codes.h unpacks for all rows
// of a block. The 8 codes of 4 bits of a lane have the same scale: the sum of a step is multiplied
// by the scales of its lanes.
//
// A sum is one per lane, to which steps are added in order, and then the sum of its lanes: the
// result of a row does not depend on how many rows there are.

#pragma once

#include "../gemm/lines.h"
#include "codes.h"

namespace moe_ext {

struct FewRowsQuantized {
  Matrix out, rows;
  QuantizedMatrix weight;
  const Matrix* bias;  // null without
  bool int8_rows;
  Asks asks = Asks::here();

  template <int bytes>
  MOE_EXT_INLINE void run(Panel& memory) const {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
    if constexpr (bytes == 64) {
      if (int8_rows && multiplies_bytes(weight.format, weight.columns)) {
        return weight.has_codes() ? run_with<bytes, ByteCodes>(memory)
                                  : run_with<bytes, ByteBytes>(memory);
      }
      if (!int8_rows && rows.dtype == ScalarType::BFloat16 && multiplies_pairs() &&
          weight.has_codes()) {
        return run_with<bytes, PairCodes>(memory);
      }
    }
#endif
    if constexpr (bytes > 16) {
      weight.has_codes() ? run_with<bytes, FloatCodes<bytes>>(memory)
                         : run_with<bytes, FloatBytes<bytes>>(memory);
    }
  }

 private:
  template <typename Codes>
  struct With {
    const FewRowsQuantized& product;

    template <int bytes>
    MOE_EXT_INLINE void run(Panel& memory) const {
      product.multiply<Codes>(memory);
    }
  };
  template <int bytes, typename Codes>
  void run_with(Panel& memory) const {
    on_registers<bytes>(With<Codes>{*this}, memory);
  }

  static constexpr int64_t kBlock = 4;        // rows
  static constexpr int64_t kAhead = 1 << 13;  // bytes

  // The rows as Codes has them, and what belongs to them.
  template <typename Codes>
  struct Packed {
    int64_t steps, full;          // of a line; the last one may not be full
    int64_t groups, width;        // of a row, and lines, filled up to whole registers
    typename Codes::Word* words;  // [n, steps, kWords]
    typename Codes::Lanes* sums;  // [n, kLines]
    float* totals;                // [n, width]
    float* group_sums;            // [n, groups]: of the rows' numbers
    float *scales, *offsets;      // [kLines, weight.groups] of the lines at hand, and a register
    float* row_scales;            // [n]
    // Lanes of a line's last step and of its last offsets: bits set where they are the line's.
    uint32_t *step_end, *groups_end;
    float* row;  // [steps, kNumbers]: one at a time
  };

  template <typename Codes>
  MOE_EXT_INLINE Packed<Codes> layout(Panel& memory) const {
    using Lanes = typename Codes::Lanes;
    constexpr int64_t kFloats = sizeof(Lanes) / 4;
    const auto whole = [](int64_t size) { return (size + kFloats - 1) / kFloats * kFloats; };
    const int64_t n = rows.rows;
    Packed<Codes> p{};
    p.steps = (weight.columns + Codes::kNumbers - 1) / Codes::kNumbers;
    p.full = weight.columns / Codes::kNumbers;
    p.groups = whole(weight.groups);
    p.width = whole(weight.rows + kLines - 1);
    const int64_t lanes = n * p.steps * Codes::kWords + n * kLines;
    const int64_t of_lines = whole(kLines * weight.groups) + kFloats;
    const int64_t floats =
        n * p.width + n * p.groups + 2 * of_lines + 2 * kFloats + n + p.steps * Codes::kNumbers;
    const Matrix panel = memory.get(ScalarType::Float, 1, lanes * kFloats + floats);
    p.words = reinterpret_cast<typename Codes::Word*>(panel.data);
    p.sums = reinterpret_cast<Lanes*>(panel.data) + n * p.steps * Codes::kWords;
    p.totals = reinterpret_cast<float*>(p.sums + n * kLines);
    p.group_sums = p.totals + n * p.width;
    p.scales = p.group_sums + n * p.groups;
    p.offsets = p.scales + of_lines;
    p.step_end = reinterpret_cast<uint32_t*>(p.offsets + of_lines);
    p.groups_end = p.step_end + kFloats;
    p.row_scales = p.offsets + of_lines + 2 * kFloats;
    p.row = p.row_scales + n;
    std::memset(p.group_sums, 0, (n * p.groups + 2 * of_lines) * sizeof(float));
    for (int64_t i = 0; i < kFloats; ++i) {
      p.step_end[i] = 8 * i < weight.columns - p.full * Codes::kNumbers ? ~0u : 0;
      p.groups_end[i] = i < weight.groups % kFloats ? ~0u : 0;
    }
    return p;
  }

  // Lines of the weight: where they begin, and from one to the next. Where there are fewer than
  // kLines in all, each takes the place of all.
  struct Lines {
    int64_t first, stride;
  };

  template <typename Codes>
  MOE_EXT_INLINE void multiply(Panel& memory) const {
    const Packed<Codes> p = layout<Codes>(memory);
    const Codes codes(weight.format);
    pack(codes, p);
    const LaneScales<sizeof(typename Codes::Lanes)> of_lanes(weight.group());
    // The last lines are multiplied again where there are not enough after them.
    const bool enough = weight.rows >= kLines;
    for (int64_t r = 0; r < weight.rows; r += enough ? kLines : 1) {
      const Lines lines = enough ? Lines{std::min(r, weight.rows - kLines), 1} : Lines{r, 0};
      if constexpr (Codes::kHasGroups) prepare_scales(p, lines);
      for (int64_t begin = 0; begin < rows.rows; begin += kBlock) {
        const int64_t count = std::min(kBlock, rows.rows - begin);
        with_count<kBlock>(count, [&](auto n) __attribute__((always_inline)) {
          multiply_rows<n>(codes, of_lanes, p, lines, begin);
        });
      }
      for (int64_t j = 0; j < rows.rows; ++j) {
        typename Codes::Lanes sums[kLines];
        std::memcpy(sums, p.sums + j * kLines, sizeof(sums));
        if (weight.zeros) add_offsets(p, j, lines, sums);
        Vector<float, 16> four;
        sum_lanes(four, sums);
        store(four, p.totals + j * p.width + lines.first);
      }
    }
    for (int64_t j = 0; j < rows.rows; ++j) finish(p, j);
  }

  template <typename Codes>
  MOE_EXT_INLINE void pack(const Codes& codes, const Packed<Codes>& p) const {
    using Element = typename Codes::Element;
    using Lanes = typename Codes::Lanes;
    constexpr int64_t kStep = Codes::kNumbers;
    static_assert(kStep == Codes::kParts * sizeof(typename Codes::Word) / sizeof(Element));
    typename Codes::Word* words = p.words;
    const int64_t M = weight.columns;
    for (int64_t j = 0; j < rows.rows; ++j) {
      visit_format<sizeof(Lanes)>(rows.dtype, [&](auto format) __attribute__((always_inline)) {
        convert<sizeof(Lanes)>(row_of<const typename decltype(format)::scalar_t>(rows, j), M,
                               p.row);
      });
      std::memset(p.row + M, 0, (p.steps * kStep - M) * sizeof(float));
      p.row_scales[j] = codes.unit * (int8_rows ? round_row<sizeof(Lanes)>(p.row, M) : 1);
      for (const float* step = p.row; step < p.row + M; step += kStep, words += Codes::kWords) {
        auto* to = reinterpret_cast<Element*>(words);
        for (int64_t i = 0; i < kStep; ++i) to[Codes::place(i)] = Codes::element(step[i]);
        codes.complete(words);
      }
      if (!weight.zeros) continue;
      for (int64_t g = 0; g < weight.groups; ++g) {
        float sums[8] = {};
        const float* numbers = p.row + g * weight.group();
        for (int64_t m = 0; m < weight.group(); m += 8) {
          for (int i = 0; i < 8; ++i) sums[i] += numbers[m + i];
        }
        for (const float sum : sums) p.group_sums[j * p.groups + g] += sum;
      }
    }
  }

  // Reads the scales of some lines, and their offsets: factors of the sums of a row's groups.
  template <typename Codes>
  MOE_EXT_INLINE void prepare_scales(const Packed<Codes>& p, const Lines& lines) const {
    constexpr int kBytes = sizeof(typename Codes::Lanes);
    const int64_t count = lines.stride ? kLines : 1;
    weight.scales_of<kBytes>(lines.first * weight.groups, count * weight.groups, p.scales);
    if (!weight.zeros) return;
    weight.zeros_of<kBytes>(lines.first, count, p.offsets);
    for (int64_t g = 0; g < count * weight.groups; ++g) p.offsets[g] *= -p.scales[g];
  }

  // Behind a line's scales and offsets are those of the next, which may be anything.
  template <typename Lanes>
  static MOE_EXT_INLINE void clear_behind(Lanes& lanes, const uint32_t* end) {
    Vector<uint32_t, sizeof(Lanes)> bits, own;
    std::memcpy(&bits, &lanes, sizeof(bits));
    load(own, end);
    bits &= own;
    std::memcpy(&lanes, &bits, sizeof(bits));
  }

  template <typename Codes>
  MOE_EXT_INLINE void add_offsets(const Packed<Codes>& p, int64_t j, const Lines& lines,
                                  typename Codes::Lanes (&sums)[kLines]) const {
    using Lanes = typename Codes::Lanes;
    constexpr int64_t kFloats = sizeof(Lanes) / 4;
    for (int64_t g = 0; g < weight.groups; g += kFloats) {
      Lanes of_groups, offsets[kLines];
      load(of_groups, p.group_sums + j * p.groups + g);
      for (int i = 0; i < kLines; ++i) {
        load(offsets[i], p.offsets + i * lines.stride * weight.groups + g);
        if (g + kFloats > weight.groups) clear_behind(offsets[i], p.groups_end);
        add_product(sums[i], offsets[i], of_groups);
      }
    }
  }

  // Some rows from `begin` on.
  template <int64_t count, typename Codes>
  MOE_EXT_INLINE void multiply_rows(const Codes& codes,
                                    const LaneScales<sizeof(typename Codes::Lanes)>& of_lanes,
                                    const Packed<Codes>& p, const Lines& lines,
                                    int64_t begin) const {
    // More lines of 4 bits at a time, so that additions need not wait for each other, if their
    // totals fit into the registers. Lines of 8 bits keep up one at a time, the order in which
    // memory is fastest.
    constexpr bool fits = count == 1 || sizeof(typename Codes::Lanes) == 64;
    constexpr int kAtOnce = Codes::kHasGroups && fits ? kLines : 1;
    for (int i = 0; i < kLines; i += kAtOnce) {
      multiply_block<count, kAtOnce>(codes, of_lanes, p, lines, begin, i);
    }
  }

  template <int64_t count, int at_once, typename Codes>
  MOE_EXT_INLINE void multiply_block(const Codes& codes,
                                     const LaneScales<sizeof(typename Codes::Lanes)>& of_lanes,
                                     const Packed<Codes>& p, const Lines& lines, int64_t begin,
                                     int first) const {
    using Lanes = typename Codes::Lanes;
    constexpr int64_t kBytes = sizeof(Lanes);
    const int64_t stride = p.steps * Codes::kWords, apart = lines.stride * weight.row_bytes();
    const typename Codes::Word* words = p.words + begin * stride;
    const uint8_t* from = weight.values + lines.first * weight.row_bytes() + first * apart;
    const float* scales = p.scales + first * lines.stride * weight.groups;
    typename Codes::Totals totals[at_once][count]{};
    const auto find_scales = [&](int i, int64_t v, Lanes& out) __attribute__((always_inline)) {
      if constexpr (Codes::kHasGroups) {
        of_lanes.find(scales + i * lines.stride * weight.groups, v, out);
      }
    };
    const bool second = asks.second;
    for (int64_t v = 0; v < p.full; ++v, words += Codes::kWords, from += kBytes) {
      for (int i = 0; i < at_once; ++i) {
        ask_ahead(from + i * apart + kAhead, second);
        Lanes of_step{};
        find_scales(i, v, of_step);
        codes.template add<count>(from + i * apart, words, stride, of_step, totals[i]);
      }
    }
    if (p.full < p.steps) {
      for (int i = 0; i < at_once; ++i) {
        uint8_t rest[kBytes]{};
        std::memcpy(rest, from + i * apart, weight.row_bytes() - p.full * kBytes);
        Lanes of_step{};
        find_scales(i, p.full, of_step);
        clear_behind(of_step, p.step_end);
        codes.template add<count>(rest, words, stride, of_step, totals[i]);
      }
    }
    for (int i = 0; i < at_once; ++i) {
      for (int64_t j = 0; j < count; ++j) {
        Codes::template to_floats<count>(totals[i], j, p.sums[(begin + j) * kLines + first + i]);
      }
    }
  }

  // Row j of out, from its totals.
  template <typename Codes>
  MOE_EXT_INLINE void finish(const Packed<Codes>& p, int64_t j) const {
    float* totals = p.totals + j * p.width;
    const float of_row = p.row_scales[j];
    if (!weight.has_codes()) {
      const auto* scales = reinterpret_cast<const float*>(weight.scales);
      for (int64_t r = 0; r < out.columns; ++r) totals[r] *= scales[r];
    }
    for (int64_t r = 0; r < out.columns; ++r) totals[r] *= of_row;
    constexpr int kBytes = sizeof(typename Codes::Lanes);
    visit_format<kBytes>(rows.dtype, [&](auto format) __attribute__((always_inline)) {
      write_row<decltype(format)>(totals, bias, out, j);
    });
  }
};

}  // namespace moe_ext
