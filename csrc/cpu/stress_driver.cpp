// Many steps of several batches at once, each on a team of threads, for instruments that look for races and for bytes
// that are not there: tests/sanitize. Fails where a team makes other bits than one thread.
//
//   stress_driver FORMULA [ROUNDS]
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "driver_tables.h"
#include "runner.h"

using namespace layca;
using namespace layca::driver;

namespace {

constexpr int callers = 2;

// Teams of all sizes, in turn: a runner is asked for more threads, and for fewer, than the time before.
void run(Setup& setup, const std::string& formula, int rounds, int most) {
  cpu::Runner runner(setup.batch, formula, "float32", cpu::instruction_sets().front());
  for (int round = 0; round < rounds; ++round) {
    const int threads = most == 1 ? 1 : 1 + round % most;
    if (round % 3 == 2) {
      runner.measure(threads);
      runner.coefficients();
      runner.rotate(threads);
    } else {
      runner.step(threads);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  const std::string formula = argv[1];
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 20;
  Setup expected;
  run(expected, formula, rounds, 1);
  std::vector<Setup> setups(callers);
  std::vector<std::thread> threads;
  for (int caller = 0; caller < callers; ++caller) {
    threads.emplace_back([&, caller] { run(setups[caller], formula, rounds, 4 + caller); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Setup& setup : setups) {
    if (setup.tables.memory != expected.tables.memory || setup.dots != expected.dots) {
      std::fprintf(stderr, "%s: several threads made other numbers than one\n", formula.c_str());
      return 1;
    }
  }
  std::printf("%s: %d rounds of %d callers\n", formula.c_str(), rounds, callers);
  return 0;
}
