// Compiled once for every instruction set, which LAYCA_INSTRUCTIONS names.
#include "loops.h"

namespace layca::cpu::LAYCA_INSTRUCTIONS {
namespace {

template <class Formula>
void prepare(double count, const double* group, double* options) {
  if constexpr (Formula::counts_steps) Formula::prepare(count, group, options);
}

template <class Formula, class T>
constexpr Kernels row(const char* dtype) {
  return {Formula::name,
          dtype,
          measure<Formula, T>,
          rotate<Formula, T>,
          rotate_precisely<Formula, T>,
          orthogonal_square<Formula, T>,
          Formula::counts_steps ? prepare<Formula> : nullptr,
          Formula::n_states,
          sizeof(T),
          1 + Formula::n_states + (Formula::reads_grad ? 1 : 0)};
}

template <class... Formula>
KernelTable table(FormulaList<Formula...>) {
  static constexpr Kernels rows[] = {row<Formula, float>("float32")..., row<Formula, double>("float64")...};
  return {rows, sizeof(rows) / sizeof(rows[0])};
}

}  // namespace

KernelTable kernels() { return table(Formulas{}); }

}  // namespace layca::cpu::LAYCA_INSTRUCTIONS
