// The options of launches, and the list of those that were recorded. Compile it without -fsanitize.

#include "cusim.h"

namespace cusim {

Options& options() {
  static Options options;
  return options;
}

void set_order(const std::string& name) {
  if (name == "forward" || name == "reverse") {
    options().order = name == "forward" ? Order::kForward : Order::kReverse;
    options().seed = 0;
  } else if (name.rfind("random", 0) == 0 && name.size() > 6 &&
             name.find_first_not_of("0123456789", 6) == std::string::npos) {
    options().order = Order::kRandom;
    options().seed = std::stoull(name.substr(6));
  } else {
    throw std::invalid_argument("order must be forward, reverse or random<seed>, got " + name);
  }
}

std::vector<Launch>& launches() {
  static std::vector<Launch> launches;
  return launches;
}

}  // namespace cusim
