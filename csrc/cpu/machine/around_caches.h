// Writes that go around the caches, which save the read of each line before it is written.

#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "cpu_features.h"
#include "vector.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace moe_ext {

// Whether a result is too large for the caches. A smaller one stays in them for the next operator.
// On a Zen 5 with a last cache of 32 MiB, a write and a read of 17 MB take equally long both ways;
// 33 MB take a third longer through the caches. On a Granite Rapids with one of 480 MiB, a
// write and a read of 16 MiB take 2 to 28 % less time around the caches, and of 8 MiB from 15 %
// less to a quarter more. A write alone takes less from 2 MiB on.
inline bool outgrows_caches(int64_t bytes) {
  static const int64_t most = [] {
    const int64_t limit = int64_t{is_intel() && register_bytes() == 64 ? 8 : 48} << 20;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    if (const int64_t last = sysconf(_SC_LEVEL3_CACHE_SIZE); last > 0) {
      return std::min(limit, last / 4 * 3);
    }
#endif
    return limit;
  }();
  return bytes > most;
}

// Writes whole lines around the caches: sixteen(i) returns bytes i to i + 15. ends(begin, end)
// writes the bytes before the first line and after the last one.
template <typename Ends, typename Sixteen>
void write_around(char* to, int64_t bytes, const Ends& ends,
                  [[maybe_unused]] const Sixteen& sixteen) {
#if defined(__SSE2__)
  constexpr int64_t kLine = 64;
  int64_t i = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(to) % kLine);
  ends(0, i);
  for (; i + kLine <= bytes; i += kLine) {
    for (int64_t j = i; j < i + kLine; j += sizeof(__m128i)) {
      const __m128i bits(sixteen(j));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + j), bits);
    }
  }
  ends(i, bytes);
#else
  ends(0, bytes);
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

// Makes a thread's writes around the caches visible to others. Call it after the last one.
inline void finish_around() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace moe_ext
