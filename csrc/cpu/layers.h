// The three verbs on one layer, or on some of its tiles. None of this knows formulas, types or threads.
#pragma once

#include <algorithm>

#include "../batch.h"
#include "../layer.h"
#include "kernels.h"

namespace layca::cpu {

inline Run run_of(const Batch& batch, const Kernels& kernels, const TensorRow& tensor, std::int64_t offset,
                  std::int64_t length) {
  const auto element = [&](int column, Type type) { return tensor.pointer<char>(column) + offset * size_of(type); };
  Run run{};
  run.param = element(Column::PARAM, batch.types.param);
  run.grad = element(Column::GRAD, batch.types.grad);
  for (int k = 0; k < kernels.n_states; ++k) run.states[k] = element(Column::STATE + k, batch.types.state);
  if (tensor.columns[Column::REMAINDER] != 0) run.remainder = tensor.pointer<std::int16_t>(Column::REMAINDER) + offset;
  run.types = batch.types;
  run.options = tensor.options;
  run.grad_scale = tensor.hyper[Hyper::GRAD_SCALE];
  run.length = length;
  return run;
}

// Count the step of every tensor that has a gradient (in place) and write its options.
inline void prepare_options(const Batch& batch, const Kernels& kernels) {
  const double *last_hyper = nullptr, *last_options = nullptr;
  float last_count = 0;
  for (std::int64_t tensor = 0; tensor < batch.n_tensors; ++tensor) {
    const TensorRow row = tensor_row(batch, tensor);
    if (!row.has_grad()) continue;
    float* const count = row.pointer<float>(Column::STEP);
    *count += 1;
    double* const options = batch.step_options + tensor * max_options;
    // Most tensors of a group have taken the same number of steps.
    if (row.hyper == last_hyper && *count == last_count) {
      std::copy(last_options, last_options + max_options, options);
    } else {
      kernels.prepare(*count, row.hyper + Hyper::OPTION, options);
    }
    last_hyper = row.hyper, last_options = options, last_count = *count;
  }
}

// Go through tiles [first, last) of a layer with `measure_run`, which advances their states, and write their sums.
template <class MeasureRun>
void measure_tiles_by(const Batch& batch, const Kernels& kernels, const LayerSpan& span, std::int64_t first,
                      std::int64_t last, const MeasureRun& measure_run) {
  for (std::int64_t tile = first; tile < last; ++tile) {
    const std::int64_t start = tile * batch.tile, length = std::min(batch.tile, span.length - start);
    const Partial partial = measure_run(run_of(batch, kernels, span.tensor, span.offset + start, length));
    double* const dots = batch.partials + 3 * (span.first_tile + tile);
    dots[0] = partial.dots.n2;
    dots[1] = partial.dots.d;
    dots[2] = partial.dots.q;
    batch.partial_counts[span.first_tile + tile] = partial.non_finite;
  }
}

// Advance the states of tiles [first, last) of a layer and write their sums. `steps`, scratch for as many elements, or
// null, keeps the steps.
inline void measure_tiles(const Batch& batch, const Kernels& kernels, std::int64_t layer, std::int64_t first,
                          std::int64_t last, char* steps = nullptr) {
  const LayerSpan span = layer_span(batch, layer);
  if (!span.tensor.has_grad()) return;
  measure_tiles_by(batch, kernels, span, first, last, [&](Run run) {
    if (steps == nullptr) return kernels.measure(run);
    run.steps = steps;
    steps += run.length * kernels.step_size;
    return kernels.measure_and_store(run);
  });
}

// How a layer moves whatever its dots are; KEEP where it takes these to say. In float64 they may say that there is no
// step where its squares are too small for numbers.
inline Rotation foreseen_move(const Batch& batch, const LayerSpan& span) {
  if (!span.tensor.has_grad() || span.tensor.flag(Flag::ROTATES)) return keep_rotation(0);
  if (batch.types.param == Type::FLOAT64) return keep_rotation(0);
  return plain_step(1, span.tensor.hyper[Hyper::LR], span.tensor.hyper[Hyper::WEIGHT_DECAY]);
}

// Measure and rotate in one pass tiles [first, last) of a layer that has a foreseen move.
inline void step_tiles(const Batch& batch, const Kernels& kernels, const LayerSpan& span, const Rotation& move,
                       std::int64_t first, std::int64_t last) {
  measure_tiles_by(batch, kernels, span, first, last, [&](const Run& run) {
    return move.mode == Mode::PRECISE ? kernels.step_precisely(run, move.a, move.b, move.c)
                                      : kernels.step_linearly(run, move.a, move.b);
  });
}

// Sum up a layer's partial sums, in the order of its tiles, whoever computed them.
inline void finish_dots(const Batch& batch, std::int64_t layer) {
  const LayerSpan span = layer_span(batch, layer);
  double sums[3] = {0, 0, 0};
  if (span.tensor.has_grad()) {
    std::int64_t non_finite = 0;
    for (std::int64_t tile = span.first_tile; tile < span.first_tile + span.tiles; ++tile) {
      for (int k = 0; k < 3; ++k) sums[k] += batch.partials[3 * tile + k];
      non_finite += batch.partial_counts[tile];
    }
    batch.counts[layer * Count::WIDTH + Count::NON_FINITE] += non_finite;
  }
  std::copy(sums, sums + 3, batch.dots + 3 * layer);
}

// sigma^2 of a layer: from its dots, or, where these have lost too many digits, from its elements.
inline double measure_orthogonal_square(const Batch& batch, const Kernels& kernels, const LayerSpan& span,
                                        const Dots& dots) {
  const double sigma2 = orthogonal_square(dots);
  if (!is_nearly_parallel(sigma2, dots.q) || !turns_whole(span.tensor)) return sigma2;
  double sum = 0;
  for (std::int64_t start = 0; start < span.length; start += batch.tile) {
    const std::int64_t length = std::min(batch.tile, span.length - start);
    sum +=
        kernels.orthogonal_square(run_of(batch, kernels, span.tensor, span.offset + start, length), dots.d / dots.n2);
  }
  return sum;
}

// From a layer's dots: its coefficients, its radius and its counts.
inline void compute_coefficients(const Batch& batch, const Kernels& kernels, std::int64_t layer) {
  const LayerSpan span = layer_span(batch, layer);
  const Dots dots = layer_dots(batch, layer);
  const double sigma2 = turns(span.tensor) ? measure_orthogonal_square(batch, kernels, span, dots) : 0;
  write_coefficients(batch, layer, span.tensor, dots, sigma2);
}

// Apply a layer's coefficients to its tiles [first, last). `steps`: theirs, as measure_tiles left them, or null.
inline void rotate_tiles(const Batch& batch, const Kernels& kernels, std::int64_t layer, std::int64_t first,
                         std::int64_t last, char* steps = nullptr) {
  const Rotation turn = layer_rotation(batch, layer);
  const LayerSpan span = layer_span(batch, layer);
  if (turn.mode == Mode::KEEP || !span.tensor.has_grad()) return;
  const std::int64_t start = first * batch.tile, end = std::min(last * batch.tile, span.length);
  Run run = run_of(batch, kernels, span.tensor, span.offset + start, end - start);
  run.steps = steps;
  if (turn.mode == Mode::PRECISE) {
    const auto rotate = steps ? kernels.rotate_stored_precisely : kernels.rotate_precisely;
    rotate(run, turn.a, turn.b, turn.c);
  } else {
    const auto rotate = steps ? kernels.rotate_stored : kernels.rotate;
    rotate(run, turn.a, turn.b);
  }
}

}  // namespace layca::cpu
