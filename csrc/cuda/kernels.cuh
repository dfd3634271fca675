// The kernels: measure and rotate with one block per tile, finish with one per layer, prepare with a thread per tensor.
#pragma once

#include "launch.h"
#include "registry.h"
#include "tile.h"

// Memory of a block. The host's compiler, for the emulator, is told otherwise where it is.
#ifndef LAYCA_SHARED
#define LAYCA_SHARED(Type, name) __shared__ Shared<Type> name
#endif

namespace layca::cuda {

template <class T>
using Shared = T;

constexpr int warp_threads = 32, warps = block_threads / warp_threads;

// Blocks that are to share a multiprocessor, as its registers allow: the more arrays a formula has, the more of its
// loads are in flight in each, and the fewer it takes to keep memory busy. With one more, registers spill.
template <class Formula, class T>
constexpr int blocks_at_once = (Formula::n_states > 1 ? 3 : 4) - (sizeof(T) > 4 ? 1 : 0);

// 16-bit numbers take further registers as they are decoded.
template <class Formula>
constexpr int blocks_at_once<Formula, Halves> = 4 - (Formula::takes_roots ? (Formula::n_states + 1) / 2 : 0);

// Whose mean and look-ahead spill 16 bytes for sm_90 with one more.
template <>
constexpr int blocks_at_once<Muon, Halves> = 3;

// finish is short, so that registers decide how many layers are under way.
template <class T>
constexpr int finish_blocks_at_once = sizeof(Element<T>) > 4 ? 2 : 3;

// Add up the first `lanes` threads of a warp, in an order that never changes; the result is the first one's.
__device__ inline void sum_warp(Sums& sums, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    LAYCA_UNROLL
    for (double& sum : sums.of) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  }
}

// Add up a block, in an order that never changes; the result is the first thread's.
__device__ inline void sum_block(Sums& sums) {
  LAYCA_SHARED(Sums[warps], of_warp);
  const int warp = threadIdx.x / warp_threads, lane = threadIdx.x % warp_threads;
  sum_warp(sums, warp_threads);
  if (lane == 0) of_warp[warp] = sums;
  __syncthreads();
  if (warp != 0) return;
  sums = of_warp[lane % warps];
  sum_warp(sums, warps);
}

template <class Formula>
__global__ void __launch_bounds__(prepare_threads) prepare(const __grid_constant__ Batch batch) {
  const std::int64_t tensor = std::int64_t{blockIdx.x} * prepare_threads + threadIdx.x;
  if (tensor < batch.n_tensors) prepare_tensor<Formula>(batch, tensor);
}

template <class Formula, class T>
__global__ void __launch_bounds__(block_threads, blocks_at_once<Formula, T>)
    measure(const __grid_constant__ Batch batch) {
  const TileSpan tile = tile_span(batch, blockIdx.x);
  if (!tile.tensor.has_grad()) return;
  Sums sums = measure_on_thread<Formula, T>(batch, tile, threadIdx.x);
  sum_block(sums);
  if (threadIdx.x == 0) write_partials(batch, blockIdx.x, sums);
}

// `adds_up`: the sums of a layer's tiles to its dots; `turns_dots`: these into coefficients.
template <class Formula, class T>
__global__ void __launch_bounds__(block_threads, finish_blocks_at_once<T>)
    finish(const __grid_constant__ Batch batch, bool adds_up, bool turns_dots) {
  LAYCA_SHARED(Dots, dots);
  const LayerSpan layer = layer_span(batch, blockIdx.x);
  if (adds_up) {
    Sums sums = sum_tiles_on_thread(batch, layer, threadIdx.x);
    sum_block(sums);
    if (threadIdx.x == 0) write_dots(batch, blockIdx.x, sums);
  }
  if (!turns_dots) return;
  if (threadIdx.x == 0) dots = layer_dots(batch, blockIdx.x);
  __syncthreads();
  double sigma2 = orthogonal_square(dots);
  if (must_measure_again(layer, dots)) {
    Sums sums = measure_again_on_thread<Formula, T>(batch, layer, dots, threadIdx.x);
    sum_block(sums);
    sigma2 = sums.of[0];
  }
  if (threadIdx.x == 0) write_coefficients(batch, blockIdx.x, layer.tensor, dots, sigma2);
}

// Backwards: what measure touched last is still in the cache.
template <class Formula, class T>
__global__ void __launch_bounds__(block_threads, blocks_at_once<Formula, T>)
    rotate(const __grid_constant__ Batch batch) {
  rotate_on_thread<Formula, T>(batch, gridDim.x - 1 - blockIdx.x, threadIdx.x);
}

template <class Formula, class T>
Kernels kernels_of() {
  Kernels kernels{};
  if constexpr (Formula::counts_steps) kernels.prepare = reinterpret_cast<const void*>(&prepare<Formula>);
  kernels.measure = reinterpret_cast<const void*>(&measure<Formula, T>);
  kernels.finish = reinterpret_cast<const void*>(&finish<Formula, T>);
  kernels.rotate = reinterpret_cast<const void*>(&rotate<Formula, T>);
  return kernels;
}

}  // namespace layca::cuda
