// Counts what the kernels' launches ask of memory, over the shapes of the benches, and prints
// bench/results/counters.json.
//
//   count_accesses            bench/results/counters.json
//   count_accesses planted    the same of planted_accesses.cu

#include <array>

#include "accesses.h"
#include "kernels/testing.h"

void launch_planted(const float* from, int stride, float* to);  // planted_accesses.cu

namespace {

cusim::AccessCounter counter;

}  // namespace

// Kernels that were compiled with -fsanitize=thread call these.
extern "C" {
#define ACCESS(kind, size) \
  void __tsan_##kind##size(void* at) { counter.add_any(at, size, __builtin_return_address(0)); }
#define ACCESSES(kind) \
  ACCESS(kind, 1) ACCESS(kind, 2) ACCESS(kind, 4) ACCESS(kind, 8) ACCESS(kind, 16)
ACCESSES(read)
ACCESSES(write)
ACCESSES(unaligned_read)
ACCESSES(unaligned_write)
void __tsan_read_range(void* at, std::size_t size) {
  counter.add_any(at, size, __builtin_return_address(0));
}
void __tsan_write_range(void* at, std::size_t size) {
  counter.add_any(at, size, __builtin_return_address(0));
}
int __tsan_atomic32_fetch_add(volatile int* at, int value, int) {
  counter.add_atomic();
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
void* __tsan_memcpy(void* to, const void* from, std::size_t size) {
  counter.add_any(from, size, __builtin_return_address(0));
  counter.add_any(to, size, __builtin_return_address(0));
  return std::memmove(to, from, size);
}
void* __tsan_memmove(void* to, const void* from, std::size_t size) {
  return __tsan_memcpy(to, from, size);
}
void* __tsan_memset(void* to, int value, std::size_t size) {
  counter.add_any(to, size, __builtin_return_address(0));
  return std::memset(to, value, size);
}
void __tsan_vptr_update(void*, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}

namespace testing {
namespace {

struct Shape {
  int64_t T, K;
  int E;
  int64_t H, F;
};

std::string text(const Shape& shape) {
  const auto letter = [](const char* name, int64_t value) {
    return value ? name + std::to_string(value) : "";
  };
  return letter("T", shape.T) + letter(" K", shape.K) + letter(" E", shape.E) +
         letter(" H", shape.H) + letter(" F", shape.F);
}

std::string shape_text;  // of the launches that are counted

void print(const cusim::Launch& launch) {
  static const char* before = "[";
  const cusim::Counts counts = counter.take();
  const std::pair<const char*, uint64_t> numbers[] = {{"requests", counts.requests},
                                                      {"wavefronts", counts.wavefronts},
                                                      {"least_wavefronts", counts.least_wavefronts},
                                                      {"bytes_asked", counts.bytes_asked},
                                                      {"sector_bytes", counts.sector_bytes},
                                                      {"barriers", launch.barriers},
                                                      {"atomics", counts.atomics},
                                                      {"past", counts.past}};
  std::printf("%s\n {\"kernel\": \"%s\", \"shape\": \"%s\"", before, launch.name.c_str(),
              shape_text.c_str());
  for (const auto& [name, number] : numbers) {
    if (number == 0 && std::string(name) == "past") continue;
    std::printf(", \"%s\": %llu", name, static_cast<unsigned long long>(number));
  }
  std::printf("}");
  before = ",";
}

void count_routing(const Shape& s) {
  shape_text = text(s);
  Array<float> logits = filled<float>(s.T * s.E), weights(s.T * s.K), probs(s.T * s.E);
  Array<float> importance(s.E), slope(s.E), l_aux(1), grad = filled<float>(s.T * s.K);
  Array<float> block_sums(gate_blocks(Dtype::kFloat32, s.T, s.E) * s.E), grad_logits(s.T * s.E);
  Array<int32_t> expert_ids(s.T * s.K), slots(s.T * s.K), sources(s.T * s.K), load(s.E);
  Array<int32_t> offsets(s.E + 1), scratch(plan_scratch(s.T * s.K, s.E, true));
  Array<int32_t> counts(balance_blocks(s.T) * s.E);
  gate({Dtype::kFloat32, logits.data(), logits.data(), s.T, s.E, static_cast<int>(s.K),
        Scoring::kSoftmax, true, 1, weights.data(), expert_ids.data(), probs.data(),
        importance.data(), block_sums.data()},
       nullptr);
  gate_backward(
      {Dtype::kFloat32, grad.data(), nullptr, importance.data(), probs.data(), expert_ids.data(),
       s.T, s.E, static_cast<int>(s.K), Scoring::kSoftmax, true, 1, grad_logits.data()},
      nullptr);
  plan({expert_ids.data(), nullptr, s.T, s.K, s.E, -1, true, 1, s.T * s.K, slots.data(),
        sources.data(), offsets.data(), load.data(), scratch.data()},
       nullptr);
  balance({Dtype::kFloat32, importance.data(), load.data(), expert_ids.data(), s.T, s.K,
           s.K <= 2 ? 1 : s.K, s.E, l_aux.data(), slope.data(), counts.data()},
          nullptr);
  const MaskWeights masks{Dtype::kFloat32, weights.data(), slots.data(), s.T, s.K, true, 0, 1};
  mask_weights(masks, grad.data(), nullptr);
  // With a capacity, and the most probable kept.
  const int64_t capacity = s.T * s.K / s.E;
  Array<int32_t> kept_sources(capacity * s.E);
  plan({expert_ids.data(), weights.data(), s.T, s.K, s.E, capacity, true, 1, capacity * s.E,
        slots.data(), kept_sources.data(), offsets.data(), load.data(), scratch.data()},
       nullptr);
}

template <typename T>
void count_rows(const Shape& s, const char* dtype) {
  const int64_t R = s.T * s.K;
  Array<int32_t> expert_ids(R), slots(R), sources(R), offsets(s.E + 1), load(s.E);
  Array<int32_t> scratch(plan_scratch(R, s.E, false));
  for (int64_t i = 0; i < R; ++i) expert_ids[i] = static_cast<int32_t>(below(s.E));
  cusim::options().end_launch = nullptr;
  plan({expert_ids.data(), nullptr, s.T, s.K, s.E, -1, true, 1, R, slots.data(), sources.data(),
        offsets.data(), load.data(), scratch.data()},
       nullptr);
  counter.take();
  cusim::options().end_launch = print;

  shape_text = text(s) + " " + dtype;
  Array<T> tokens = filled<T>(s.T * s.H), rows = filled<T>(R * s.H), pre = filled<T>(R * 2 * s.F);
  Array<T> active(R * s.F), grad = filled<T>(R * s.F), grad_pre(R * 2 * s.F);
  Array<float> weights = filled<float>(R), dots(R);
  const Routes routes{slots.data(), sources.data(), weights.data(), s.T, s.K, R};
  const Routes plain{slots.data(), sources.data(), nullptr, s.T, s.K, R};
  dispatch(dtype_of<T>, tokens.data(), plain, s.H, rows.data(), nullptr);
  activate(dtype_of<T>, pre.data(), plain, s.F, Activation::kSwiglu, active.data(), nullptr);
  combine(dtype_of<T>, rows.data(), routes, s.H, tokens.data(), nullptr);
  combine_backward(dtype_of<T>, tokens.data(), rows.data(), routes, s.H, rows.data(), dots.data(),
                   nullptr);
  route_dot(dtype_of<T>, tokens.data(), rows.data(), routes, s.H, dots.data(), nullptr);
  activate_backward({dtype_of<T>, grad.data(), pre.data(), s.F, Activation::kSwiglu,
                     grad_pre.data(), active.data(), dots.data()},
                    routes, nullptr);
  zero_empty_groups(rows.data(), s.H * static_cast<int64_t>(sizeof(T)), offsets.data(), s.E,
                    nullptr);
}

template <typename T>
void count_products(const Shape& s, const char* dtype) {
  const int64_t R = s.T * s.K, G = 2 * s.F, num_parts = num_dots(s.F);
  Array<int32_t> slots(R), sources(R), offsets(s.E + 1), load(s.E);
  // Every expert has as many routes.
  for (int64_t r = 0; r < R; ++r) {
    sources[r] = static_cast<int32_t>(r * 7 % R);
    slots[sources[r]] = static_cast<int32_t>(r);
  }
  for (int e = 0; e <= s.E; ++e) offsets[e] = static_cast<int32_t>(e * R / s.E);
  for (int e = 0; e < s.E; ++e) load[e] = offsets[e + 1] - offsets[e];
  shape_text = text(s) + " " + dtype;
  Array<T> tokens = filled<T>(s.T * s.H), up = filled<T>(s.E * G * s.H);
  Array<T> down = filled<T>(s.E * s.H * s.F), inner(R * G), active(R * s.F), rows(R * s.H);
  Array<T> grad_up(s.E * G * s.H), bias(s.E * G);
  Array<float> weights = filled<float>(R), dots(R * num_parts), grad_weights(R);
  const Routes routes{slots.data(), sources.data(), weights.data(), s.T, s.K, R};
  const Groups groups{offsets.data(), load.data(), s.E, R};
  const auto product = [&](Array<T>& left, bool gathers, Array<T>& weight, bool transposed,
                           int64_t depth, int64_t width) -> GroupedMM {
    return {dtype_of<T>,   false,      left.data(), gathers, routes,
            weight.data(), transposed, groups,      depth,   width};
  };
  grouped_mm_activate(product(tokens, true, up, false, s.H, G), nullptr, false, Activation::kSwiglu,
                      inner.data(), active.data(), nullptr);
  grouped_mm(product(active, false, down, false, s.F, s.H), nullptr, false, false, rows.data(),
             nullptr);
  grouped_mm_activate_backward(product(tokens, true, down, true, s.H, s.F), Activation::kSwiglu,
                               inner.data(), inner.data(), active.data(), dots.data(), nullptr);
  sum_dots({dtype_of<T>, dots.data(), s.F, tokens.data(), nullptr, s.H, routes, groups,
            grad_weights.data()},
           nullptr);
  grouped_outer(
      {dtype_of<T>, false, inner.data(), tokens.data(), false, true, routes, groups, G, s.H},
      grad_up.data(), nullptr);
  sum_rows({dtype_of<T>, inner.data(), false, false, routes, groups, G}, bias.data(), nullptr);
}

// Weights of int4 in groups of 64, and int8, both directions.
void count_quantized(const Shape& s) {
  const int64_t R = s.T * s.K;
  Array<int32_t> offsets(s.E + 1), load(s.E);
  for (int e = 0; e <= s.E; ++e) offsets[e] = static_cast<int32_t>(e * R / s.E);
  for (int e = 0; e < s.E; ++e) load[e] = offsets[e + 1] - offsets[e];
  Array<__nv_bfloat16> rows = filled<__nv_bfloat16>(R * s.H), out(R * s.F);
  for (const WeightFormat format : {WeightFormat::kInt8, WeightFormat::kInt4}) {
    const bool is_int8 = format == WeightFormat::kInt8;
    const int64_t num_scales = is_int8 ? 1 : s.H / 64;
    Array<uint8_t> values(s.E * s.F * s.H * bits_of(format) / 8);
    Array<uint32_t> scales(s.E * s.F * num_scales);
    for (int64_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint8_t>(i);
    for (int64_t i = 0; i < scales.size(); ++i) scales[i] = 0x3f803f80;  // about 1
    for (const bool transposed : {false, true}) {
      shape_text = text(s) + " bfloat16" + (is_int8 ? " int8" : " int4");
      if (transposed) shape_text += " transposed";
      quantized_mm({Dtype::kBFloat16, rows.data(), format, values.data(), scales.data(), nullptr,
                    num_scales, transposed, Groups{offsets.data(), load.data(), s.E, R},
                    transposed ? s.F : s.H, transposed ? s.H : s.F},
                   nullptr, transposed ? rows.data() : out.data(), nullptr);
    }
  }
}

void count_planted() {
  Array<float> from = filled<float>(32 * 32), to(32);
  for (int stride : {1, 2, 32}) {
    shape_text = "stride " + std::to_string(stride);
    launch_planted(from.data(), stride, to.data());
  }
}

void count_all() {
  for (const Shape& shape : {Shape{2048, 2, 64, 0, 0}, Shape{1024, 8, 128, 0, 0},
                             Shape{1024, 8, 256, 0, 0}, Shape{2048, 2, 8, 0, 0}}) {
    count_routing(shape);
  }
  for (const Shape& shape :
       {Shape{256, 2, 16, 1024, 512}, Shape{128, 8, 64, 2048, 1024}, Shape{64, 2, 8, 4096, 2048}}) {
    count_rows<__nv_bfloat16>(shape, "bfloat16");
    count_rows<float>(shape, "float32");
  }
  // Tiles of 64 rows, and of 128.
  for (const Shape& shape : {Shape{64, 2, 4, 128, 128}, Shape{64, 4, 2, 128, 64}}) {
    count_products<__nv_bfloat16>(shape, "bfloat16");
    count_products<float>(shape, "float32");
    count_quantized(shape);
  }
}

}  // namespace
}  // namespace testing

int main(int argc, char** argv) {
  using namespace testing;
  cusim::options().access = [](const void* address, std::size_t bytes, void* site) {
    counter.add_global(address, bytes, site);
  };
  cusim::options().end_block = [] { counter.end_block(); };
  cusim::options().end_launch = print;
  argc > 1 && std::string(argv[1]) == "planted" ? count_planted() : count_all();
  std::printf("\n]\n");
}
