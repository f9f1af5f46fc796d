// The instructions of this CPU, and which of them our loops use: for `doctor`.

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "gemm/paths.h"
#include "quantized/codes.h"

namespace moe_ext {
namespace {

#if defined(__x86_64__)
#if defined(MOE_EXT_ASSEMBLES_VECTORS)
constexpr bool kAssemblesVectors = true;
#else
constexpr bool kAssemblesVectors = false;
#endif
#if defined(MOE_EXT_TILES)
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif

// The state of an instruction set that this CPU has:
//   unbuilt  the compiler cannot build the loops that use it
//   limited  the loops are built, but the environment or the system forbids it
//   used     the loops are built and allowed
//   unused   moe_ext has no loops for it
std::string state(bool is_built, bool is_used) {
  if (!is_built) return "unbuilt";
  return is_used ? "used" : "limited";
}
const std::string kUnused = "unused";

std::string features() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const auto bit = [](unsigned word, int place) { return static_cast<bool>(word >> place & 1); };
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && bit(c, 29);
  const bool bfloat16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 5);
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) b = c = d = 0;
  const int bytes = register_bytes();
  const std::tuple<const char*, bool, std::string> all[] = {
      {"AVX2", bit(b, 5), state(true, bytes >= 32)},
      {"F16C", f16c, state(kAssemblesVectors, bytes >= 32)},
      {"AVX-512", bit(b, 16), state(true, bytes == 64)},
      {"AVX512-BF16", bfloat16, state(kAssemblesVectors, multiplies_pairs())},
      {"AVX512-FP16", bit(d, 23), kUnused},
      {"AVX512-VNNI", bit(c, 11),
       state(kAssemblesVectors, multiplies_bytes(WeightFormat::kInt8, 0))},
      {"AMX-BF16", bit(d, 22), state(kHasTiles, multiplies_on_tiles())},
      {"AMX-FP16", has_half_tiles(), kUnused},
      {"AMX-INT8", bit(d, 25), kUnused},
  };
  std::string text;
  for (const auto& [name, has, state] : all) {
    if (has) text += (text.empty() ? "" : " ") + std::string(name) + "=" + state;
  }
  return text;
}
#else
std::string features() { return ""; }
#endif

#if defined(__clang__)
constexpr const char* kCompiler = __VERSION__;  // names itself
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

std::tuple<std::string, std::string> cpu_features(const Tensor&) { return {features(), kCompiler}; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) { m.impl("cpu_features", TORCH_BOX(&cpu_features)); }

}  // namespace moe_ext
