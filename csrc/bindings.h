// What the Python modules share: addresses, sizes and names of types in, the tables of a batch out.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "batch.h"

namespace layca {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// The type that Python calls `dtype`. Throws std::invalid_argument with what there is.
inline Type find_type(const std::string& dtype) {
  static constexpr std::pair<const char*, Type> types[] = {
      {"float32", Type::FLOAT32}, {"float64", Type::FLOAT64}, {"bfloat16", Type::BFLOAT16}, {"float16", Type::FLOAT16}};
  std::string offered;
  for (const auto& [name, type] : types) {
    if (dtype == name) return type;
    offered += std::string(" ") + name;
  }
  throw std::invalid_argument("no kernels for dtype='" + dtype + "': there are" + offered);
}

inline Batch make_batch(Address tensors, Address hypers, Address step_options, Address layers, Address dots,
                        Address coefficients, Address counts, Address partials, Address partial_counts,
                        std::int64_t n_tensors, std::int64_t n_layers, std::int64_t tile, const std::string& dtype,
                        const std::string& grad_dtype, const std::string& state_dtype) {
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
  batch.types = {find_type(dtype), find_type(grad_dtype), find_type(state_dtype)};
  return batch;
}

}  // namespace layca
