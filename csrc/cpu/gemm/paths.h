// Which loops multiply a dtype on this CPU, and up to how many rows those for few rows do.
//
// Borders were measured on one thread of a Zen 5, and on Intel's CPUs that comments name.

#pragma once

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../machine/cpu_features.h"
#include "../machine/lanes.h"
#include "../machine/matrix.h"
#include "../tiles/tiles.h"

namespace moe_ext {

enum class Path {
  kTiles,       // bfloat16 on AMX tiles: tile_loops.h
  kRegisters,   // bfloat16 by AVX512-BF16 on a CPU that is not Intel's: pair_loops.h
  kBlocks,      // float32 on a CPU that is not Intel's: block_product.h
  kSomeBlocks,  // the same on Intel's with AVX-512, for most sizes; else MKL, which is torch's GEMM
  kWidened,     // 16 bit without instructions, in float32: block_product.h
  kLibrary,     // torch's GEMM
};

// Whether the CPU has instructions with which torch's library multiplies a 16-bit type. Those of
// AVX512-FP16 do not count: steps in which it multiplies float16 with them take 1 to 19 % longer
// than with block_product.h. (A virtual Granite Rapids without AMX-FP16.) MOE_EXT_WIDEN_16BIT says
// no always: for tests on a CPU that has them.
inline bool multiplies_natively([[maybe_unused]] ScalarType dtype) {
#if defined(MOE_EXT_WIDEN_16BIT)
  return false;
#elif defined(__x86_64__) && defined(__GNUC__)
  const bool is_bfloat16 = dtype == ScalarType::BFloat16;
  __builtin_cpu_init();
  if (is_bfloat16 && !__builtin_cpu_supports("avx512bf16")) return false;
  if (!is_bfloat16 && !has_half_tiles()) return false;
  // The library may have been told to leave them alone (ONEDNN_MAX_CPU_ISA), or torch may have been
  // built without it, and without the operator.
  std::array<StableIValue, 1> stack{};
  const AOTITorchError error = torch_call_dispatcher(
      is_bfloat16 ? "mkldnn::_is_mkldnn_bf16_supported" : "mkldnn::_is_mkldnn_fp16_supported", "",
      stack.data(), TORCH_ABI_VERSION);
  return error == AOTI_TORCH_SUCCESS && torch::stable::detail::to<bool>(stack[0]);
#else
  return true;
#endif
}

// Whether own loops take what torch's library multiplies on Intel's CPUs, for which it is made. On
// a Zen 5 it is half as fast for floats as the loops of block_product.h with registers of 64 bytes,
// and as fast as those with 32. For bfloat16 it is slower than those of few_rows.h and
// pair_loops.h. MOE_EXT_OWN_PRODUCTS says yes on every CPU: for tests.
inline bool prefers_own_loops() {
#if defined(MOE_EXT_OWN_PRODUCTS)
  return true;
#elif defined(__x86_64__)
  return !is_intel();
#else
  return false;
#endif
}

// ONEDNN_MAX_CPU_ISA, which limits torch's library, limits tiles too.
inline bool multiplies_on_tiles() {
  const char* most = std::getenv("ONEDNN_MAX_CPU_ISA");
  const bool is_held = most && *most && !std::strstr(most, "AMX") && !std::strstr(most, "DEFAULT");
  return has_tiles() && (kEmulatesTiles || (!is_held && multiplies_natively(ScalarType::BFloat16)));
}

inline bool multiplies_in_registers() {
#if defined(MOE_EXT_ASSEMBLES_TILES) && !defined(MOE_EXT_EMULATES_TILES)
  return multiplies_pairs() && prefers_own_loops() && multiplies_natively(ScalarType::BFloat16);
#else
  return false;
#endif
}

inline Path find_path(ScalarType dtype) {
  if (dtype == ScalarType::Double) return Path::kLibrary;
  if (dtype == ScalarType::Float) {
    if (prefers_own_loops() && register_bytes() >= 32) return Path::kBlocks;
    return register_bytes() == 64 ? Path::kSomeBlocks : Path::kLibrary;
  }
  if (dtype == ScalarType::BFloat16) {
    if (multiplies_on_tiles()) return Path::kTiles;
    if (multiplies_in_registers()) return Path::kRegisters;
  }
  return multiplies_natively(dtype) ? Path::kLibrary : Path::kWidened;
}

inline Path path_of(ScalarType dtype) {
  static const Path of_float = find_path(ScalarType::Float);
  static const Path of_bfloat16 = find_path(ScalarType::BFloat16);
  static const Path of_half = find_path(ScalarType::Half);
  switch (dtype) {
    case ScalarType::Float: return of_float;
    case ScalarType::BFloat16: return of_bfloat16;
    case ScalarType::Half: return of_half;
    default: return Path::kLibrary;
  }
}

// The borders of a dtype that has_lanes.
class Borders {
 public:
  explicit Borders(ScalarType dtype) : dtype_(dtype), path_(path_of(dtype)) {}

  Path path() const { return path_; }

  // The most rows that few_rows.h multiplies by a weight [N, columns] of so many numbers; where the
  // columns of the weight are dense (is_flat), few_rows_flat.h.
  int64_t rows(bool is_flat, int64_t columns, int64_t numbers) const {
    switch (path_) {
      // For flat weights equal for up to eight rows, faster for up to four (Sapphire Rapids).
      case Path::kTiles: return is_flat ? 6 : 0;
      // Sums over lanes cost too much for short rows; from 17 rows on the others take a second
      // register. Flat, short rows of which there are many take longer than in registers: every
      // chunk of few_rows_flat.h starts and ends their sums.
      case Path::kRegisters:
        return is_flat ? std::clamp<int64_t>(columns / 4, 48, 96)
                       : std::clamp<int64_t>(columns / (columns < 256 ? 18 : 14), 2, 27);
      // Seen on an Emerald Rapids. Flat weights that come from the last cache have more few rows.
      // Where rows are dense quad_product.h is faster, but for few of them that are long.
      case Path::kSomeBlocks:
        if (is_flat && numbers >= kLarge) return 2 * kFew;
        if (is_flat) return std::clamp<int64_t>(columns / 16, 12, kFew);
        return std::min(std::max(std::min<int64_t>(columns / 64, 6), columns / 128), kFew);
      case Path::kBlocks:
        return is_flat ? kFew : std::min<int64_t>(lines(columns), register_bytes() == 64 ? 22 : 10);
      default: return is_flat ? kFew : lines(columns);
    }
  }

  // The same of few_rows.h for lines that a source decodes. Other loops would read them from
  // memory, except tiles.
  int64_t lines(int64_t columns) const {
    if (path_ == Path::kTiles) return 0;
    // Sums over lanes cost too much for short rows.
    if (has_blocks()) return std::clamp<int64_t>(columns / 16, 4, 64);
    if (!prefers_own_loops()) return kFew;
    if (dtype_ == ScalarType::BFloat16 && multiplies_pairs()) return 48;
    if (path_ != Path::kWidened) return kFew;
    return register_bytes() == 64 ? 64 : 24;
  }

  // Whether direct_product.h multiplies so many rows by a flat weight [N, M]. (Seen on an Emerald
  // Rapids; so are the borders of gradients on Intel's CPUs.)
  bool direct(int64_t rows, const Matrix& weight) const {
    return path_ == Path::kSomeBlocks && weight.rows % kLanes == 0 && rows >= 4 && rows <= 64 &&
           weight.rows * weight.columns <= kSmallTile;
  }

  // Whether quad_product.h multiplies so many rows by a weight [N, M] whose rows are dense. Blocks
  // are up to 7 % faster for 56 and 64 rows of 1,024 numbers. (Emerald Rapids.)
  bool quad(int64_t rows, const Matrix& weight) const {
    const int64_t columns = weight.columns;
    return path_ == Path::kSomeBlocks && rows > this->rows(false, columns, 0) &&
           rows <= std::min(columns, kMostQuad) && rows * columns < kMostNumbers;
  }

  // Whether direct_product.h makes a tile of a gradient from so many rows.
  bool direct_outer(int64_t rows, const Matrix& tile, bool around) const {
    return path_ == Path::kSomeBlocks && !around && tile.columns % kLanes == 0 &&
           rows <= kMostDirect;
  }

  // The most rows that few_outer.h multiplies to a tile of a gradient; around: whether it is
  // written around the caches.
  int64_t outer(const Matrix& tile, bool around) const {
    switch (path_) {
      case Path::kRegisters: return 128;
      case Path::kWidened: return prefers_own_loops() ? 96 : kFew;
      case Path::kBlocks:
        if (tile.rows >= 3 * tile.columns) return 128;
        return around ? 32 : 20;
      // direct_product.h, which takes the others, does not pack the lines of right. Those of a wide
      // tile are far apart, and it is slower there, unless few rows of the tile share a pack.
      case Path::kSomeBlocks:
        if (around) return 96;
        if (tile.columns % kLanes != 0) return kFew;
        if (tile.rows >= kManyLines && tile.columns >= kWide) return kMostDirect;
        return tile.rows * tile.columns > kSmallTile ? 12 : 8;
      default: return dtype_ == ScalarType::Float && tile.columns > 256 ? 12 : kFew;
    }
  }

  // Whether block_product.h multiplies so many rows [n, K] by right [N, K]^T. Where columns are
  // dense MKL is up to a quarter faster with some numbers of rows of floats. If an expert has
  // several tiles of rows, each has more than kMany, so the same loops multiply all.
  bool blocks(int64_t rows, const Matrix& right) const {
    if (path_ != Path::kSomeBlocks) return path_ == Path::kBlocks || path_ == Path::kWidened;
    return right.column_stride == 1 || rows <= kSomeFlat || rows > kMany;
  }

  // Whether it writes a gradient that outgrows the caches around them: other CPUs were not
  // measured.
  bool blocks_go_around() const { return path_ == Path::kSomeBlocks; }

  // Whether it makes a tile of a gradient from so many rows.
  bool blocks_outer(int64_t rows, const Matrix& tile, bool around) const {
    if (path_ != Path::kSomeBlocks) return path_ == Path::kBlocks || path_ == Path::kWidened;
    return rows <= kMostOuter && (around || tile.rows * tile.columns > kSmallTile);
  }

  std::string text() const {
    const auto up_to = [](int64_t dense, int64_t flat, const std::string& others) {
      std::string text = "own loops up to " + std::to_string(dense) + " rows of an expert, ";
      if (flat != dense) {
        text += "up to " + std::to_string(flat) + " where a weight's columns are dense, ";
      }
      return text + "else " + others;
    };
    const std::string library = "torch's GEMM";
    switch (path_) {
      case Path::kBlocks:
      case Path::kRegisters: return "own loops";
      case Path::kTiles: return "own loops on AMX tiles";
      case Path::kSomeBlocks:
        return "own loops; where a weight's columns are dense, for up to " +
               std::to_string(kSomeFlat) + " and more than " + std::to_string(kMany) +
               " rows of an expert, else " + library;
      default: break;
    }
    const std::string others =
        path_ == Path::kWidened
            ? "own loops in float32, without fast instructions for " + dtype_name(dtype_)
            : library;
    return has_lanes(dtype_) ? up_to(rows(false, 0, 0), rows(true, 0, 0), others) : others;
  }

 private:
  static constexpr int64_t kFew = 16, kLanes = 16;
  // kSomeBlocks: rows up to which, and beyond which, blocks take weights whose columns are dense;
  // the most numbers of a small tile, and the fewest of a large one; rows of quad_product.h, up to
  // which it multiplies them, and numbers of theirs that are too many; the most rows of which
  // direct_product.h and blocks make a gradient; the fewest rows and columns of a gradient's tile
  // for which packing pays.
  static constexpr int64_t kSomeFlat = 24, kMany = 176, kSmallTile = 1 << 15, kLarge = 1 << 18,
                           kMostQuad = 64, kMostNumbers = 1 << 17, kMostDirect = 48,
                           kMostOuter = 768, kManyLines = 64, kWide = 256;

  bool has_blocks() const { return path_ == Path::kBlocks || path_ == Path::kSomeBlocks; }

  ScalarType dtype_;
  Path path_;
};

}  // namespace moe_ext
