// out [n, N] = rows [n, M] @ weight [N, M]^T + bias [1, N] for few rows, where the rows of the
// weight are dense in memory. One thread of an x86 CPU.
//
// The limit is the memory of the weight, so it is read once:
//
//   a block of rows   its lines in the order of memory, one after the other or a few at a time
//   more              kLines lines by a block: their sums are in registers. The blocks take turns
//                     with a part of the lines, which stays in the first cache
//
// There is at least one row.
//
// A sum is one per lane, to which vectors are added in order, and then the sum of its lanes: the
// result of a row depends neither on the number of other rows, nor on threads and tiles.

#pragma once

#include "lanes.h"

#if defined(__x86_64__)
namespace moe_ext {

constexpr int kLines = 4;  // as many as sum_lanes adds up

// The sum over the lanes of each of four registers.
template <typename Lanes>
MOE_EXT_INLINE void sum_lanes(Vector<float, 16>& sums, const Lanes (&parts)[4]) {
  Lanes rows[4] = {parts[0], parts[1], parts[2], parts[3]};
  transpose(rows);
  rows[0] = (rows[0] + rows[1]) + (rows[2] + rows[3]);
  Vector<float, 16> fours[sizeof(Lanes) / 16];
  std::memcpy(fours, rows, sizeof(Lanes));
  for (int i = sizeof(Lanes) / 32; i > 0; i /= 2) {
    for (int j = 0; j < i; ++j) fours[j] += fours[j + i];
  }
  sums = fours[0];
}

// Whether products of bfloat16 are made in pairs, by AVX512-BF16.
inline bool multiplies_pairs() {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
  __builtin_cpu_init();
  return register_bytes() == 64 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// The lines of a weight that has them all.
struct AllLines {
  int64_t count;

  // Where kLines or fewer from the first on begin.
  template <int bytes>
  MOE_EXT_INLINE int64_t find(int64_t first, int64_t) const {
    return first;
  }
};

template <typename Source>
struct FewRowsOf {
  Matrix out, rows, weight;
  const Matrix* bias;  // null without
  Source source;       // of what is in `weight`

  // memory: of the thread
  template <int bytes>
  MOE_EXT_INLINE void run(Panel& memory) const {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
    if constexpr (bytes == 64) {
      if (rows.dtype == ScalarType::BFloat16 && multiplies_pairs()) {
        return multiply<BFloat16Pairs>(memory);
      }
    }
#endif
    visit_format<bytes>(rows.dtype, [&](auto format) __attribute__((always_inline)) {
      multiply<decltype(format)>(memory);
    });
  }

 private:
  // The rows of a block: their sums with kLines rows of the weight fit into the registers.
  template <typename Format>
  static constexpr int64_t kBlock = sizeof(typename Format::Lanes) == 64 ? 6 : 3;
  // Bytes of a line that stay in the first cache while the blocks go by.
  static constexpr int64_t kDeep = 1 << 11;
  // Up to so many rows memory is the limit.
  template <typename Format>
  static constexpr int64_t kStreamed = std::min<int64_t>(4, kBlock<Format>);
  static constexpr uint64_t kStreamedBytes = 1 << 15;  // of these, for the first cache
  // Then lines are read as many at a time as fill 64 bytes for each step of a sum: one, of
  // registers of that size. (bench_decode.py, one token, bfloat16 in pairs, on a Zen 5: 91 to 97 %
  // of the rate of reading, 81 to 85 % with four lines at a time.)
  template <typename Format>
  static constexpr int kAtOnce =
      64 * Format::kRegisters / (Format::kElements * sizeof(typename Format::scalar_t));
  static constexpr int64_t kAhead = 1 << 13;  // bytes

  // The rows, packed a block after the other: for each vector, those of its rows.
  template <typename Format>
  struct Packed {
    typename Format::Lanes *lanes, *sums;  // sums: [n, kLines] of the lines at hand
    int64_t full, vectors;                 // of a row; the last one may not be full
    int64_t block;                         // rows

    // The rows of a block from its vector v on.
    const typename Format::Lanes* at(int64_t begin, int64_t count, int64_t v) const {
      return lanes + (begin * vectors + v * count) * Format::kRegisters;
    }
  };

  // Lines of the weight, with elements from one to the next.
  struct Lines {
    int64_t first, stride;
  };

  // Some vectors of some lines times the rows of a block.
  template <typename Format>
  struct Part {
    Lines lines;
    int64_t begin, end;                     // vectors
    const typename Format::Lanes* packed;   // the rows
    typename Format::Lanes* sums;           // [rows, kLines]
    const typename Format::scalar_t* next;  // is asked for ahead of its use
  };

  template <typename Format>
  MOE_EXT_INLINE void multiply(Panel& memory) const {
    using Lanes = typename Format::Lanes;
    constexpr int64_t kFloats = sizeof(Lanes) / sizeof(float);
    const int64_t n = rows.rows, full = rows.columns / Format::kElements;
    const int64_t vectors = (rows.columns + Format::kElements - 1) / Format::kElements;
    const int64_t registers = n * vectors * Format::kRegisters, width = source.count + kLines - 1;
    const Matrix panel =
        memory.get(ScalarType::Float, 1, (registers + n * kLines) * kFloats + n * width);
    auto* lanes = reinterpret_cast<Lanes*>(panel.data);
    auto* totals = reinterpret_cast<float*>(lanes + registers + n * kLines);  // [n, width]
    const int64_t blocks = (n + kBlock<Format> - 1) / kBlock<Format>;
    const Packed<Format> packed{lanes, lanes + registers, full, vectors, (n + blocks - 1) / blocks};
    pack(packed);

    // The last lines are multiplied again where there are not enough after them; if there are fewer
    // in all, each takes the place of all.
    const bool enough = source.count >= kLines;
    const bool streams =
        enough && n <= kStreamed<Format> && registers * sizeof(Lanes) <= kStreamedBytes;
    for (int64_t r = 0; r < source.count; r += enough ? kLines : 1) {
      const int64_t first = enough ? std::min(r, source.count - kLines) : r;
      const int64_t at = source.template find<sizeof(Lanes)>(first, enough ? kLines : 1);
      const Lines lines{at, enough ? weight.row_stride : 0};
      if (streams) {
        stream(lines, packed);
      } else {
        multiply_blocks(lines, packed);
      }
      if (full < vectors) add_rest(lines, packed);
      for (int64_t j = 0; j < n; ++j) {
        Lanes sums[kLines];
        std::memcpy(sums, packed.sums + j * kLines, sizeof(sums));
        std::memset(static_cast<void*>(packed.sums + j * kLines), 0, sizeof(sums));
        Vector<float, 16> four;
        sum_lanes(four, sums);
        store(four, totals + j * width + first);
      }
    }
    for (int64_t j = 0; j < n; ++j) finish<Format>(j, totals + j * width);
  }

  template <typename Format>
  MOE_EXT_INLINE void pack(const Packed<Format>& packed) const {
    typename Format::Lanes* to = packed.lanes;
    for (int64_t begin = 0; begin < rows.rows; begin += packed.block) {
      const int64_t end = std::min(begin + packed.block, rows.rows);
      for (int64_t v = 0; v < packed.vectors; ++v) {
        for (int64_t j = begin; j < end; ++j, to += Format::kRegisters) {
          typename Format::scalar_t copy[Format::kElements];
          Format::widen(vector_of(rows, j, v, copy), to);
        }
      }
    }
    std::memset(static_cast<void*>(packed.sums), 0, rows.rows * kLines * sizeof(*packed.sums));
  }

  // One block, kAtOnce lines at a time, in the order of memory.
  template <typename Format>
  MOE_EXT_INLINE void stream(const Lines& lines, const Packed<Format>& packed) const {
    using scalar_t = typename Format::scalar_t;
    constexpr int kCount = kAtOnce<Format>;
    for (int i = 0; i < kLines; i += kCount) {
      const int64_t first = lines.first + i;
      const scalar_t* next = kCount == 1 ? line_of<scalar_t>(first) + kAhead / sizeof(scalar_t)
                                         : line_of<scalar_t>(first + kCount);
      const Part<Format> part{{first, lines.stride}, 0,   packed.full, packed.lanes,
                              packed.sums + i,       next};
      multiply_rows<true, kStreamed<Format>>(rows.rows, part);
    }
  }

  // Any number of blocks, which take turns with a part of the lines.
  template <typename Format>
  MOE_EXT_INLINE void multiply_blocks(const Lines& lines, const Packed<Format>& packed) const {
    using scalar_t = typename Format::scalar_t;
    constexpr int64_t kVectors = kDeep / (Format::kElements * sizeof(scalar_t));
    const int64_t full = packed.full, parts = (full + kVectors - 1) / kVectors;
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t v = p * full / parts, end = (p + 1) * full / parts;
      const scalar_t* next = end < full ? line_of<scalar_t>(lines.first) + end * Format::kElements
                                        : line_of<scalar_t>(lines.first + kLines);
      // Every block asks for what comes next: the CPU drops what it cannot keep up with. (24 rows
      // took 1.4 times as long on a Zen 5 where the first block alone asked.)
      for (int64_t begin = 0; begin < rows.rows; begin += packed.block) {
        const int64_t count = std::min(packed.block, rows.rows - begin);
        const Part<Format> part{
            lines, v, end, packed.at(begin, count, v), packed.sums + begin * kLines, next};
        multiply_rows<false, kBlock<Format>>(count, part);
      }
    }
  }

  // The last vector of every line, which is not full.
  template <typename Format>
  MOE_EXT_INLINE void add_rest(const Lines& lines, const Packed<Format>& packed) const {
    for (int i = 0; i < kLines; ++i) {
      typename Format::scalar_t copy[Format::kElements];
      const auto* last = vector_of(weight, lines.first + (lines.stride ? i : 0), packed.full, copy);
      for (int64_t begin = 0; begin < rows.rows; begin += packed.block) {
        const int64_t count = std::min(packed.block, rows.rows - begin);
        const auto* from = packed.at(begin, count, packed.full);
        for (int64_t j = 0; j < count; ++j, from += Format::kRegisters) {
          add<Format>(packed.sums[(begin + j) * kLines + i], last, from);
        }
      }
    }
  }

  template <typename scalar_t>
  MOE_EXT_INLINE const scalar_t* line_of(int64_t row) const {
    return reinterpret_cast<const scalar_t*>(weight.data) + row * weight.row_stride;
  }

  // A vector of the weight times one of a row, added to a sum per lane.
  template <typename Format>
  static MOE_EXT_INLINE void add(typename Format::Lanes& sums,
                                 const typename Format::scalar_t* weight,
                                 const typename Format::Lanes* row) {
    typename Format::Lanes w[Format::kRegisters];
    Format::widen(weight, w);
    Format::add(sums, w, row);
  }

  // Row j of out, from its totals.
  template <typename Format>
  MOE_EXT_INLINE void finish(int64_t j, float* totals) const {
    using scalar_t = typename Format::scalar_t;
    if (bias) {
      const auto* first = reinterpret_cast<const scalar_t*>(bias->data);
      for (int64_t r = 0; r < out.columns; ++r) totals[r] += static_cast<float>(first[r]);
    }
    auto* row = reinterpret_cast<scalar_t*>(out.data) + j * out.row_stride;
    convert<sizeof(typename Format::Lanes)>(totals, out.columns, row);
  }

  // The code for as many rows as there are, at most `most`.
  template <bool streams, int64_t most, typename Format>
  MOE_EXT_INLINE void multiply_rows(int64_t count, const Part<Format>& part) const {
    if constexpr (most > 1) {
      if (count < most) return multiply_rows<streams, most - 1>(count, part);
    }
    multiply_part<streams, most>(part);
  }

  template <bool streams, int64_t count, typename Format>
  MOE_EXT_INLINE void multiply_part(const Part<Format>& part) const {
    using Lanes = typename Format::Lanes;
    using scalar_t = typename Format::scalar_t;
    constexpr int lines = streams ? kAtOnce<Format> : kLines;
    const int64_t stride = part.lines.stride;
    // The next lines are asked for in the order of memory, if they are neighbours, or side by side.
    constexpr int64_t kCacheLine = 64 / sizeof(scalar_t);
    constexpr int kAsked = streams ? lines * Format::kElements / kCacheLine : lines;
    constexpr int64_t kStep = streams ? lines * Format::kElements : Format::kElements;
    const int64_t apart = streams ? kCacheLine : stride;
    Lanes sums[count][lines];
    for (int j = 0; j < count; ++j) {
      for (int i = 0; i < lines; ++i) sums[j][i] = part.sums[j * kLines + i];
    }
    const Lanes* packed = part.packed;
    const scalar_t* line = line_of<scalar_t>(part.lines.first) + part.begin * Format::kElements;
    const scalar_t* next = part.next;
    for (int64_t v = part.begin; v < part.end; ++v) {
      for (int i = 0; i < kAsked; ++i) __builtin_prefetch(next + i * apart, 0, 3);
      for (int j = 0; j < count; ++j) {
        for (int i = 0; i < lines; ++i) {
          add<Format>(sums[j][i], line + i * stride, packed + j * Format::kRegisters);
        }
      }
      packed += count * Format::kRegisters;
      line += Format::kElements;
      next += kStep;
    }
    for (int j = 0; j < count; ++j) {
      for (int i = 0; i < lines; ++i) part.sums[j * kLines + i] = sums[j][i];
    }
  }
};
using FewRows = FewRowsOf<AllLines>;

}  // namespace moe_ext
#endif
