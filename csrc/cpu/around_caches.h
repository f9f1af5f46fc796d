// Writes that go around the caches: a line that is written whole need not be read first.

#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "vector.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace moe_ext {

// Whether a result is so large that its writes had better go around the caches. What fits is better
// left there, where the system has just zeroed its pages and the next operator reads it. With a
// last cache of 32 MiB both ways take equally long for 17 MB, the reader's time included; for 33 MB
// the way through the caches takes a third longer.
inline bool outgrows_caches(int64_t bytes) {
  static const int64_t most = [] {
    constexpr int64_t kMost = int64_t{48} << 20;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    if (const int64_t last = sysconf(_SC_LEVEL3_CACHE_SIZE); last > 0) {
      return std::min(kMost, last / 4 * 3);
    }
#endif
    return kMost;
  }();
  return bytes > most;
}

// Writes bytes: `some(begin, end)` a part of them through the caches, whole lines of what
// `sixteen(begin)` returns around them.
template <typename Some, typename Sixteen>
void write_around(char* to, int64_t bytes, const Some& some,
                  [[maybe_unused]] const Sixteen& sixteen) {
#if defined(__SSE2__)
  constexpr int64_t kLine = 64;
  int64_t i = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(to) % kLine);
  some(0, i);
  for (; i + kLine <= bytes; i += kLine) {
    for (int64_t j = i; j < i + kLine; j += sizeof(__m128i)) {
      const __m128i bits(sixteen(j));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + j), bits);
    }
  }
  some(i, bytes);
#else
  some(0, bytes);
#endif
}

inline void copy_around(const char* from, char* to, int64_t bytes) {
  write_around(
      to, bytes,
      [&](int64_t begin, int64_t end) { std::memcpy(to + begin, from + begin, end - begin); },
      [&](int64_t begin) {
        Vector<long long, 16> bits;
        load(bits, from + begin);
        return bits;
      });
}

inline void zero_around(char* to, int64_t bytes) {
  write_around(
      to, bytes, [&](int64_t begin, int64_t end) { std::memset(to + begin, 0, end - begin); },
      [](int64_t) { return Vector<long long, 16>{}; });
}

// Writes a register to an address that is a multiple of its size.
template <typename V>
MOE_EXT_INLINE void store_around(const V& v, void* to) {
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
  if constexpr (sizeof(V) >= 32) {
    asm("vmovntps %1, %0" : "=m"(*static_cast<char (*)[sizeof(V)]>(to)) : "v"(v));
    return;
  }
#endif
  store(v, to);
}

// A thread calls it after its last write around the caches, before others read.
inline void finish_around() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace moe_ext
