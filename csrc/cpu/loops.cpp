// Compiled once for every instruction set, which LAYCA_INSTRUCTIONS names.
#include "loops.h"

namespace layca::cpu::LAYCA_INSTRUCTIONS {
namespace {

template <class Formula>
void prepare(double count, const double* group, double* options) {
  Formula::prepare(count, group, options);
}

template <class Formula, class T>
constexpr Kernels row(const char* dtype) {
  Kernels kernels{};
  kernels.formula = Formula::name;
  kernels.dtype = dtype;
  kernels.measure = measure<Formula, T>;
  kernels.step_linearly = step_linearly<Formula, T>;
  kernels.step_precisely = step_precisely<Formula, T>;
  kernels.rotate = rotate<Again<Formula>, T>;
  kernels.rotate_precisely = rotate_precisely<Again<Formula>, T>;
  kernels.orthogonal_square = orthogonal_square<Formula, T>;
  kernels.n_states = Formula::n_states;
  kernels.item_size = sizeof(T);
  kernels.arrays_read_again = 1 + Formula::n_states + (Formula::reads_grad ? 1 : 0);
  if constexpr (Formula::counts_steps) kernels.prepare = prepare<Formula>;
  if constexpr (Formula::takes_roots) {
    kernels.measure_and_store = measure_and_store<Formula, T>;
    kernels.rotate_stored = rotate<Stored, T>;
    kernels.rotate_stored_precisely = rotate_precisely<Stored, T>;
    kernels.arrays_read_again = 2;
  }
  return kernels;
}

template <class... Formula>
KernelTable table(FormulaList<Formula...>) {
  static constexpr Kernels rows[] = {row<Formula, float>("float32")..., row<Formula, double>("float64")...};
  return {rows, sizeof(rows) / sizeof(rows[0])};
}

}  // namespace

KernelTable kernels() { return table(Formulas{}); }

}  // namespace layca::cpu::LAYCA_INSTRUCTIONS
