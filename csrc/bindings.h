// What the Python modules share: addresses and sizes in, the tables of a batch out.
#pragma once

#include <cstdint>

#include "batch.h"

namespace layca {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Batch make_batch(Address tensors, Address hypers, Address step_options, Address layers, Address dots,
                        Address coefficients, Address counts, Address partials, Address partial_counts,
                        std::int64_t n_tensors, std::int64_t n_layers, std::int64_t tile) {
  Batch batch{};
  batch.tensors = pointer<const std::int64_t>(tensors);
  batch.hypers = pointer<const double>(hypers);
  batch.step_options = pointer<double>(step_options);
  batch.layers = pointer<const std::int64_t>(layers);
  batch.dots = pointer<double>(dots);
  batch.coefficients = pointer<double>(coefficients);
  batch.counts = pointer<std::int64_t>(counts);
  batch.partials = pointer<double>(partials);
  batch.partial_counts = pointer<std::int64_t>(partial_counts);
  batch.n_tensors = n_tensors;
  batch.n_layers = n_layers;
  batch.tile = tile;
  return batch;
}

}  // namespace layca
