#include "runner.h"

#include "launch.h"
#include "tile.h"

namespace layca::cuda {

Runner::Runner(const Batch& batch, const std::string& formula, const std::string& dtype)
    : batch_(batch), kernels_(find_kernels(formula, dtype)), label_(formula + ", " + dtype) {
  if (!kernels_.prepare) batch_.step_options = nullptr;
}

void Runner::measure(std::uintptr_t stream) const {
  advance(stream);
  finish(true, false, stream);
}

void Runner::coefficients(std::uintptr_t stream) const { finish(false, true, stream); }

void Runner::rotate(std::uintptr_t stream) const {
  launch({kernels_.rotate, "rotate", batch_.n_tiles, block_threads}, batch_, label_, stream);
}

void Runner::step(std::uintptr_t stream) const {
  advance(stream);
  finish(true, true, stream);
  rotate(stream);
}

void Runner::advance(std::uintptr_t stream) const {
  if (kernels_.prepare) {
    const std::int64_t blocks = (batch_.n_tensors + prepare_threads - 1) / prepare_threads;
    launch({kernels_.prepare, "prepare", blocks, prepare_threads}, batch_, label_, stream);
  }
  launch({kernels_.measure, "measure", batch_.n_tiles, block_threads}, batch_, label_, stream);
}

void Runner::finish(bool adds_up, bool turns_dots, std::uintptr_t stream) const {
  launch({kernels_.finish, "finish", batch_.n_layers, block_threads, adds_up, turns_dots}, batch_, label_, stream);
}

}  // namespace layca::cuda
