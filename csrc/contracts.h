// The operators' contracts, a line for each: the schemas (ops.cpp) and the checks of tensors
// (args.h) follow. moe_ext/ops/contracts.py holds the same lines, and says how to read them.
//
// A line is parsed when this file is compiled.

#pragma once

#include <cstddef>
#include <stdexcept>
#include <string_view>

namespace moe_ext {

// Cuts the text in front of `until` off, with it; all where it is not there.
constexpr std::string_view take(std::string_view& rest, std::string_view until) {
  const std::size_t end = rest.find(until);
  const std::string_view word = rest.substr(0, end);
  rest = end == rest.npos ? std::string_view() : rest.substr(end + until.size());
  return word;
}

// acc: double beside double operands, else float. scale: of a format's scales, float32, bfloat16 or
// uint8. kLike: the dtype of another argument.
enum class Kind { kInt32, kFloat32, kUint8, kFloating, kAcc, kScale, kLike };

struct TensorArgument {
  std::string_view name;
  std::string_view dims[3];  // letters, or E+1
  int rank = 0;
  Kind kind = Kind::kInt32;
  int like = -1;  // the index of the tensor whose dtype it has
  bool is_optional = false;

  constexpr bool has(char letter) const {
    for (int i = 0; i < rank; ++i) {
      if (dims[i][0] == letter) return true;
    }
    return false;
  }

  // A plan is made before: what does not fit it is at fault.
  constexpr bool is_of_plan() const {
    return name == "slots" || name == "sources" || name == "load";
  }

  // When it is checked: a tensor after those that give its sizes and its dtype.
  constexpr int turn() const {
    if (is_optional) return 5;
    if (kind == Kind::kInt32) return rank > 0 && dims[0] == "E+1" ? 1 : 0;
    if (kind == Kind::kFloating) return 2;
    return kind == Kind::kAcc || kind == Kind::kUint8 || kind == Kind::kScale ? 3 : 4;
  }
};

struct Contract {
  static constexpr int kMaxTensors = 12;

  std::string_view name, line;
  TensorArgument tensors[kMaxTensors];
  int count = 0;
  int order[kMaxTensors] = {};  // of the checks
  int count_alone = 0;          // so many are checked before the sizes that follow from numbers
  int first = -1;               // the first that is not optional: the others are on its device
  int operand = -1;             // the one that is kFloating: acc is the dtype of its sums

  constexpr Contract(std::string_view name, std::string_view line) : name(name), line(line) {
    std::string_view rest = line.substr(0, line.find(" -> "));
    while (!rest.empty()) {
      const std::string_view word = take(rest, " ");
      if (word.find('[') != word.npos) tensors[count++] = parse(word);
    }
    for (int i = count - 1; i >= 0; --i) {
      if (!tensors[i].is_optional) first = i;
      if (tensors[i].kind == Kind::kFloating) operand = i;
      if (tensors[i].kind == Kind::kLike) tensors[i].like = find(line, tensors[i].name);
    }
    for (int turn = 0, n = 0; turn <= 5; ++turn) {
      if (turn == 4) count_alone = n;
      for (int i = 0; i < count; ++i) {
        if (tensors[i].turn() == turn) order[n++] = i;
      }
    }
  }

 private:
  // name[A,B]?:kind
  static constexpr TensorArgument parse(std::string_view word) {
    TensorArgument tensor;
    tensor.name = take(word, "[");
    std::string_view dims = take(word, "]");
    while (!dims.empty()) tensor.dims[tensor.rank++] = take(dims, ",");
    tensor.is_optional = word[0] == '?';
    const std::string_view kind = word.substr(tensor.is_optional ? 2 : 1);
    tensor.kind = kind == "int32"      ? Kind::kInt32
                  : kind == "float32"  ? Kind::kFloat32
                  : kind == "uint8"    ? Kind::kUint8
                  : kind == "floating" ? Kind::kFloating
                  : kind == "acc"      ? Kind::kAcc
                  : kind == "scale"    ? Kind::kScale
                                       : Kind::kLike;
    return tensor;
  }

  // The tensor that the argument of this name is like.
  constexpr int find(std::string_view line, std::string_view name) const {
    std::string_view rest = line;
    while (!rest.empty()) {
      std::string_view word = take(rest, " ");
      if (take(word, "[") != name) continue;
      take(word, ":");
      for (int i = 0; i < count; ++i) {
        if (tensors[i].name == word) return i;
      }
    }
    throw std::invalid_argument("no such argument");  // does not compile
  }
};

inline constexpr Contract kContracts[] = {
    {"gate",
     "logits[T,E]:floating choice_scores[T,E]?:logits k:SymInt scoring:str normalize:bool"
     " scale:float -> [T,K]:acc [T,K]:int32 [T,E]:acc [E]:acc"},
    {"gate_backward",
     "grad_weights[T,K]?:probs grad_probs[T,E]?:probs grad_importance[E]?:probs"
     " probs[T,E]:acc expert_ids[T,K]:int32 scoring:str normalize:bool scale:float ->"
     " [T,E]:probs"},
    {"plan",
     "expert_ids[T,K]:int32 priority[T,K]?:float32 num_experts:SymInt capacity:SymInt?"
     " order:str align:SymInt -> [T,K]:int32 [R]:int32 [E+1]:int32 [E]:int32"},
    {"balance",
     "importance[E]:acc load[E]:int32 expert_ids[T,K]:int32 choices:SymInt -> []:importance"
     " [E]:importance"},
    {"mask_weights",
     "weights[T,K]:acc slots[T,K]:int32 normalize:bool eps:float scale:float ->"
     " [T,K]:weights"},
    {"mask_weights_backward",
     "grad[T,K]:weights weights[T,K]:acc slots[T,K]:int32 normalize:bool eps:float"
     " scale:float -> [T,K]:weights"},
    {"dispatch",
     "tokens[T,H]:floating slots[T,K]:int32 sources[R]:int32 weights[T,K]?:acc ->"
     " [R,H]:tokens"},
    {"combine",
     "rows[R,H]:floating slots[T,K]:int32 sources[R]:int32 weights[T,K]?:acc -> [T,H]:rows"},
    {"route_dot",
     "tokens[T,H]:floating rows[R,H]:tokens slots[T,K]:int32 sources[R]:int32 -> [T,K]:acc"},
    {"combine_backward",
     "tokens[T,H]:floating rows[R,H]:tokens slots[T,K]:int32 sources[R]:int32"
     " weights[T,K]:acc -> [R,H]:rows [T,K]:weights"},
    {"grouped_mm",
     "rows[R,M]:floating weights[E,N,M]:rows bias[E,N]?:rows offsets[E+1]:int32"
     " load[E]:int32 capacity:SymInt? -> [R,N]:rows"},
    {"grouped_outer",
     "left[R,N]:floating right[R,M]:left offsets[E+1]:int32 load[E]:int32 capacity:SymInt?"
     " -> [E,N,M]:left"},
    {"quantized_mm",
     "rows[R,I]:floating values[E,N,B]:uint8 scales[E,N,S]:scale zeros[E,N,Z]?:uint8"
     " bias[E,O]?:rows offsets[E+1]:int32 load[E]:int32 format:str transposed:bool"
     " int8_rows:bool capacity:SymInt? -> [R,O]:rows"},
    {"activate",
     "pre_activation[R,G]:floating slots[T,K]:int32 sources[R]:int32 weights[T,K]?:acc"
     " activation:str -> [R,F]:pre_activation"},
    {"activate_backward",
     "grad[R,F]:pre_activation pre_activation[R,G]:floating slots[T,K]:int32"
     " sources[R]:int32 weights[T,K]:acc activation:str -> [R,G]:pre_activation"
     " [R,F]:pre_activation [T,K]:weights"},
    {"feed_forward",
     "tokens[T,H]:floating slots[T,K]:int32 sources[R]:int32 offsets[E+1]:int32"
     " load[E]:int32 weights[T,K]:acc up[E,G,H]:floating down[E,H,F]:tokens"
     " up_bias[E,G]?:tokens down_bias[E,H]?:tokens activation:str score_before_experts:bool"
     " capacity:SymInt? keeps:bool -> [T,H]:tokens [R,G]:tokens?keeps"},
    {"feed_forward_backward",
     "grad[T,H]:tokens tokens[T,H]:floating pre_activation[R,G]:tokens slots[T,K]:int32"
     " sources[R]:int32 offsets[E+1]:int32 load[E]:int32 weights[T,K]:acc up[E,G,H]:floating"
     " down[E,H,F]:tokens up_bias[E,G]?:tokens down_bias[E,H]?:tokens activation:str"
     " score_before_experts:bool capacity:SymInt? needs_tokens:bool needs_up:bool"
     " needs_down:bool -> [T,H]:tokens?needs_tokens up?needs_up down?needs_down"
     " up_bias?needs_up down_bias?needs_down [T,K]:weights"},
};

// The index of an operator; a template argument, so that it is found when the file is compiled.
constexpr int contract(std::string_view name) {
  int index = 0;
  while (kContracts[index].name != name) ++index;  // past the last: does not compile
  return index;
}

}  // namespace moe_ext
