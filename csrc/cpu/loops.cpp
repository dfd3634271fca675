// Compiled once for every instruction set, which LAYCA_INSTRUCTIONS names.
#include "loops.h"

namespace layca::cpu::LAYCA_INSTRUCTIONS {
namespace {

template <class Formula>
void prepare(double count, const double* group, double* options) {
  if constexpr (Formula::counts_steps) Formula::prepare(count, group, options);
}

template <class Formula, class Window>
constexpr Kernels row(const char* dtype) {
  return {Formula::name,
          dtype,
          measure<Formula, Window>,
          rotate<Formula, Window>,
          rotate_precisely<Formula, Window>,
          orthogonal_square<Formula, Window>,
          Formula::counts_steps ? prepare<Formula> : nullptr,
          Formula::n_states,
          Formula::reads_grad};
}

template <class... Formula>
KernelTable table(FormulaList<Formula...>) {
  static constexpr Kernels rows[] = {
      row<Formula, InPlace<float, Formula>>("float32")...,
      row<Formula, InPlace<double, Formula>>("float64")...,
      row<Formula, Buffered<Formula>>("bfloat16")...,
      row<Formula, Buffered<Formula>>("float16")...,
  };
  return {rows, sizeof(rows) / sizeof(rows[0])};
}

}  // namespace

KernelTable kernels() { return table(Formulas{}); }

}  // namespace layca::cpu::LAYCA_INSTRUCTIONS
