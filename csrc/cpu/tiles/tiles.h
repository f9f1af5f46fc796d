// Tiles of AMX: eight registers of 16 lines of 64 bytes each, for one thread.
//
// Tiles::multiply<c, a, b> adds to the 16 x 16 floats of tile c the products of 16 lines of 32
// bfloat16 in a and 16 columns of as many in b, where a line holds a pair of numbers of each
// column. Even and odd numbers have a sum each, in order; their sum is added to the float.
// Subnormal numbers count as zero.
//
// MOE_EXT_EMULATES_TILES makes the same results of plain loops, but for subnormal numbers and the
// bits of NaN: for tests on a CPU without.

#pragma once

#include <cstdint>
#include <cstring>

#include "../machine/vector.h"

#if defined(__linux__) && defined(MOE_EXT_ASSEMBLES_VECTORS) && __GNUC__ >= 11
#include <sys/syscall.h>
#include <unistd.h>
#define MOE_EXT_ASSEMBLES_TILES
#endif
#if defined(MOE_EXT_EMULATES_TILES) || defined(MOE_EXT_ASSEMBLES_TILES)
#define MOE_EXT_TILES
#endif

namespace moe_ext {

constexpr int64_t kTileLines = 16, kTileBytes = 64;

#if defined(MOE_EXT_EMULATES_TILES)
constexpr bool kEmulatesTiles = true;

inline bool has_tiles() { return true; }

class Tiles {
 public:
  template <int tile>
  void zero() {
    std::memset(tiles_[tile], 0, sizeof(tiles_[tile]));
  }
  template <int tile>
  void load(const void* from, int64_t stride) {
    for (int64_t i = 0; i < kTileLines; ++i) {
      std::memcpy(tiles_[tile][i], static_cast<const char*>(from) + i * stride, kTileBytes);
    }
  }
  template <int tile>
  void store(void* to) const {
    std::memcpy(to, tiles_[tile], sizeof(tiles_[tile]));
  }
  template <int c, int a, int b>
  void multiply() {
    for (int64_t i = 0; i < kTileLines; ++i) {
      for (int64_t j = 0; j < kTileLines; ++j) {
        float even = 0, odd = 0;
        for (int64_t p = 0; p < kTileLines; ++p) {
          even += number(tiles_[a][i][p] << 16) * number(tiles_[b][p][j] << 16);
          odd += number(tiles_[a][i][p] & 0xffff0000u) * number(tiles_[b][p][j] & 0xffff0000u);
        }
        const float sum = number(tiles_[c][i][j]) + (even + odd);
        std::memcpy(&tiles_[c][i][j], &sum, sizeof(sum));
      }
    }
  }

 private:
  static float number(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }

  uint32_t tiles_[8][kTileLines][kTileLines];
};
#elif defined(MOE_EXT_TILES)
constexpr bool kEmulatesTiles = false;

// Whether this CPU has them, and AVX512-BF16, which rounds their sums, and the system lets this
// process use them, which has to be asked for.
inline bool has_tiles() {
  static const bool has = [] {
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    __builtin_cpu_init();
    return register_bytes() == 64 && __builtin_cpu_supports("amx-bf16") &&
           __builtin_cpu_supports("avx512bf16") &&
           syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return has;
}

// The tiles belong to the thread while this is there. Libraries that use them too find their own
// configuration again.
class Tiles {
 public:
  MOE_EXT_INLINE Tiles() {
    Configuration whole{};
    whole.palette = 1;
    for (int i = 0; i < 8; ++i) {
      whole.bytes[i] = kTileBytes;
      whole.lines[i] = kTileLines;
    }
    asm volatile("sttilecfg %0" : "=m"(before_));
    asm volatile("ldtilecfg %0" : : "m"(whole));
  }
  MOE_EXT_INLINE ~Tiles() { asm volatile("ldtilecfg %0" : : "m"(before_)); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int tile>
  MOE_EXT_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  template <int tile>
  MOE_EXT_INLINE void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(tile), "r"(from), "r"(stride) : "memory");
  }
  template <int tile>
  MOE_EXT_INLINE void store(void* to) const {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)"
                 :
                 : "i"(tile), "r"(to), "r"(kTileBytes)
                 : "memory");
  }
  template <int c, int a, int b>
  MOE_EXT_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
  }

 private:
  struct alignas(kTileBytes) Configuration {
    uint8_t palette, start, none[14];
    uint16_t bytes[16];
    uint8_t lines[16];
  };
  static_assert(sizeof(Configuration) == 64);

  Configuration before_;
};
#else
constexpr bool kEmulatesTiles = false;

inline bool has_tiles() { return false; }
#endif

}  // namespace moe_ext
