// The three verbs over a whole batch, as launches on a stream: their number does not depend on how many tensors it has.
#pragma once

#include <cstdint>
#include <string>

#include "../batch.h"
#include "registry.h"

namespace layca::cuda {

// Made once for a batch: the tables' addresses and structure stay, while what they hold may change between calls. Calls
// return before the device is done, allocate nothing on it, and work on the current device.
class Runner {
 public:
  // Throws std::invalid_argument if there are no kernels for `formula` and `dtype`.
  Runner(const Batch& batch, const std::string& formula, const std::string& dtype);

  // Advances the states (in place); writes dots and non-finite counts.
  void measure(std::uintptr_t stream) const;
  // From the dots: writes coefficients, the other counts, and radii on their first use.
  void coefficients(std::uintptr_t stream) const;
  // Applies the coefficients to the parameters (in place).
  void rotate(std::uintptr_t stream) const;
  // All three, with one launch for the sums and the coefficients.
  void step(std::uintptr_t stream) const;

 private:
  void advance(std::uintptr_t stream) const;
  void finish(bool adds_up, bool turns_dots, std::uintptr_t stream) const;

  Batch batch_;
  Kernels kernels_;
  std::string label_;
};

}  // namespace layca::cuda
