#include "registry.h"

#include <map>
#include <stdexcept>
#include <utility>

namespace layca::cpu {
namespace {

using Table = std::map<std::pair<std::string, std::string>, Kernels>;

template <class Formula, class T>
Run<T> make_run(const TensorRow& tensor, std::int64_t offset, std::int64_t length) {
  Run<T> run{};
  run.param = tensor.pointer<T>(Column::PARAM) + offset;
  run.grad = tensor.pointer<const T>(Column::GRAD) + offset;
  for (int k = 0; k < Formula::n_states; ++k) run.states[k] = tensor.pointer<T>(Column::STATE + k) + offset;
  for (int k = 0; k < max_options; ++k) run.options[k] = static_cast<T>(tensor.options[k]);
  run.grad_scale = static_cast<T>(tensor.hyper[Hyper::GRAD_SCALE]);
  run.length = length;
  return run;
}

template <class Formula, class T>
Partial measure(const TensorRow& tensor, std::int64_t offset, std::int64_t length) {
  return measure_run<Formula>(make_run<Formula, T>(tensor, offset, length));
}

template <class Formula, class T>
void rotate(const TensorRow& tensor, const Rotation& rotation, std::int64_t offset, std::int64_t length) {
  const Run<T> run = make_run<Formula, T>(tensor, offset, length);
  if (rotation.mode == Mode::PRECISE) {
    rotate_run_precisely<Formula>(run, rotation.a, rotation.b, rotation.c);
  } else if (rotation.mode == Mode::LINEAR) {
    rotate_run<Formula>(run, static_cast<T>(rotation.a), static_cast<T>(rotation.b));
  }
}

template <class Formula, class T>
double orthogonal_square(const TensorRow& tensor, double c, std::int64_t offset, std::int64_t length) {
  return orthogonal_square_of_run<Formula>(make_run<Formula, T>(tensor, offset, length), c);
}

template <class Formula>
void prepare(double count, const double* group, double* options) {
  Formula::prepare(count, group, options);
}

template <class Formula, class T>
void add(Table& table, const char* dtype) {
  Kernels kernels{};
  kernels.measure = measure<Formula, T>;
  kernels.rotate = rotate<Formula, T>;
  kernels.orthogonal_square = orthogonal_square<Formula, T>;
  if constexpr (Formula::counts_steps) kernels.prepare = prepare<Formula>;
  kernels.item_size = sizeof(T);
  kernels.arrays_read_again = 1 + Formula::n_states + (Formula::reads_grad ? 1 : 0);
  table[{Formula::name, dtype}] = kernels;
}

template <class... Formula>
Table make_table(FormulaList<Formula...>) {
  Table table;
  (add<Formula, float>(table, "float32"), ...);
  (add<Formula, double>(table, "float64"), ...);
  return table;
}

template <class... Formula>
std::vector<std::string> names(FormulaList<Formula...>) {
  return {Formula::name...};
}

}  // namespace

std::vector<std::string> formula_names() { return names(Formulas{}); }

Kernels find_kernels(const std::string& formula, const std::string& dtype) {
  static const Table table = make_table(Formulas{});
  const auto found = table.find({formula, dtype});
  if (found != table.end()) return found->second;
  std::string message = "no kernels for formula='" + formula + "', dtype='" + dtype + "': there are";
  for (const auto& entry : table) message += " (" + entry.first.first + ", " + entry.first.second + ")";
  throw std::invalid_argument(message);
}

}  // namespace layca::cpu
