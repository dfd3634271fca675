// Compiled once for every instruction set, which LAYCA_INSTRUCTIONS names.
#include "loops.h"

namespace layca::cpu::LAYCA_INSTRUCTIONS {
namespace {

template <class Formula>
void prepare(double count, const double* group, double* options) {
  Formula::prepare(count, group, options);
}

template <class Formula, class Window, class WindowWithoutStates>
constexpr Kernels row(const char* dtype) {
  Kernels kernels{};
  kernels.formula = Formula::name;
  kernels.dtype = dtype;
  kernels.measure = measure<Formula, Window>;
  kernels.step_linearly = step_linearly<Formula, Window>;
  kernels.step_precisely = step_precisely<Formula, Window>;
  kernels.rotate = rotate<Again<Formula>, Window>;
  kernels.rotate_precisely = rotate_precisely<Again<Formula>, Window>;
  kernels.orthogonal_square = orthogonal_square<Formula, Window>;
  kernels.n_states = Formula::n_states;
  kernels.step_size = sizeof(typename Window::Element);
  kernels.reads_grad = Formula::reads_grad;
  if constexpr (Formula::counts_steps) kernels.prepare = prepare<Formula>;
  if constexpr (Formula::takes_roots) {
    kernels.measure_and_store = measure_and_store<Formula, Window>;
    kernels.rotate_stored = rotate<Stored, WindowWithoutStates>;
    kernels.rotate_stored_precisely = rotate_precisely<Stored, WindowWithoutStates>;
  }
  return kernels;
}

template <class Formula, class T>
constexpr Kernels row_in_place(const char* dtype) {
  return row<Formula, InPlace<T>, InPlace<T>>(dtype);
}

template <class Formula>
constexpr Kernels row_of_halves(const char* dtype) {
  return row<Formula, Buffered<Formula::n_states>, Buffered<0>>(dtype);
}

template <class... Formula>
KernelTable table(FormulaList<Formula...>) {
  static constexpr Kernels rows[] = {
      row_in_place<Formula, float>("float32")...,
      row_in_place<Formula, double>("float64")...,
      row_of_halves<Formula>("bfloat16")...,
      row_of_halves<Formula>("float16")...,
  };
  return {rows, sizeof(rows) / sizeof(rows[0])};
}

}  // namespace

KernelTable kernels() { return table(Formulas{}); }

}  // namespace layca::cpu::LAYCA_INSTRUCTIONS
