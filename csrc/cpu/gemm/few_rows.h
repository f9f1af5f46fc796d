// out [n, N] = rows [n, M] @ weight [N, M]^T + bias [1, N] for few rows, where the rows of the
// weight are dense in memory. One thread of an x86 CPU.
//
// The limit is the memory of the weight, so it is read once:
//
//   few rows          its lines one after the other, in the order of memory, or two at once
//   more              kLines lines by a block: their sums are in registers. The blocks take turns
//                     with a part of the lines, which stays in the first cache, and the lines of a
//                     group with a part of the rows, fewer of which come from the second one
//
// There is at least one row.
//
// A sum is one per lane of one or more chains, to which vectors are added in turn, and then the sum
// of all these: the result of a row depends neither on the number of other rows, nor on threads and
// tiles.

#pragma once

#include <algorithm>

#include "line_loops.h"

namespace moe_ext {

template <typename Source>
struct FewRowsOf {
  Matrix out, rows;
  const Matrix* bias;  // null without
  Source source;       // of the weight's lines
  Asks asks = Asks::here();

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
  // four lines at once, 8 to 12 rows of pairs took 1.05 to 1.2 times as long on a Zen 5 where the
  // weight lay in small pages.
  template <typename Format>
  static constexpr int64_t kStreamed = sizeof(typename Format::Lanes) < 64                  ? 3
                                       : sizeof(typename Format::scalar_t) == 4             ? 4
                                       : Format::kElements == 32 && Format::kRegisters == 1 ? 12
                                                                                            : 6;
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
  // Bytes of the first cache that streamed rows have, with the lines that are asked for.
  static constexpr int64_t kCached = 5 << 13;
  // A Zen 4 loads 64 bytes a cycle, and every line loads the streamed rows again. So it streams
  // four rows at most, which take at most so many bytes of its first cache together with a line.
  // (By blocks, four rows of bfloat16 pairs take 1.1 to 1.5 times as long, and three rows of
  // float16 in registers of 32 bytes 1.15 to 1.25 times. In registers of 64 bytes, where blocks are
  // faster, three streamed rows of 27 KiB and more take up to 1.6 times as long.)
  static constexpr int64_t kStreamedOf4 = 4;
  template <typename Format>
  static constexpr int64_t kCachedOf4 = (sizeof(typename Format::Lanes) == 64 ? 26 : 28) << 10;
  // Its own prefetcher keeps up with memory for one packed row of up to so many bytes. For two rows
  // that depends on the order of the instructions: two builds of the same loop (float16, registers
  // of 32 bytes) came to 78 to 107 % and to 33 to 48 % of the rate of reading, and one that asks
  // for memory to 87 to 97 %.
  static constexpr int64_t kUnasked = 12 << 10;
  // A group has so many lines, and a part of its rows so many bytes if the lines are long.
  static constexpr int64_t kGroup = 16, kPartBytes = 1 << 14;

  // The rows, packed a block after the other: for each vector, those of its rows.
  template <typename Format>
  struct Packed {
    typename Format::Lanes *lanes, *sums;  // sums: [kGroup / kLines, n, chains, kLines] of a group
    int64_t full, vectors;                 // of a row; the last one may not be full
    int64_t block;                         // rows

    // The rows of a block from its vector v on.
    const typename Format::Lanes* at(int64_t begin, int64_t count, int64_t v) const {
      return lanes + (begin * vectors + v * count) * Format::kRegisters;
    }
  };

  // The products of all lines, [n, apart].
  struct Totals {
    float* at;
    int64_t apart;
  };

  // Lines that share the parts of the rows.
  struct Group {
    int64_t begin, end;
  };

  template <typename Lanes>
  MOE_EXT_INLINE void write_totals(const Totals& to, int64_t row, int64_t first,
                                   const Lanes (&sums)[kLines]) const {
    Vector<float, 16> four;
    sum_lanes(four, sums);
    source.complete(first, four);
    store(four, to.at + row * to.apart + first);
  }

  template <typename Format, int64_t chains>
  MOE_EXT_INLINE void multiply(Panel& memory) const {
    using Lanes = typename Format::Lanes;
    constexpr int64_t kFloats = sizeof(Lanes) / sizeof(float);
    const int64_t n = rows.rows, full = rows.columns / Format::kElements;
    const int64_t vectors = parts(rows.columns, Format::kElements);
    const int64_t registers = n * vectors * Format::kRegisters, sums = n * chains * kGroup;
    const int64_t width = source.count() + kLines - 1;
    const Matrix panel = memory.get(ScalarType::Float, 1, (registers + sums) * kFloats + n * width);
    auto* lanes = reinterpret_cast<Lanes*>(panel.data);
    const Totals totals{reinterpret_cast<float*>(lanes + registers + sums), width};
    const int64_t count = source.count();
    constexpr bool kStreams = Source::kInMemory && chains == kChains<Format>;
    const int64_t bytes = registers * sizeof(Lanes);
    const bool streams = kStreams && count >= kLines && streams_rows<Format>(bytes);
    const int64_t block = streams ? n : parts(n, parts(n, kBlock<Format>));
    const Packed<Format> packed{lanes, lanes + registers, full, vectors, block};
    pack(packed);

    if constexpr (kStreams) {
      if (streams) stream(totals, packed, asks_ahead(bytes));
    }
    for (int64_t r = 0; r < count && !streams; r += kGroup) {
      multiply_group<chains>({r, std::min(r + kGroup, count)}, totals, packed);
    }
    for (int64_t j = 0; j < n; ++j) write_row<Format>(totals.at + j * width, bias, out, j);
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

  // Where kLines lines begin: the last ones are multiplied again where there are not enough after
  // them; if there are fewer in all, each takes the place of all.
  MOE_EXT_INLINE int64_t first_line(int64_t line) const {
    return source.count() < kLines ? line : std::min(line, source.count() - kLines);
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

  template <typename Format>
  static constexpr int64_t lines_at_once(int64_t n) {
    return n > kBlock<Format> ? 2 : 1;
  }

  // Whether the loops multiply one line after the other. The packed rows take so many bytes.
  template <typename Format>
  bool streams_rows(int64_t bytes) const {
    const int64_t n = rows.rows, line = rows.columns * sizeof(typename Format::scalar_t);
    const int64_t most = kStreamed<Format>;
    if (asks.in_order) {
      return n <= std::min(most, kStreamedOf4) && bytes + line <= kCachedOf4<Format>;
    }
    const int64_t asked = lines_at_once<Format>(n) * LineLoops<Format>::kAhead;
    return n <= most && bytes + asked <= kCached;
  }

  // Whether the loops of `stream` ask for memory ahead of its use, by the packed rows' bytes.
  bool asks_ahead(int64_t bytes) const {
    return !asks.in_order || rows.rows > 1 || bytes > kUnasked;
  }

  // Multiplies one line after the other by all rows. Two share the loads of many rows.
  template <typename Format>
  MOE_EXT_INLINE void stream(const Totals& to, const Packed<Format>& packed, bool ahead) const {
    with_count<kStreamed<Format>>(rows.rows, [&](auto n) __attribute__((always_inline)) {
      constexpr int64_t kWidth = lines_at_once<Format>(n);
      for (int64_t r = 0; r < source.count(); r += kLines) {
        const int64_t first = first_line(r);
        const Matrix lines = lines_of<Format>(first, 0, packed.vectors);
        const int64_t rest = lines.columns - packed.full * Format::kElements;
        typename Format::Lanes sums[n][kLines];
        for (int i = 0; i < kLines; i += kWidth) {
          typename Format::Lanes of_lines[n][kWidth];
          LineLoops<Format>::template stream<n, kWidth, kChains<Format>>(
              lines.row_range(i, kLines), packed.full, rest, packed.lanes, ahead, asks.second,
              of_lines);
          for (int j = 0; j < n; ++j) {
            for (int w = 0; w < kWidth; ++w) sums[j][i + w] = of_lines[j][w];
          }
        }
        for (int j = 0; j < n; ++j) write_totals(to, j, first, sums[j]);
      }
    });
  }

  // Full vectors of a part: all that a line has, or kPartBytes of all rows within bounds.
  template <int64_t chains, typename Format>
  MOE_EXT_INLINE int64_t depth(const Packed<Format>& packed) const {
    constexpr int64_t kElements = Format::kElements;
    constexpr int64_t kStep = std::max<int64_t>(chains, Source::kWhole / kElements);
    constexpr int64_t kMost = Source::kDeep / (kElements * sizeof(typename Format::scalar_t));
    static_assert(kMost % kStep == 0 && kStep % chains == 0);
    if (packed.full <= kMost) return packed.full;
    const int64_t bytes = rows.rows * Format::kRegisters * sizeof(typename Format::Lanes);
    // Where memory is not the limit, less of a line takes longer.
    constexpr bool kWaits = Source::kInMemory && sizeof(typename Format::Lanes) == 64;
    constexpr int64_t kLeast = kWaits ? kMost / 2 : kMost;
    const int64_t most = std::clamp(kPartBytes / bytes, kLeast, kMost);
    return parts(parts(packed.full, parts(packed.full, most)), kStep) * kStep;
  }

  // Vectors of a group's lines: v to end - 1 of kLines from r on.
  struct Place {
    Group group;
    int64_t r, v, end;
  };

  // The loops multiply the vectors of a place, and ask for as many vectors of the lines `ahead` of
  // it. The next part, or the next group, follows a group's last lines.
  template <int64_t chains, typename Format>
  MOE_EXT_INLINE auto asked(const Place& at, int64_t full, int64_t ahead) const {
    const auto [begin, stop] = at.group;
    int64_t line = at.r + ahead, v = at.v;
    if (line >= stop) {
      v = at.end == full ? 0 : at.end;
      if (v > 0) line = begin + (line - begin) % (parts(stop - begin, kLines) * kLines);
    }
    const Stored next = source.stored(line, Format::kElements);
    return typename LineLoops<Format>::Asked{next.first + v * next.step, next.apart,
                                             chains * next.step, next.step};
  }

  // The loops ask for the next group in the order of memory, and have asked for as much of it as
  // they have multiplied of this one.
  template <int64_t chains, typename Format>
  MOE_EXT_INLINE auto asked_in_order(const Place& at, int64_t full) const {
    using Asked = typename LineLoops<Format>::Asked;
    const auto [begin, stop] = at.group;
    const int64_t so_far = (stop - begin) * at.v + (at.r - begin) * (at.end - at.v);
    const int64_t line = stop + so_far / full;
    // The weight ends here: the loops ask for a line that they have.
    if (line >= source.count()) return Asked{source.stored(at.r, Format::kElements).first, 0, 0, 0};
    const Stored next = source.stored(line, Format::kElements);
    const int64_t step = kLines * next.step;
    return Asked{next.first + (so_far - (line - stop) * full) * next.step, next.step, step,
                 parts(at.end - at.v, chains) * step};
  }

  // Multiplies the lines of a group by all blocks, one part after the other.
  template <int64_t chains, typename Format>
  MOE_EXT_INLINE void multiply_group(Group group, const Totals& to,
                                     const Packed<Format>& packed) const {
    using Loops = LineLoops<Format>;
    using scalar_t = typename Format::scalar_t;
    constexpr int64_t kElements = Format::kElements;
    const int64_t n = rows.rows, full = packed.full, deep = depth<chains>(packed);
    const int64_t at_once = source.count() < kLines ? 1 : kLines;
    const int64_t bytes = std::max<int64_t>(deep, 1) * kElements * sizeof(scalar_t) * at_once;
    const int64_t ahead = std::max<int64_t>(1, Loops::kAhead / bytes) * at_once;  // lines
    const Stored stored = source.stored(group.begin, kElements);
    const bool is_dense = stored.apart - full * stored.step < stored.step;
    // Lines of one part come in the order of memory if they are asked for one after the other.
    const bool in_order = asks.in_order && is_dense && deep < full;
    int64_t v = 0;
    do {  // once if no vector is full
      const int64_t end = std::min(v + deep, full);
      const bool ends = end == full;
      auto* sums = packed.sums;
      for (int64_t r = group.begin; r < group.end; r += at_once, sums += n * chains * kLines) {
        const int64_t first = first_line(r);
        const Matrix lines = lines_of<Format>(first, v, ends ? packed.vectors : end);
        const Place place{group, r, v, end};
        const auto next = in_order ? asked_in_order<chains, Format>(place, full)
                                   : asked<chains, Format>(place, full, ahead);
        // Every block asks for what comes next: the CPU drops what it cannot keep up with. (24 rows
        // took 1.4 times as long on a Zen 5 where the first block alone asked. Eight to 16 rows of
        // float32 and bfloat16 took 1.1 to 1.5 times as long on a Zen 4.)
        for (int64_t row = 0; row < n; row += packed.block) {
          const int64_t of_block = std::min(packed.block, n - row);
          const typename Loops::Part part{reinterpret_cast<const scalar_t*>(lines.data),
                                          lines.row_stride,
                                          end - v,
                                          lines.columns - (end - v) * kElements,
                                          packed.at(row, of_block, v),
                                          sums + row * chains * kLines,
                                          next,
                                          asks.second,
                                          v == 0,
                                          ends};
          const auto write = [&](int64_t j, const auto& of_row) __attribute__((always_inline)) {
            write_totals(to, row + j, first, of_row);
          };
          with_count<kBlock<Format>>(of_block, [&](auto count) __attribute__((always_inline)) {
            for (int64_t c = 0; c < chains; ++c) {
              Loops::template multiply<count, chains>(part, c, write);
            }
          });
        }
      }
      v = end;
    } while (v < full);
  }
};
using FewRows = FewRowsOf<AllLines>;

}  // namespace moe_ext
