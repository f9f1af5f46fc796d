// Runs the tests of kernels/ in several orders of threads and blocks.
//
//   kernel_tests [order ...] [name ...]: all where none is named

#include <algorithm>

#include "kernels/testing.h"

namespace testing {
namespace {

void check_launches() {
  LaunchBounds bounds;
  for (const auto& [name, test] : tests()) {
    bounds.insert(test.launch_bounds.begin(), test.launch_bounds.end());
  }
  for (const cusim::Launch& launch : cusim::launches()) {
    context = launch.name;
    CHECK(launch.threads <= bounds.at(launch.name) && launch.threads % 32 == 0);
  }
  cusim::launches().clear();
}

using Names = std::vector<std::string>;

const Names orders{"forward", "reverse", "random1", "random2", "random3"};

bool has(const Names& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

void run(const Names& some, const Names& named) {
  for (const std::string& order : some) {
    cusim::set_order(order);
    generator.seed(static_cast<unsigned>(cusim::options().seed));
    for (const auto& [name, test] : tests()) {
      if (named.empty() || has(named, name)) test.run();
    }
    check_launches();
  }
}

}  // namespace
}  // namespace testing

int main(int argc, char** argv) {
  using namespace testing;
  Names some, named;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (has(orders, argument)) {
      some.push_back(argument);
    } else if (tests().count(argument)) {
      named.push_back(argument);
    } else {
      std::printf("usage: %s [order ...] [name ...], got %s; orders:", argv[0], argv[i]);
      for (const std::string& order : orders) std::printf(" %s", order.c_str());
      std::printf("; names:");
      for (const auto& test : tests()) std::printf(" %s", test.first.c_str());
      std::printf("\n");
      return 2;
    }
  }
  cusim::options().recording = true;
  try {
    run(some.empty() ? orders : some, named);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
  std::printf("%ld checks: %ld failed\n", checks, failures);
  return failures != 0;
}
