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

// Copies bytes, or writes zeros if `from` is null.
inline void copy_around(const char* from, char* to, int64_t bytes) {
  const auto copy = [&](int64_t begin, int64_t end) {
    if (from) {
      std::memcpy(to + begin, from + begin, end - begin);
    } else {
      std::memset(to + begin, 0, end - begin);
    }
  };
#if defined(__SSE2__)
  constexpr int64_t kLine = 64;
  int64_t i = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(to) % kLine);
  copy(0, i);
  for (; i + kLine <= bytes; i += kLine) {
    for (int64_t j = i; j < i + kLine; j += sizeof(__m128i)) {
      __m128i numbers = _mm_setzero_si128();
      if (from) numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + j), numbers);
    }
  }
  copy(i, bytes);
#else
  copy(0, bytes);
#endif
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
