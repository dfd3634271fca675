#include "emulator.h"

namespace layca::cuda {

void launch(const Launch& launch, const Batch& batch, const std::string&, std::uintptr_t) {
  const auto kernel = reinterpret_cast<emulated::Kernel>(const_cast<void*>(launch.kernel));
  for (std::int64_t block = 0; block < launch.blocks; ++block) kernel(batch, launch, block);
}

std::string device_problem() { return ""; }

}  // namespace layca::cuda
