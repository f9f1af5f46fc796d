// CPU detection at run time: the width of registers, the vendor, and tiles of float16.

#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace moe_ext {

// The width in bytes of the widest registers that both this CPU and our loops support: 16, 32
// or 64. ATEN_CPU_CAPABILITY, which limits torch's kernels to avx2 or default, limits us too.
inline int register_bytes() {
#if defined(__x86_64__)
  static const int bytes = [] {
    const char* most = std::getenv("ATEN_CPU_CAPABILITY");
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (!avx2 || (most && !std::strcmp(most, "default"))) return 16;
    return avx512 && !(most && !std::strcmp(most, "avx2")) ? 64 : 32;
  }();
  return bytes;
#else
  return 16;
#endif
}

inline bool is_intel() {
#if defined(__x86_64__)
  static const bool is = [] {
    __builtin_cpu_init();
    return static_cast<bool>(__builtin_cpu_is("intel"));
  }();
  return is;
#else
  return false;
#endif
}

// AMD's family 19h has Zen 3 and Zen 4. Zen 4 alone has AVX-512.
inline bool is_zen_4() {
#if defined(__x86_64__)
  static const bool is = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    __builtin_cpu_init();
    if (!__builtin_cpu_is("amd") || !__builtin_cpu_supports("avx512f")) return false;
    return __get_cpuid(1, &a, &b, &c, &d) && (a >> 8 & 0xf) + (a >> 20 & 0xff) == 0x19;
  }();
  return is;
#else
  return false;
#endif
}

// Whether tiles of AMX multiply float16 (AMX-FP16), which old compilers have no name for.
inline bool has_half_tiles() {
#if defined(__x86_64__)
  static const bool has = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 21 & 1);
  }();
  return has;
#else
  return false;
#endif
}

}  // namespace moe_ext
