// What follows from the three dots of a layer, host and device.
#pragma once

#include <cstdint>

#include "batch.h"
#include "rotation.h"

namespace layca {

LAYCA_HOST_DEVICE inline bool turns(const TensorRow& tensor) { return tensor.has_grad() && tensor.flag(Flag::ROTATES); }

// Whether the elements here say all of a layer that turns. If not, what its dots do not say cannot be measured.
LAYCA_HOST_DEVICE inline bool turns_whole(const TensorRow& tensor) { return turns(tensor) && !tensor.flag(Flag::PART); }

LAYCA_HOST_DEVICE inline Dots layer_dots(const Batch& batch, std::int64_t layer) {
  const double* const sums = batch.dots + 3 * layer;
  return {sums[0], sums[1], sums[2]};
}

LAYCA_HOST_DEVICE inline Rotation layer_rotation(const Batch& batch, std::int64_t layer) {
  const double* const row = batch.coefficients + layer * Coefficient::WIDTH;
  return {row[Coefficient::A], row[Coefficient::B], row[Coefficient::C], row[Coefficient::MODE], 0};
}

// From a layer's dots, and sigma^2 if it turns: its coefficients, its radius and its counts.
LAYCA_HOST_DEVICE inline void write_coefficients(const Batch& batch, std::int64_t layer, const TensorRow& tensor,
                                                 const Dots& dots, double sigma2) {
  const double lr = tensor.hyper[Hyper::LR];
  Rotation turn = keep_rotation(0);
  if (turns(tensor)) {
    double* const radius = tensor.pointer<double>(Column::RADIUS) + (layer - tensor.columns[Column::FIRST_LAYER]);
    turn = rotation(dots, sigma2, lr, *radius, tensor.flag(Flag::CURRENT), tensor.flag(Flag::WAITS),
                    static_cast<int>(tensor.columns[Column::RULE]), tensor.hyper[Hyper::NOISE]);
    *radius = turn.radius;
    std::int64_t* const counts = batch.counts + layer * Count::WIDTH;
    const bool finite = is_finite(dots.n2);
    counts[Count::NO_DIRECTION] += lr > 0 && finite && turn.mode == Mode::KEEP;
    counts[Count::BROKEN] += !finite;
  } else if (tensor.has_grad()) {
    turn = plain_step(dots.q, lr, tensor.hyper[Hyper::WEIGHT_DECAY]);
  }
  double* const row = batch.coefficients + layer * Coefficient::WIDTH;
  row[Coefficient::A] = turn.a;
  row[Coefficient::B] = turn.b;
  row[Coefficient::C] = turn.c;
  row[Coefficient::MODE] = turn.mode;
}

}  // namespace layca
