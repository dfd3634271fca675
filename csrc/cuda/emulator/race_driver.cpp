// Steps on the emulated GPU for ThreadSanitizer: it reports two threads that use the same memory, one of them to write,
// without a barrier or the end of a launch in between. Fails, too, where the order of blocks and threads shows in a
// bit.
//
//   race_driver FORMULA [ROUNDS]
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

#include "../../cpu/driver_tables.h"
#include "../runner.h"
#include "blocks.h"

using namespace layca;
using namespace layca::driver;

namespace {

// Of one tile, of several, and of elements that no vector divides.
const std::vector<std::int64_t> few = {1003, 2 * tile + 5, 1};

struct Numbers {
  std::vector<std::vector<float>> memory;
  std::vector<double> dots, radii;
  bool operator==(const Numbers& other) const {
    return memory == other.memory && dots == other.dots && radii == other.radii;
  }
};

Numbers step(const std::string& formula, const std::string& dtype, std::uint64_t seed) {
  Setup setup(few);
  std::vector<std::int64_t> tiles;
  for (std::int64_t tensor = 0; tensor < setup.n; ++tensor) {
    for (std::int64_t at = 0; at < few[tensor]; at += tile) {
      tiles.insert(tiles.end(), {tensor, tensor, at, std::min(tile, few[tensor] - at)});
    }
  }
  setup.batch.tiles = tiles.data();
  setup.batch.n_tiles = setup.tables.n_tiles;
  if (dtype == "bfloat16") setup.batch.types.param = Type::BFLOAT16;
  emulator::set_seed(seed);
  const cuda::Runner runner(setup.batch, formula, dtype);
  if (dtype == "float32") {
    runner.step(0);
  } else {
    runner.measure(0);
    runner.coefficients(0);
    runner.rotate(0);
  }
  return {setup.tables.memory, setup.dots, setup.tables.radii};
}

int run(const std::string& formula, int rounds) {
  for (const char* dtype : {"float32", "bfloat16"}) {
    const Numbers expected = step(formula, dtype, 0);
    for (int seed = 1; seed < rounds; ++seed) {
      if (step(formula, dtype, seed) == expected) continue;
      std::fprintf(stderr, "%s, %s: seed %d made other numbers than seed 0\n", formula.c_str(), dtype, seed);
      return 1;
    }
  }
  std::printf("%s: %d orders of blocks and threads\n", formula.c_str(), rounds);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  try {
    return run(argv[1], argc > 2 ? std::atoi(argv[2]) : 1);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
