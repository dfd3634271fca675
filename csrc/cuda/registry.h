// The kernels of each formula and type, by their addresses.
#pragma once

#include <string>
#include <vector>

namespace layca::cuda {

struct Kernels {
  const void* prepare;  // null where steps are not counted
  const void* measure;
  const void* finish;
  const void* rotate;
};

// Defined by kernels.cuh, and instantiated by a file of its own for each formula.
template <class Formula, class T>
Kernels kernels_of();

// The kernels of `formula` for parameters of `dtype`: "float32", "float64", "bfloat16" or "float16". Throws
// std::invalid_argument with the names on offer.
Kernels find_kernels(const std::string& formula, const std::string& dtype);

std::vector<std::string> formula_names();

}  // namespace layca::cuda
