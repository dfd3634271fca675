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
  void* steps;  // scratch, where the kernel says so
  const double* options;
  double grad_scale;
  std::int64_t length;
};

struct Partial {
  Dots dots;
  std::int64_t non_finite;
};

// Where two ways to move the weights stand side by side, the first is w = a*w + b*u in the type of the elements, the
// second w = a*w + b*(u - c*w) in float64, rounded to that type.
struct Kernels {
  const char* formula;
  const char* dtype;
  // Advance the states of one tile (modified in place) and sum up its dots.
  Partial (*measure)(const Run& run);
  // The same, and leave the steps in `run.steps`: for formulas whose steps take long to make again; otherwise null.
  Partial (*measure_and_store)(const Run& run);
  // Measure and move the weights at once.
  Partial (*step_linearly)(const Run& run, double a, double b);
  Partial (*step_precisely)(const Run& run, double a, double b, double c);
  // Move the weights by the steps that the states make once more.
  void (*rotate)(const Run& run, double a, double b);
  void (*rotate_precisely)(const Run& run, double a, double b, double c);
  // Move the weights by the steps in `run.steps`.
  void (*rotate_stored)(const Run& run, double a, double b);
  void (*rotate_stored_precisely)(const Run& run, double a, double b, double c);
  // The sum of (u - c*w)^2.
  double (*orthogonal_square)(const Run& run, double c);
  void (*prepare)(double count, const double* group, double* options);  // null where steps are not counted
  int n_states;
  int item_size;
  int arrays_read_again;  // by rotate after measure: the parameter and either the steps, or the states and the gradient
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
