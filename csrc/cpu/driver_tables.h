// A batch of odd sizes without Python: for the drivers that are run under instruments.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../batch.h"

namespace layca::driver {

constexpr std::int64_t tile = 4096;

// A large layer, and small ones that one thread does whole; lengths that no vector and no tile divides.
inline const std::vector<std::int64_t> lengths = [] {
  std::vector<std::int64_t> all(50, 1003);
  all.push_back(300007);
  return all;
}();

struct Tables {
  std::vector<std::vector<float>> memory;
  std::vector<float> steps;
  std::vector<double> radii;
  std::vector<std::int64_t> tensors, layers;
  std::int64_t n_tiles = 0, elements = 0;
};

inline std::int64_t address(const void* pointer) {
  return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(pointer));
}

inline Tables make_tables(const std::vector<std::int64_t>& lengths) {
  Tables tables;
  const std::size_t n = lengths.size();
  tables.steps.assign(n, 0);
  tables.radii.assign(n, 0);
  for (std::size_t tensor = 0; tensor < n; ++tensor) {
    const std::int64_t length = lengths[tensor], tiles = (length + tile - 1) / tile;
    std::int64_t row[Column::WIDTH] = {};
    // The parameter, the gradient, the states: numbers of either sign, none of them zero.
    for (int array = 0; array < 2 + max_states; ++array) {
      std::vector<float> values(static_cast<std::size_t>(length));
      for (std::int64_t i = 0; i < length; ++i) {
        const float size = 0.1f + static_cast<float>((i * 7 + array * 3) % 11);
        values[static_cast<std::size_t>(i)] = array < 2 && i % 3 == array ? -size : size;
      }
      tables.memory.push_back(std::move(values));
      row[array == 0   ? Column::PARAM
          : array == 1 ? Column::GRAD
                       : Column::STATE + array - 2] = address(tables.memory.back().data());
    }
    row[Column::STEP] = address(&tables.steps[tensor]);
    row[Column::RADIUS] = address(&tables.radii[tensor]);
    row[Column::NUMEL] = length;
    row[Column::LAYERS] = 1;
    row[Column::FIRST_LAYER] = static_cast<std::int64_t>(tensor);
    row[Column::FLAGS] = Flag::ROTATES;
    tables.tensors.insert(tables.tensors.end(), row, row + Column::WIDTH);
    tables.layers.insert(tables.layers.end(), {static_cast<std::int64_t>(tensor), tables.n_tiles, tiles});
    tables.n_tiles += tiles;
    tables.elements += length;
  }
  return tables;
}

// The tables with the batch that they make.
struct Setup {
  Tables tables;
  std::int64_t n;
  // Options that are in range under every formula, whatever it calls them; the last two are logarithms under Adam.
  std::vector<double> hypers = {0.01, 0, 1, 0, 0.1, 0.9, 0.1, 1e-8, -0.1, -0.01};
  std::vector<double> step_options, dots, coefficients, partials;
  std::vector<std::int64_t> counts, partial_counts;
  Batch batch{};

  explicit Setup(const std::vector<std::int64_t>& of = lengths)
      : tables(make_tables(of)),
        n(static_cast<std::int64_t>(of.size())),
        step_options(n * max_options),
        dots(3 * n),
        coefficients(n * Coefficient::WIDTH),
        partials(3 * tables.n_tiles),
        counts(n * Count::WIDTH),
        partial_counts(tables.n_tiles) {
    batch.tensors = tables.tensors.data();
    batch.hypers = hypers.data();
    batch.step_options = step_options.data();
    batch.layers = tables.layers.data();
    batch.dots = dots.data();
    batch.coefficients = coefficients.data();
    batch.counts = counts.data();
    batch.partials = partials.data();
    batch.partial_counts = partial_counts.data();
    batch.n_tensors = batch.n_layers = n;
    batch.tile = tile;
  }
  Setup(const Setup&) = delete;
  Setup& operator=(const Setup&) = delete;
};

}  // namespace layca::driver
