// The loops over elements behind functions that know neither formula nor type, once for every instruction set.
#pragma once

#include <cstdint>

#include "../batch.h"

namespace layca::cpu {

// Where the elements of one run lie, and what the formula is told about them. `options` are those of this step.
struct Run {
  void* param;
  const void* grad;
  void* states[max_states];
  std::int16_t* remainder;  // null where the parameter has none
  Types types;
  const double* options;
  double grad_scale;
  std::int64_t length;
};

struct Partial {
  Dots dots;
  std::int64_t non_finite;
};

struct Kernels {
  const char* formula;
  const char* dtype;  // of the parameters
  // Advance the states of one tile (modified in place) and sum up its dots.
  Partial (*measure)(const Run& run);
  // w = a*w + b*u in the type of the elements (modified in place).
  void (*rotate)(const Run& run, double a, double b);
  // w = a*w + b*(u - c*w) in float64, rounded to the type (modified in place).
  void (*rotate_precisely)(const Run& run, double a, double b, double c);
  // The sum of (u - c*w)^2.
  double (*orthogonal_square)(const Run& run, double c);
  void (*prepare)(double count, const double* group, double* options);  // null where steps are not counted
  int n_states;
  bool reads_grad;  // rotate after measure, beside the parameter and the states
};

struct KernelTable {
  const Kernels* rows;
  int size;
};

// One of these per compilation of loops.cpp.
namespace baseline {
KernelTable kernels();
}
namespace x86_64_v3 {
KernelTable kernels();
}
namespace x86_64_v4 {
KernelTable kernels();
}

}  // namespace layca::cpu
