// Finds the kernels of a formula and a type for the processor that this runs on.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace layca::cpu {

// The kernels of `formula` for parameters of `dtype`, compiled for `instructions`, one of
// instruction_sets(). Throws std::invalid_argument with what there is.
Kernels find_kernels(const std::string& formula, const std::string& dtype, const std::string& instructions);

std::vector<std::string> formula_names();

// The instruction sets that kernels were compiled for and that this processor has, the best first.
std::vector<std::string> instruction_sets();

}  // namespace layca::cpu
