// The kernels of each formula and type, behind functions that know neither.
#pragma once

#include <string>
#include <vector>

#include "../batch.h"
#include "kernels.h"

namespace layca::cpu {

// `offset` and `length` count elements of the tensor.
struct Kernels {
  Partial (*measure)(const TensorRow& tensor, std::int64_t offset, std::int64_t length);
  void (*rotate)(const TensorRow& tensor, const Rotation& rotation, std::int64_t offset, std::int64_t length);
  double (*orthogonal_square)(const TensorRow& tensor, double c, std::int64_t offset, std::int64_t length);
  void (*prepare)(double count, const double* group, double* options);  // null where steps are not counted
  int item_size;
  int arrays_read_again;  // by rotate after measure: the parameter, the states, and perhaps the gradient
};

// The kernels of `formula` for `dtype` ("float32" or "float64"). Throws std::invalid_argument with the names on offer.
Kernels find_kernels(const std::string& formula, const std::string& dtype);

std::vector<std::string> formula_names();

}  // namespace layca::cpu
