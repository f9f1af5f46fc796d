// zero_empty_groups, beside plain C++.

#include "testing.h"

namespace testing {
namespace {

void test_zero_empty_groups(int64_t num_groups, int64_t size, int64_t shift) {
  Array<uint16_t> memory(num_groups * size + shift);
  uint16_t* sums = memory.data() + shift;
  Array<int32_t> offsets(num_groups + 1);
  offsets[0] = 0;
  for (int64_t e = 0; e < num_groups; ++e) offsets[e + 1] = offsets[e] + below(3) / 2 * 7;
  for (int64_t i = 0; i < num_groups * size; ++i) sums[i] = static_cast<uint16_t>(1 + below(999));
  const std::vector<uint16_t> before(sums, sums + num_groups * size);
  zero_empty_groups(sums, size * sizeof(uint16_t), offsets.data(), num_groups, nullptr);
  for (int64_t e = 0; e < num_groups; ++e) {
    const bool is_empty = offsets[e + 1] == offsets[e];
    for (int64_t i = e * size; i < (e + 1) * size; ++i) {
      CHECK(sums[i] == (is_empty ? 0 : before[i]));
    }
  }
}

void test_all() {
  for (const int64_t E : {0, 1, 5, 40}) {
    for (const int64_t size : {1, 8, 257, 4096, 70000}) {
      for (const int64_t shift : {0, 1}) {
        context = "zero_empty_groups E" + std::to_string(E) + " size " + std::to_string(size) +
                  " shift " + std::to_string(shift);
        test_zero_empty_groups(E, size, shift);
      }
    }
  }
}

const Registration registration("zero_empty_groups", test_all, {{"zero_empty_groups", 256}});

}  // namespace
}  // namespace testing
