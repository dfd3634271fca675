// How kernels reach the device.
#pragma once

#include <cstdint>
#include <string>

#include "../batch.h"

namespace layca::cuda {

constexpr int prepare_threads = 128;

struct Launch {
  const void* kernel;
  const char* verb;  // its name
  std::int64_t blocks;
  int threads;
  bool adds_up = false, turns_dots = false;  // what finish is to do
};

// On `stream` of the current device. Nothing happens where there are no blocks. Throws std::runtime_error that names
// the kernel as `verb` of `label` if it cannot be launched.
void launch(const Launch& launch, const Batch& batch, const std::string& label, std::uintptr_t stream);

// Why there is no device to launch on; "" where there is one.
std::string device_problem();

}  // namespace layca::cuda
