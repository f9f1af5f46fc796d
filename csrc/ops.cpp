// Defines the operators. Their contracts: contracts.h. Meaning: moe_ext/ops/reference.py.
// Gradients: moe_ext/ops/autograd.py.

#include <torch/csrc/stable/library.h>

#include <string>

#include "contracts.h"

// Does nothing. A C++ program that calls it, as moe_ext.h does, is linked with this library.
extern "C" __attribute__((visibility("default"))) void moe_ext_library() {}

namespace moe_ext {
namespace {

// "dispatch(Tensor tokens, Tensor slots, ...) -> Tensor"
std::string schema_of(const Contract& contract) {
  std::string_view rest = contract.line, taken = take(rest, " -> ");
  std::string text(contract.name), given;
  const char* separator = "(";
  while (!taken.empty()) {
    std::string_view word = take(taken, " ");
    const bool is_tensor = word.find('[') != word.npos;
    const bool is_optional = word.find('?') != word.npos;
    const std::string_view name = take(word, is_tensor ? "[" : ":");
    const std::string type(is_tensor ? (is_optional ? "Tensor?" : "Tensor") : word);
    text += separator + type + " " + std::string(name);
    separator = ", ";
  }
  int results = 0;
  for (; !rest.empty(); ++results) {
    take(rest, " ");
    given += results ? ", Tensor" : "Tensor";
  }
  return text + ") -> " + (results == 1 ? given : "(" + given + ")");
}

}  // namespace
}  // namespace moe_ext

STABLE_TORCH_LIBRARY(moe_ext, m) {
  for (const moe_ext::Contract& contract : moe_ext::kContracts) {
    m.def(moe_ext::schema_of(contract).c_str());
  }
  // Products on tensor cores, beside torch's: moe_ext/ops/tensor_cores.py.
  for (const char* name :
       {"grouped_mm", "quantized_mm", "grouped_outer", "feed_forward", "feed_forward_backward"}) {
    std::string schema = moe_ext::schema_of(moe_ext::kContracts[moe_ext::contract(name)]);
    schema.insert(schema.find(") -> "), ", bool allow_tf32");
    m.def(("tensor_" + schema).c_str());
  }
  // How products of such rows are computed.
  m.def("products(Tensor rows) -> str");
  // For sums [E, N, M] that a product of torch's made: dense, and nobody else's.
  m.def("zero_empty_groups(Tensor(a!) sums, Tensor offsets) -> ()");
  // Returns the bytes that are kept for new results on this device, and the limit; `limit` sets it.
  m.def("keep_memory(Tensor like, int? limit) -> (int, int)");
  // Returns the instructions of this CPU, as "AVX2=used ...", and the compiler of the library.
  m.def("cpu_features(Tensor like) -> (str, str)");
}
