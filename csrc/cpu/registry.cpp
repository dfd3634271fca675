#include "registry.h"

#include <stdexcept>

namespace layca::cpu {
namespace {

struct InstructionSet {
  const char* name;
  KernelTable table;
};

std::vector<InstructionSet> available() {
  std::vector<InstructionSet> sets;
#ifdef LAYCA_X86_64_LEVELS
  if (__builtin_cpu_supports("x86-64-v4")) sets.push_back({"x86-64-v4", x86_64_v4::kernels()});
  if (__builtin_cpu_supports("x86-64-v3")) sets.push_back({"x86-64-v3", x86_64_v3::kernels()});
#endif
  sets.push_back({"baseline", baseline::kernels()});
  return sets;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : available()) names.push_back(set.name);
  return names;
}

std::vector<std::string> formula_names() {
  std::vector<std::string> names;
  const KernelTable table = baseline::kernels();
  for (int i = 0; i < table.size; ++i) {
    if (table.rows[i].dtype == std::string("float32")) names.push_back(table.rows[i].formula);
  }
  return names;
}

Kernels find_kernels(const std::string& formula, const std::string& dtype, const std::string& instructions) {
  std::string offered;
  for (const InstructionSet& set : available()) {
    for (int i = 0; i < set.table.size; ++i) {
      const Kernels& row = set.table.rows[i];
      if (set.name == instructions && row.formula == formula && row.dtype == dtype) return row;
      offered += std::string(" (") + row.formula + ", " + row.dtype + ", " + set.name + ")";
    }
  }
  throw std::invalid_argument("no kernels for formula='" + formula + "', dtype='" + dtype + "', instructions='" +
                              instructions + "': there are" + offered);
}

}  // namespace layca::cpu
