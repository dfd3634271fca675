#include "launch.h"

#include <cuda_runtime_api.h>

#include <stdexcept>

namespace layca::cuda {

void launch(const Launch& launch, const Batch& batch, const std::string& label, std::uintptr_t stream) {
  if (launch.blocks == 0) return;
  Batch tables = batch;
  bool adds_up = launch.adds_up, turns_dots = launch.turns_dots;
  // As many of these are read as the kernel has parameters.
  void* arguments[] = {&tables, &adds_up, &turns_dots};
  const dim3 grid(static_cast<unsigned>(launch.blocks)), block(static_cast<unsigned>(launch.threads));
  const cudaError_t error =
      cudaLaunchKernel(launch.kernel, grid, block, arguments, 0, reinterpret_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call of whoever uses CUDA here would report it once more
  throw std::runtime_error(std::string("the CUDA kernel ") + launch.verb + " (" + label +
                           ") could not be launched: " + cudaGetErrorString(error));
}

std::string device_problem() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(error);
  }
  return devices > 0 ? "" : "the driver lists none";
}

}  // namespace layca::cuda
