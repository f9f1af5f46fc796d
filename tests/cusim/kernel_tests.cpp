// Runs the tests of kernels/ in several orders of threads and blocks.
//
//   kernel_tests [name ...]: all where none is named

#include <set>

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

void run_all(const std::set<std::string>& named) {
  for (const char* order : {"forward", "reverse", "random1", "random2", "random3"}) {
    cusim::set_order(order);
    generator.seed(static_cast<unsigned>(cusim::options().seed));
    for (const auto& [name, test] : tests()) {
      if (named.empty() || named.count(name)) test.run();
    }
    check_launches();
  }
}

}  // namespace
}  // namespace testing

int main(int argc, char** argv) {
  using namespace testing;
  const std::set<std::string> named(argv + 1, argv + argc);
  for (const std::string& name : named) {
    if (tests().count(name)) continue;
    std::printf("usage: %s [name ...], got %s; names:", argv[0], name.c_str());
    for (const auto& test : tests()) std::printf(" %s", test.first.c_str());
    std::printf("\n");
    return 2;
  }
  cusim::options().recording = true;
  try {
    run_all(named);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
  std::printf("%ld checks: %ld failed\n", checks, failures);
  return failures != 0;
}
