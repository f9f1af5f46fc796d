// out [n, N] = rows [n, M] @ weight [N, M]^T + bias [1, N] for few rows, where the rows of the
// weight are dense in memory. One thread of an x86 CPU.
//
// The limit is the memory of the weight, so it is read once:
//
//   kStreamed rows    its lines one after the other, in the order of memory, or two at once
//   more              kLines lines by a block: their sums are in registers. The blocks take turns
//                     with a part of the lines, which stays in the first cache
//
// There is at least one row.
//
// A sum is one per lane of one or more chains, to which vectors are added in turn, and then the sum
// of all these: the result of a row depends neither on the number of other rows, nor on threads and
// tiles.

#pragma once

#include <algorithm>

#include "lines.h"

namespace moe_ext {

template <typename Source>
struct FewRowsOf {
  Matrix out, rows;
  const Matrix* bias;  // null without
  Source source;       // of the weight's lines

  // memory: of the thread
  template <int bytes>
  MOE_EXT_INLINE void run(Panel& memory) const {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
    if constexpr (bytes == 64) {
      if constexpr (Source::template kHas<BFloat16Pairs::scalar_t>) {
        if (rows.dtype == ScalarType::BFloat16 && multiplies_pairs()) {
          return multiply<BFloat16Pairs, 1>(memory);
        }
      }
    }
#endif
    visit_format<bytes>(rows.dtype, [&](auto format) __attribute__((always_inline)) {
      using Format = decltype(format);
      if constexpr (Source::template kHas<typename Format::scalar_t>) {
        constexpr int64_t kMost = kChains<Format>;
        if constexpr (kMost > 1) {
          if (rows.columns >= kLong * kMost * Format::kElements) {
            const auto of_long = [&](auto) __attribute__((always_inline)) {
              multiply<Format, kMost>(memory);
            };
            return on_registers<bytes>(of_long);
          }
        }
        multiply<Format, 1>(memory);
      }
    });
  }

 private:
  // The rows of a block: their sums with kLines rows of the weight fit into the registers.
  template <typename Format>
  static constexpr int64_t kBlock = sizeof(typename Format::Lanes) == 64 ? 6 : 3;
  // Up to so many rows memory is the limit: 12 of pairs, 6 of other 16 bits. By blocks, which read
  // four lines at once, 6 rows of pairs took 1.25 times as long on a Zen 5, 12 rows 1.13 to 1.28
  // times, and 6 of float16 1.15 times.
  template <typename Format>
  static constexpr int64_t kStreamed = sizeof(typename Format::Lanes) < 64                  ? 3
                                       : sizeof(typename Format::scalar_t) == 4             ? 4
                                       : Format::kElements == 32 && Format::kRegisters == 1 ? 12
                                                                                            : 6;
  static constexpr uint64_t kStreamedBytes = 1 << 15;  // of these, for the first cache
  // A chain's additions wait for each other: as many chains as take 64 bytes of a line for each
  // wait keep up with memory. (bench_decode.py, one token, bfloat16, on a Zen 5: 87 to 97 % of the
  // rate of reading, also with registers of 32 bytes. Four lines at a time, of one chain each, came
  // to 81 to 89 %.) Lines that are not in memory are not streamed and have one, and so have short
  // lines, of fewer than kLong vectors for each chain.
  template <typename Format>
  static constexpr int64_t kChains =
      Source::kInMemory
          ? 64 * Format::kRegisters / (Format::kElements * sizeof(typename Format::scalar_t))
          : 1;
  static constexpr int64_t kLong = 12;
  static constexpr int64_t kAhead = 1 << 13;  // bytes

  // The rows, packed a block after the other: for each vector, those of its rows.
  template <typename Format>
  struct Packed {
    typename Format::Lanes *lanes, *sums;  // sums: [n, chains, kLines] of the lines at hand
    int64_t full, vectors;                 // of a row; the last one may not be full
    int64_t block;                         // rows

    // The rows of a block from its vector v on.
    const typename Format::Lanes* at(int64_t begin, int64_t count, int64_t v) const {
      return lanes + (begin * vectors + v * count) * Format::kRegisters;
    }
  };

  // The place of the products with kLines lines from `first` on: row j's begin at + j * apart.
  struct Totals {
    int64_t first;
    float* at;
    int64_t apart;
  };

  template <typename Lanes>
  MOE_EXT_INLINE void write_totals(const Totals& to, int64_t row,
                                   const Lanes (&sums)[kLines]) const {
    Vector<float, 16> four;
    sum_lanes(four, sums);
    source.complete(to.first, four);
    store(four, to.at + row * to.apart);
  }

  // Some vectors of some lines times the rows of a block.
  template <typename Format>
  struct Part {
    const typename Format::scalar_t* lines;
    int64_t stride;                        // elements from a line to the next
    int64_t vectors, rest;                 // full vectors, and elements after them
    const typename Format::Lanes* packed;  // the rows
    typename Format::Lanes* sums;          // [rows, chains, kLines]
    Stored next;                           // is asked for ahead of its use
    bool starts, ends;                     // whether it has the lines' first numbers, their last
    Totals to;                             // are written by the last chain of a part that ends
  };

  // Vector v is added to chain v % chains.
  template <typename Format, int64_t chains>
  MOE_EXT_INLINE void multiply(Panel& memory) const {
    using Lanes = typename Format::Lanes;
    constexpr int64_t kFloats = sizeof(Lanes) / sizeof(float);
    const int64_t n = rows.rows, full = rows.columns / Format::kElements;
    const int64_t vectors = parts(rows.columns, Format::kElements);
    const int64_t registers = n * vectors * Format::kRegisters, sums = n * chains * kLines;
    const int64_t width = source.count() + kLines - 1;
    const Matrix panel = memory.get(ScalarType::Float, 1, (registers + sums) * kFloats + n * width);
    auto* lanes = reinterpret_cast<Lanes*>(panel.data);
    auto* totals = reinterpret_cast<float*>(lanes + registers + sums);  // [n, width]
    const int64_t count = source.count();
    constexpr bool kStreams = Source::kInMemory && chains == kChains<Format>;
    const bool streams = kStreams && count >= kLines && n <= kStreamed<Format> &&
                         registers * sizeof(Lanes) <= kStreamedBytes;
    const int64_t block = streams ? n : parts(n, parts(n, kBlock<Format>));
    const Packed<Format> packed{lanes, lanes + registers, full, vectors, block};
    pack(packed);

    // The last lines are multiplied again where there are not enough after them; if there are fewer
    // in all, each takes the place of all.
    for (int64_t r = 0; r < count; r += count >= kLines ? kLines : 1) {
      const int64_t first = count >= kLines ? std::min(r, count - kLines) : r;
      const Totals to{first, totals + first, width};
      if constexpr (kStreams) {
        if (streams) {
          stream(to, packed);
          continue;
        }
      }
      multiply_blocks<chains>(to, packed);
    }
    for (int64_t j = 0; j < n; ++j) write_row<Format>(totals + j * width, bias, out, j);
  }

  template <typename Format>
  MOE_EXT_INLINE void pack(const Packed<Format>& packed) const {
    typename Format::Lanes* to = packed.lanes;
    for (int64_t begin = 0; begin < rows.rows; begin += packed.block) {
      const int64_t end = std::min(begin + packed.block, rows.rows);
      for (int64_t v = 0; v < packed.vectors; ++v) {
        for (int64_t j = begin; j < end; ++j, to += Format::kRegisters) {
          typename Format::scalar_t copy[Format::kElements];
          Format::widen(vector_of<sizeof(*to)>(rows, j, v, copy), to);
        }
      }
    }
  }

  // Vectors of kLines from the first on.
  template <typename Format>
  MOE_EXT_INLINE Matrix lines_of(int64_t first, int64_t begin, int64_t end) const {
    constexpr int64_t kElements = Format::kElements;
    const bool enough = source.count() >= kLines;
    Matrix lines = source.template find<sizeof(typename Format::Lanes)>(
        first, enough ? kLines : 1, begin * kElements, std::min(end * kElements, rows.columns));
    if (!enough) lines.row_stride = 0;
    return lines;
  }

  // Multiplies kLines lines by one block, one line after the other. Two share the loads of many
  // rows.
  template <typename Format>
  MOE_EXT_INLINE void stream(const Totals& to, const Packed<Format>& packed) const {
    const Matrix lines = lines_of<Format>(to.first, 0, packed.vectors);
    const int64_t rest = lines.columns - packed.full * Format::kElements;
    with_count<kStreamed<Format>>(rows.rows, [&](auto n) __attribute__((always_inline)) {
      constexpr int64_t kWidth = n > kBlock<Format> ? 2 : 1;
      typename Format::Lanes sums[n][kLines];
      for (int i = 0; i < kLines; i += kWidth) {
        typename Format::Lanes of_lines[n][kWidth];
        stream_lines<Format, n, kWidth>(lines.row_range(i, kLines), packed.full, rest, packed.lanes,
                                        of_lines);
        for (int j = 0; j < n; ++j) {
          for (int w = 0; w < kWidth; ++w) sums[j][i + w] = of_lines[j][w];
        }
      }
      for (int j = 0; j < n; ++j) write_totals(to, j, sums[j]);
    });
  }

  // The sums of `width` lines, of so many full vectors and a rest, with each row.
  template <typename Format, int64_t count, int64_t width>
  MOE_EXT_INLINE void stream_lines(const Matrix& lines, int64_t vectors, int64_t rest,
                                   const typename Format::Lanes* packed,
                                   typename Format::Lanes (&totals)[count][width]) const {
    using Lanes = typename Format::Lanes;
    using scalar_t = typename Format::scalar_t;
    constexpr int64_t kCount = kChains<Format>;
    constexpr int64_t kElements = Format::kElements;
    Lanes sums[count][width][kCount];
    for (auto& of_row : sums) {
      for (auto& of_line : of_row) {
        for (Lanes& sum : of_line) sum = Lanes{};
      }
    }
    const auto* line = row_of<const scalar_t>(lines, 0);
    const int64_t stride = lines.row_stride;
    const auto add_all = [&](int c, auto* from, int64_t apart) __attribute__((always_inline)) {
      for (int j = 0; j < count; ++j, packed += Format::kRegisters) {
        for (int w = 0; w < width; ++w) add<Format>(sums[j][w][c], from + w * apart, packed);
      }
    };
    int64_t v = 0;
    for (; v + kCount <= vectors; v += kCount, line += kCount * kElements) {
      constexpr int64_t kBytes = kCount * kElements * sizeof(scalar_t);
      for (int64_t i = 0; i < kBytes; i += 64) {
        for (int w = 0; w < width; ++w) {
          const auto* ahead = reinterpret_cast<const char*>(line + w * stride) + kAhead;
          __builtin_prefetch(ahead + i, 0, 3);
        }
      }
#pragma GCC unroll 4
      for (int c = 0; c < kCount; ++c) add_all(c, line + c * kElements, stride);
    }
#pragma GCC unroll 4
    for (int c = 0; c < kCount; ++c) {
      if (v + c < vectors) add_all(c, line + c * kElements, stride);
      if (v + c == vectors && rest > 0) {
        scalar_t last[width][kElements];
        for (int w = 0; w < width; ++w) {
          copy_first<sizeof(Lanes)>(line + w * stride + c * kElements, rest, last[w]);
        }
        add_all(c, &last[0][0], kElements);
      }
    }
    for (int j = 0; j < count; ++j) {
      for (int w = 0; w < width; ++w) {
        totals[j][w] = sums[j][w][0];
        for (int c = 1; c < kCount; ++c) totals[j][w] += sums[j][w][c];
      }
    }
  }

  // Multiplies kLines lines by all blocks, one part of the lines after the other.
  template <int64_t chains, typename Format>
  MOE_EXT_INLINE void multiply_blocks(const Totals& to, const Packed<Format>& packed) const {
    using scalar_t = typename Format::scalar_t;
    constexpr int64_t kElements = Format::kElements;
    constexpr int64_t kStep = std::max<int64_t>(chains, Source::kWhole / kElements);
    constexpr int64_t kMost = Source::kDeep / (kElements * sizeof(scalar_t));
    static_assert(kMost % kStep == 0 && kStep % chains == 0);
    const int64_t full = packed.full, count = std::max<int64_t>(1, parts(full, kMost));
    const int64_t deep = parts(parts(full, count), kStep) * kStep;
    int64_t v = 0;
    do {  // once if no vector is full
      const int64_t end = std::min(v + deep, full);
      const bool ends = end == full;
      const Matrix lines = lines_of<Format>(to.first, v, ends ? packed.vectors : end);
      Stored next = source.stored(to.first, kElements);
      next.first += ends ? kLines * next.apart : end * next.step;
      // Every block asks for what comes next: the CPU drops what it cannot keep up with. (24 rows
      // took 1.4 times as long on a Zen 5 where the first block alone asked.)
      for (int64_t begin = 0; begin < rows.rows; begin += packed.block) {
        const int64_t of_block = std::min(packed.block, rows.rows - begin);
        const Part<Format> part{reinterpret_cast<const scalar_t*>(lines.data),
                                lines.row_stride,
                                end - v,
                                lines.columns - (end - v) * kElements,
                                packed.at(begin, of_block, v),
                                packed.sums + begin * chains * kLines,
                                next,
                                v == 0,
                                ends,
                                {to.first, to.at + begin * to.apart, to.apart}};
        with_count<kBlock<Format>>(of_block, [&](auto n) __attribute__((always_inline)) {
          for (int64_t chain = 0; chain < chains; ++chain) multiply_chain<n, chains>(part, chain);
        });
      }
      v = end;
    } while (v < full);
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

  // Multiplies the vectors of a part that belong to a chain.
  template <int64_t count, int64_t chains, typename Format>
  MOE_EXT_INLINE void multiply_chain(const Part<Format>& part, int64_t chain) const {
    using Lanes = typename Format::Lanes;
    using scalar_t = typename Format::scalar_t;
    constexpr int64_t R = Format::kRegisters;
    const auto place = [&](int64_t j, int64_t c, int64_t i)
                           __attribute__((always_inline)) -> Lanes& {
      return part.sums[(j * chains + c) * kLines + i];
    };
    Lanes sums[count][kLines];
    for (int j = 0; j < count; ++j) {
      for (int i = 0; i < kLines; ++i) {
        sums[j][i] = Lanes{};
        if (!part.starts) sums[j][i] = place(j, chain, i);
      }
    }
    const int64_t stride = part.stride;
    const Lanes* packed = part.packed + chain * count * R;
    const scalar_t* line = part.lines + chain * Format::kElements;
    const char* next = part.next.first + chain * part.next.step;
    for (int64_t v = chain; v < part.vectors; v += chains) {
      for (int i = 0; i < kLines; ++i) __builtin_prefetch(next + i * part.next.apart, 0, 3);
      for (int j = 0; j < count; ++j) {
        for (int i = 0; i < kLines; ++i) {
          add<Format>(sums[j][i], line + i * stride, packed + j * R);
        }
      }
      packed += chains * count * R;
      line += chains * Format::kElements;
      next += chains * part.next.step;
    }
    if (part.rest > 0 && part.vectors % chains == chain) {
      scalar_t last[kLines][Format::kElements];
      for (int i = 0; i < kLines; ++i) {
        copy_first<sizeof(Lanes)>(line + i * stride, part.rest, last[i]);
      }
      for (int j = 0; j < count; ++j) {
        for (int i = 0; i < kLines; ++i) add<Format>(sums[j][i], last[i], packed + j * R);
      }
    }
    // The last part adds all chains up in the place of chain 0.
    const int64_t kept = part.ends ? 0 : chain;
    for (int j = 0; j < count; ++j) {
      if constexpr (chains > 1) {
        for (int i = 0; i < kLines; ++i) {
          if (part.ends && chain > 0) sums[j][i] = place(j, 0, i) + sums[j][i];
        }
      }
      if (part.ends && chain == chains - 1) {
        write_totals(part.to, j, sums[j]);
        continue;
      }
      for (int i = 0; i < kLines; ++i) place(j, kept, i) = sums[j][i];
    }
  }
};
using FewRows = FewRowsOf<AllLines>;

}  // namespace moe_ext
