// One step of a fixed batch on one thread, for an instrument that counts what it executes: tests/backends/cpu.
//
//   step_driver FORMULA
#include <cstdint>
#include <cstdio>

#include "driver_tables.h"
#include "runner.h"

using namespace layca;
using namespace layca::driver;

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  Setup setup;
  cpu::Runner runner(setup.batch, argv[1], "float32", cpu::instruction_sets().front());
  runner.step(1);
  runner.step(1);
  std::int64_t moved = 0;
  for (std::int64_t layer = 0; layer < setup.n; ++layer) {
    moved += setup.coefficients[layer * Coefficient::WIDTH + Coefficient::MODE] != Mode::KEEP;
  }
  std::printf("%lld elements, %lld of %lld layers moved\n", static_cast<long long>(setup.tables.elements),
              static_cast<long long>(moved), static_cast<long long>(setup.n));
  return 0;
}
