// Products of lines of a weight with rows, a sum per lane of a register: the loops of few_rows.h.
//
// Vector v of a line is added to chain v % chains.

#pragma once

#include "lines.h"

namespace moe_ext {

template <typename Format>
struct LineLoops {
  using Lanes = typename Format::Lanes;
  using scalar_t = typename Format::scalar_t;
  static constexpr int64_t kElements = Format::kElements;
  static constexpr int64_t kAhead = 1 << 13;  // bytes that are asked for ahead of their use

  // Each vector of kLines lines comes with kLines asks for later memory, of 64 bytes each.
  struct Asked {
    const char* first;  // of the first vector
    int64_t apart;      // bytes from an ask to the next
    int64_t step;       // bytes from a vector's asks to those of the chain's next vector
    int64_t chain;      // bytes from a chain's first asks to the next chain's
  };

  // Some vectors of kLines lines, and of some rows.
  struct Part {
    const scalar_t* lines;
    int64_t stride;         // elements from a line to the next
    int64_t vectors, rest;  // full vectors, and elements after them
    const Lanes* packed;    // [vectors, rows, registers]
    Lanes* sums;            // [rows, chains, kLines]
    Asked next;
    bool second;        // whether `next` is asked for into the second cache
    bool starts, ends;  // whether it has the lines' first numbers, their last
  };

  // The sums of `width` lines, of so many full vectors and a rest, with each row. asks_ahead: for
  // the memory kAhead bytes further on, into the second cache if `second`
  template <int64_t count, int64_t width, int64_t chains>
  static MOE_EXT_INLINE void stream(const Matrix& lines, int64_t vectors, int64_t rest,
                                    const Lanes* packed, bool asks_ahead, bool second,
                                    Lanes (&totals)[count][width]) {
    Lanes sums[count][width][chains];
    for (auto& of_row : sums) {
      for (auto& of_line : of_row) {
        for (Lanes& sum : of_line) sum = Lanes{};
      }
    }
    const auto* line = row_of<const scalar_t>(lines, 0);
    const int64_t stride = lines.row_stride;
    const auto add_all = [&](int c, auto* from, int64_t apart) __attribute__((always_inline)) {
      for (int j = 0; j < count; ++j, packed += Format::kRegisters) {
        for (int w = 0; w < width; ++w) add(sums[j][w][c], from + w * apart, packed);
      }
    };
    int64_t v = 0;
    for (; v + chains <= vectors; v += chains, line += chains * kElements) {
      constexpr int64_t kBytes = chains * kElements * sizeof(scalar_t);
      for (int64_t i = 0; asks_ahead && i < kBytes; i += 64) {
        for (int w = 0; w < width; ++w) {
          const auto* ahead = reinterpret_cast<const char*>(line + w * stride) + kAhead;
          ask_ahead(ahead + i, second);
        }
      }
#pragma GCC unroll 4
      for (int c = 0; c < chains; ++c) add_all(c, line + c * kElements, stride);
    }
#pragma GCC unroll 4
    for (int c = 0; c < chains; ++c) {
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
        for (int c = 1; c < chains; ++c) totals[j][w] += sums[j][w][c];
      }
    }
  }

  // Multiplies the vectors of a part that belong to a chain. The last chain of a part that ends
  // calls write(row, its sums). Without the pragmas GCC keeps a copy of the sums in memory.
  template <int64_t count, int64_t chains, typename Write>
  static MOE_EXT_INLINE void multiply(const Part& part, int64_t chain, const Write& write) {
    constexpr int64_t R = Format::kRegisters;
    const auto place = [&](int64_t j, int64_t c, int64_t i)
                           __attribute__((always_inline)) -> Lanes& {
      return part.sums[(j * chains + c) * kLines + i];
    };
    Lanes sums[count][kLines];
#pragma GCC unroll 6
    for (int j = 0; j < count; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < kLines; ++i) {
        sums[j][i] = Lanes{};
        if (!part.starts) sums[j][i] = place(j, chain, i);
      }
    }
    const int64_t stride = part.stride;
    const Lanes* packed = part.packed + chain * count * R;
    const scalar_t* line = part.lines + chain * kElements;
    const char* next = part.next.first + chain * part.next.chain;
    const bool second = part.second;
    for (int64_t v = chain; v < part.vectors; v += chains) {
#pragma GCC unroll 4
      for (int i = 0; i < kLines; ++i) ask_ahead(next + i * part.next.apart, second);
      add_block(sums, line, stride, packed);
      packed += chains * count * R;
      line += chains * kElements;
      next += part.next.step;
    }
    if (part.rest > 0 && part.vectors % chains == chain) {
      scalar_t last[kLines][kElements];
      for (int i = 0; i < kLines; ++i) {
        copy_first<sizeof(Lanes)>(line + i * stride, part.rest, last[i]);
      }
      add_block(sums, &last[0][0], kElements, packed);
    }
    // The last part adds all chains up in the place of chain 0.
    const int64_t kept = part.ends ? 0 : chain;
#pragma GCC unroll 6
    for (int j = 0; j < count; ++j) {
      if constexpr (chains > 1) {
#pragma GCC unroll 4
        for (int i = 0; i < kLines; ++i) {
          if (part.ends && chain > 0) sums[j][i] = place(j, 0, i) + sums[j][i];
        }
      }
      if (part.ends && chain == chains - 1) {
        write(j, sums[j]);
        continue;
      }
#pragma GCC unroll 4
      for (int i = 0; i < kLines; ++i) place(j, kept, i) = sums[j][i];
    }
  }

 private:
  // A vector of the weight times one of a row, added to a sum per lane.
  static MOE_EXT_INLINE void add(Lanes& sums, const scalar_t* weight, const Lanes* row) {
    Lanes w[Format::kRegisters];
    Format::widen(weight, w);
    Format::add(sums, w, row);
  }

  // A vector of each of kLines lines times those of a block's rows. The lines' vectors stay in
  // registers next to the sums. Of 16 registers that may be too many: then one line follows the
  // other, and the rows' vectors stay in registers if those fit. (Six and nine rows of float32 and
  // float16 take 0.65 to 0.95 times as long in this way on a Zen 4, four rows of bfloat16 0.65 to
  // one, and five to 15 in most runs 0.8 to 0.95.)
  template <int64_t count>
  static MOE_EXT_INLINE void add_block(Lanes (&sums)[count][kLines], const scalar_t* line,
                                       int64_t stride, const Lanes* packed) {
    constexpr int64_t R = Format::kRegisters;
    // One of two registers of a vector comes from a mask.
    constexpr int64_t kFree = 16 - kLines * count - (R > 1);
    if constexpr (sizeof(Lanes) == 64 || kLines * R < kFree) {
#pragma GCC unroll 6
      for (int j = 0; j < count; ++j) {
#pragma GCC unroll 4
        for (int i = 0; i < kLines; ++i) add(sums[j][i], line + i * stride, packed + j * R);
      }
    } else {
      constexpr bool kRowsFit = (count + 1) * R <= kFree;
      Lanes rows[kRowsFit ? count * R : 1];
      if constexpr (kRowsFit) {
#pragma GCC unroll 6
        for (int j = 0; j < count * R; ++j) rows[j] = packed[j];
      }
#pragma GCC unroll 4
      for (int i = 0; i < kLines; ++i) {
        Lanes w[R];
        Format::widen(line + i * stride, w);
#pragma GCC unroll 6
        for (int j = 0; j < count; ++j) {
          Format::add(sums[j][i], w, (kRowsFit ? rows : packed) + j * R);
        }
      }
    }
  }
};

}  // namespace moe_ext
