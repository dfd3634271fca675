// The kernels on the host, for tests: the threads of every block one after the other, with the code that the device
// runs. Only how a block adds up is written a second time, in the device's order.
#pragma once

#include <vector>

#include "launch.h"
#include "registry.h"
#include "tile.h"

namespace layca::cuda {
namespace emulated {

using Kernel = void (*)(const Batch& batch, const Launch& launch, std::int64_t block);

// Halves, each added to the one before it: what shuffles do within a warp, and then with one number of each warp.
inline Sums sum_lanes(std::vector<Sums> lanes) {
  for (std::size_t half = lanes.size() / 2; half > 0; half /= 2) {
    for (std::size_t lane = 0; lane < half; ++lane) {
      for (int k = 0; k < 4; ++k) lanes[lane].of[k] += lanes[lane + half].of[k];
    }
  }
  return lanes[0];
}

template <class OfThread>
Sums sum_block(const OfThread& of_thread) {
  std::vector<Sums> of_warp;
  for (int first = 0; first < block_threads; first += 32) {
    std::vector<Sums> lanes;
    for (int thread = first; thread < first + 32; ++thread) lanes.push_back(of_thread(thread));
    of_warp.push_back(sum_lanes(lanes));
  }
  return sum_lanes(of_warp);
}

template <class Formula>
void prepare(const Batch& batch, const Launch& launch, std::int64_t block) {
  for (std::int64_t tensor = block * launch.threads; tensor < (block + 1) * launch.threads; ++tensor) {
    if (tensor < batch.n_tensors) prepare_tensor<Formula>(batch, tensor);
  }
}

template <class Formula, class T>
void measure(const Batch& batch, const Launch&, std::int64_t block) {
  const TileSpan tile = tile_span(batch, block);
  if (!tile.tensor.has_grad()) return;
  const auto of_thread = [&](int thread) { return measure_on_thread<Formula, T>(batch, tile, thread); };
  write_partials(batch, block, sum_block(of_thread));
}

template <class Formula, class T>
void finish(const Batch& batch, const Launch& launch, std::int64_t block) {
  const LayerSpan layer = layer_span(batch, block);
  if (launch.adds_up) {
    write_dots(batch, block, sum_block([&](int thread) { return sum_tiles_on_thread(batch, layer, thread); }));
  }
  if (!launch.turns_dots) return;
  const Dots dots = layer_dots(batch, block);
  double sigma2 = orthogonal_square(dots);
  if (must_measure_again(layer, dots)) {
    const auto of_thread = [&](int thread) { return measure_again_on_thread<Formula, T>(batch, layer, dots, thread); };
    sigma2 = sum_block(of_thread).of[0];
  }
  write_coefficients(batch, block, layer.tensor, dots, sigma2);
}

template <class Formula, class T>
void rotate(const Batch& batch, const Launch& launch, std::int64_t block) {
  for (int thread = 0; thread < launch.threads; ++thread) {
    rotate_on_thread<Formula, T>(batch, launch.blocks - 1 - block, thread);
  }
}

}  // namespace emulated

template <class Formula, class T>
Kernels kernels_of() {
  Kernels kernels{};
  if constexpr (Formula::counts_steps) kernels.prepare = reinterpret_cast<const void*>(&emulated::prepare<Formula>);
  kernels.measure = reinterpret_cast<const void*>(&emulated::measure<Formula, T>);
  kernels.finish = reinterpret_cast<const void*>(&emulated::finish<Formula, T>);
  kernels.rotate = reinterpret_cast<const void*>(&emulated::rotate<Formula, T>);
  return kernels;
}

}  // namespace layca::cuda
