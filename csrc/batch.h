// The flattened multi-tensor batch, as layca_fast/step/batch.py fills it: the columns are those of
// layca_fast/formulas/tables.py.
#pragma once

#include <cstdint>

#include "portable.h"
#include "rotation.h"

namespace layca {

constexpr int max_states = 3, max_options = 6;

// Columns of the tensor table, int64. Pointers are addresses; 0 stands for "none".
struct Column {
  enum : int {
    PARAM = 0,
    GRAD = 1,                   // 0: no gradient this step, the tensor is left alone
    STATE = 2,                  // max_states columns, in the formula's order
    STEP = STATE + max_states,  // float32, the number of steps taken; 0 where the formula does not count them
    RADIUS,                     // float64, one per layer; 0 where the tensor does not rotate
    NUMEL,
    LAYERS,       // equal slices of the tensor, one layer each
    FIRST_LAYER,  // row in dots, coefficients and counts
    HYPER,        // row in the hyperparameter table
    FLAGS,
    RULE,
    REMAINDER,  // of a 16-bit parameter, int16; 0 where it has none
    WIDTH
  };
};

// Bits of Column::FLAGS.
struct Flag {
  enum : int { ROTATES = 1, CURRENT = 2, PART = 4, WAITS = 8 };
};

// Columns of the hyperparameter table, float64.
struct Hyper {
  enum : int { LR = 0, WEIGHT_DECAY, GRAD_SCALE, NOISE, OPTION, RADIUS_LR = OPTION + max_options, WIDTH };
};

// Columns of the layer table, int64.
struct Layer {
  enum : int { TENSOR = 0, FIRST_TILE, TILES, WIDTH };
};

// Columns of the tile table, int64.
struct Tile {
  enum : int { TENSOR = 0, LAYER, OFFSET, LENGTH, WIDTH };
};

// Columns of the counts, int64, summed over steps, per layer.
struct Count {
  enum : int { NON_FINITE = 0, NO_DIRECTION, BROKEN, WIDTH };
};

// Columns of the coefficient table, float64.
struct Coefficient {
  enum : int { A = 0, B, C, MODE, WIDTH };
};

// Types of elements in memory.
enum class Type : int { FLOAT32 = 0, FLOAT64, BFLOAT16, FLOAT16 };

// Of parameters, gradients and states. Formulas run in float64 where parameters have it, otherwise in float32.
struct Types {
  Type param, grad, state;
};

LAYCA_HOST_DEVICE constexpr int size_of(Type type) { return type == Type::FLOAT64 ? 8 : type == Type::FLOAT32 ? 4 : 2; }

// The tables of one batch. `partials` (tiles, 3) and `partial_counts` (tiles) are scratch. `step_options` (tensors,
// max_options) are this step's options of every tensor, or null where the formula does not count its steps. `tiles` and
// `n_tiles` are for backends that walk tiles; others find them by their layer, `tile` elements long but for the last.
struct Batch {
  const std::int64_t* tensors;
  const double* hypers;
  double* step_options;
  const std::int64_t* layers;
  double* dots;
  double* coefficients;
  std::int64_t* counts;
  double* partials;
  std::int64_t* partial_counts;
  std::int64_t n_tensors;
  std::int64_t n_layers;
  std::int64_t tile;
  Types types;
  const std::int64_t* tiles;
  std::int64_t n_tiles;
};

// One row of the tensor table with its row of hyperparameters and its options in this step.
struct TensorRow {
  const std::int64_t* columns;
  const double* hyper;
  const double* options;

  template <class T>
  LAYCA_HOST_DEVICE T* pointer(int column) const {
    return reinterpret_cast<T*>(columns[column]);
  }
  LAYCA_HOST_DEVICE bool has_grad() const { return columns[Column::GRAD] != 0; }
  LAYCA_HOST_DEVICE bool flag(int bit) const { return (columns[Column::FLAGS] & bit) != 0; }
};

LAYCA_HOST_DEVICE inline TensorRow tensor_row(const Batch& batch, std::int64_t tensor) {
  const std::int64_t* columns = batch.tensors + tensor * Column::WIDTH;
  const double* hyper = batch.hypers + columns[Column::HYPER] * Hyper::WIDTH;
  const double* options = batch.step_options ? batch.step_options + tensor * max_options : hyper + Hyper::OPTION;
  return {columns, hyper, options};
}

// One layer: a slice of a tensor, in elements from the tensor's first, and its tiles.
struct LayerSpan {
  TensorRow tensor;
  std::int64_t offset, length;
  std::int64_t first_tile, tiles;
};

LAYCA_HOST_DEVICE inline LayerSpan layer_span(const Batch& batch, std::int64_t layer) {
  const std::int64_t* row = batch.layers + layer * Layer::WIDTH;
  const TensorRow tensor = tensor_row(batch, row[Layer::TENSOR]);
  const std::int64_t length = tensor.columns[Column::NUMEL] / tensor.columns[Column::LAYERS];
  return {tensor, (layer - tensor.columns[Column::FIRST_LAYER]) * length, length, row[Layer::FIRST_TILE],
          row[Layer::TILES]};
}

// One tile: a run of elements of one layer, in elements from the tensor's first.
struct TileSpan {
  TensorRow tensor;
  std::int64_t layer, offset, length;
};

LAYCA_HOST_DEVICE inline TileSpan tile_span(const Batch& batch, std::int64_t tile) {
  const std::int64_t* row = batch.tiles + tile * Tile::WIDTH;
  return {tensor_row(batch, row[Tile::TENSOR]), row[Tile::LAYER], row[Tile::OFFSET], row[Tile::LENGTH]};
}

}  // namespace layca
