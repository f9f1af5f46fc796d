// Functions of tensor cores and asynchronous copies to shared memory, which are those of
// csrc/cuda/products/tensor.cuh.
//
// A copy is made when its thread waits for it, the latest that CUDA allows; in random order those
// that one wait is for come in any order. Until then its target is poison, so that a wait too few
// is seen, and so is an array that is copied into while others read it.

#pragma once

#include "cusim.h"

namespace cusim {

struct Copy {
  uint4* to;
  const void* from;
  bool reads;  // else writes zeros
  int group;
};
void add_copy(const Copy& copy);
void commit_copies();
// Takes one of all committed groups but the last `left`; false where there is none.
bool take_copy(int left, Copy& copy);

// While a target becomes poison, which is no access that a GPU would make.
extern bool poisoning;
void set_poisoning(bool on);

inline void copy_async(uint4* to, const void* from, bool reads) {
  const auto is_aligned = [](const void* at) {
    return reinterpret_cast<std::uintptr_t>(at) % 16 == 0;
  };
  if (!is_aligned(to) || (reads && !is_aligned(from)))
    throw Error("cusim: a misaligned asynchronous copy");
  if (reads) count_load(from, 16);
  set_poisoning(true);
  *to = uint4{~0u, ~0u, ~0u, ~0u};
  set_poisoning(false);
  add_copy({to, from, reads, 0});
}

template <int kLeft>
void wait_for_copies() {
  Copy copy{};
  while (take_copy(kLeft, copy)) {
    *copy.to = copy.reads ? *static_cast<const uint4*>(copy.from) : uint4{};
  }
}

// A lane's line, and what it gets of all lanes' lines.
struct MatrixLine {
  uint4 line;
  bool transposed;
  unsigned* out;
};
void warp_load_matrices(const char* name, const MatrixLine& mine, const char* file, int line);

inline void load_matrices(unsigned (&out)[4], const uint4* address, CUSIM_SITE) {
  // Read by this lane: what sanitizers see.
  warp_load_matrices("ldmatrix", {*address, false, out}, file, line);
}
inline void load_matrices_transposed(unsigned (&out)[4], const uint4* address, CUSIM_SITE) {
  warp_load_matrices("ldmatrix.trans", {*address, true, out}, file, line);
}

// A lane's part of a product of 16 x 8 sums.
struct Multiplication {
  unsigned left[4], right[2];
  float* sum;
};
enum class Numbers : std::uint8_t { kBFloat16, kFloat16, kTF32 };
struct MultiplicationList {
  Numbers numbers;
  int count = 0;
  Multiplication items[64];
};
// All lanes' lists, which are of one length.
void warp_multiply(const MultiplicationList& mine, const char* file, int line);

// As many at once as a kernel gives: a turn of every lane is what costs time here.
template <typename T>
class Multiplications {
 public:
  void add(float (&sum)[4], const unsigned (&left)[4], unsigned right0, unsigned right1) {
    list_.items[list_.count++] = {{left[0], left[1], left[2], left[3]}, {right0, right1}, sum};
  }
  void finish(CUSIM_SITE) {
    list_.numbers = std::is_same_v<T, __half>  ? Numbers::kFloat16
                    : std::is_same_v<T, float> ? Numbers::kTF32
                                               : Numbers::kBFloat16;
    warp_multiply(list_, file, line);
    list_.count = 0;
  }

 private:
  MultiplicationList list_;
};

inline unsigned round_to_tf32(float x) {
  const auto bits = bits_as<unsigned>(x);
  return std::isfinite(x) ? (bits + 0x1000) & 0xffffe000u : bits;
}

}  // namespace cusim
