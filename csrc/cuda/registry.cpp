#include "registry.h"

#include <map>
#include <stdexcept>
#include <utility>

#include "../base_steps.h"
#include "arrays.h"

namespace layca::cuda {
namespace {

using Table = std::map<std::pair<std::string, std::string>, Kernels>;

template <class... Formula>
Table make_table(FormulaList<Formula...>) {
  Table table;
  ((table[{Formula::name, "float32"}] = kernels_of<Formula, float>()), ...);
  ((table[{Formula::name, "float64"}] = kernels_of<Formula, double>()), ...);
  ((table[{Formula::name, "bfloat16"}] = kernels_of<Formula, Halves>()), ...);
  ((table[{Formula::name, "float16"}] = kernels_of<Formula, Halves>()), ...);
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

}  // namespace layca::cuda
