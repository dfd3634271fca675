// The base optimizers, one functor each: what they keep between steps and which direction they propose.
//
// Functions of one element, host and device, equal to those of the same names in layca_fast/formulas.py. `state` is
// advanced in place; `step` does not depend on the old state, so that the rotate pass can recompute it and no
// backend stores u. `options` are the scalars that layca_fast/bases.py makes of a param group.
#pragma once

#include "portable.h"

namespace layca {

struct Sgd {
  static constexpr const char* name = "sgd";
  static constexpr int n_states = 0;
  static constexpr bool reads_grad = true;

  template <class T>
  static LAYCA_INLINE void advance(T, T*, const T*) {}

  template <class T>
  static LAYCA_INLINE T step(T grad, const T*, const T*) {
    return grad;
  }
};

struct SgdMomentum {
  static constexpr const char* name = "sgd_momentum";
  static constexpr int n_states = 1;
  static constexpr bool reads_grad = false;

  template <class T>
  static LAYCA_INLINE void advance(T grad, T* state, const T* options) {
    const T momentum = options[0], fraction = options[1];
    state[0] = momentum * state[0] + fraction * grad;
  }

  template <class T>
  static LAYCA_INLINE T step(T, const T* state, const T*) {
    return state[0];
  }
};

struct SgdNesterov : SgdMomentum {
  static constexpr const char* name = "sgd_nesterov";
  static constexpr bool reads_grad = true;

  template <class T>
  static LAYCA_INLINE T step(T grad, const T* state, const T* options) {
    return grad + options[0] * state[0];
  }
};

template <class... Formula>
struct FormulaList {};

// Every formula; a compiled backend instantiates its kernels for each of them.
using Formulas = FormulaList<Sgd, SgdMomentum, SgdNesterov>;

}  // namespace layca
