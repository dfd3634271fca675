// The base optimizers, one functor each: what they keep between steps and which direction they propose.
//
// Functions of one element, host and device, equal to those of the same names in layca_fast/formulas/base_steps.py.
// `state` is advanced in place; `step` does not depend on the old state, so that the rotate pass can recompute it and
// no backend keeps u for a whole model. `options` are the scalars that layca_fast/formulas/bases.py makes of a param
// group, as `prepare` makes them fit this step, where the formula counts its steps.
#pragma once

#include <cmath>

#include "batch.h"
#include "portable.h"
#include "rotation.h"

namespace layca {

struct Uncounted {
  static constexpr bool counts_steps = false;
  static constexpr bool takes_roots = false;

  // Whether state k is a mean or a sum of squares.
  static constexpr LAYCA_HOST_DEVICE bool is_square(int) { return false; }

  // Where this is not finite, the gradient counts as 0.
  template <class T>
  static LAYCA_INLINE T witness(T grad) {
    return grad;
  }

  // Where the gradient's witness or a new state is not finite, this or the step must not be finite.
  template <class T>
  static LAYCA_INLINE T watched(T, const T*) {
    return 0;
  }
};

// Formulas that count steps also square gradients: one whose square overflows would leave a mean square of infinity.
struct Counted {
  static constexpr bool counts_steps = true;
  static constexpr bool takes_roots = true;  // in `step`: it takes longer than to read it from a cache

  static constexpr LAYCA_HOST_DEVICE bool is_square(int k) { return k == 0; }

  template <class T>
  static LAYCA_INLINE T witness(T grad) {
    return grad * grad;
  }

  template <class T>
  static LAYCA_INLINE T watched(T, const T* state) {
    return state[0];
  }

  static LAYCA_INLINE void prepare(double, const double* group, double* options) {
    for (int k = 0; k < max_options; ++k) options[k] = group[k];
  }
};

template <class T>
LAYCA_INLINE T square_root(T x) {
  using std::sqrt;
  return sqrt(x);
}

template <class T>
LAYCA_INLINE T finite_or_zero(T x) {
  return is_finite(x) ? x : T(0);
}

// Not (1 - weight)*mean + weight*x: in float32 the two factors do not add up to 1. And where all the weight is on x,
// x - mean + mean has lost what is small beside the mean.
template <class T>
LAYCA_INLINE T running_mean(T mean, T x, T weight) {
  const T kept = mean * T(weight < T(1));
  return kept + weight * (x - kept);
}

// torch's form, so that its roundings are ours, too.
template <class T>
LAYCA_INLINE T running_square(T mean, T x, T keep, T weight) {
  return keep * mean + weight * (x * x);
}

struct Sgd : Uncounted {
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

struct SgdMomentum : Uncounted {
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

// States: square_avg, then grad_avg if centered, then momentum_buffer if there is momentum.
template <bool centered, bool momentum>
struct RmsProp : Counted {
  static constexpr const char* name = centered   ? momentum ? "rmsprop_centered_momentum" : "rmsprop_centered"
                                      : momentum ? "rmsprop_momentum"
                                                 : "rmsprop";
  static constexpr int n_states = 1 + centered + momentum;
  static constexpr bool reads_grad = !momentum;

  template <class T>
  static LAYCA_INLINE void advance(T grad, T* state, const T* options) {
    state[0] = running_square(state[0], grad, options[0], options[1]);
    if (centered) state[1] = running_mean(state[1], grad, options[1]);
    // What is not finite in a step counts as zero before it enters the buffer, too.
    if (momentum) {
      state[n_states - 1] = options[3] * state[n_states - 1] + finite_or_zero(scaled(grad, state, options));
    }
  }

  template <class T>
  static LAYCA_INLINE T watched(T, const T* state) {
    return centered ? state[0] + state[1] : state[0];
  }

  template <class T>
  static LAYCA_INLINE T step(T grad, const T* state, const T* options) {
    return momentum ? state[n_states - 1] : scaled(grad, state, options);
  }

 private:
  template <class T>
  static LAYCA_INLINE T scaled(T grad, const T* state, const T* options) {
    const T spread = centered ? state[0] - state[1] * state[1] : state[0];
    return grad / (square_root(spread) + options[2]);
  }
};

struct Adagrad : Counted {
  static constexpr const char* name = "adagrad";
  static constexpr int n_states = 1;
  static constexpr bool reads_grad = true;

  template <class T>
  static LAYCA_INLINE void advance(T grad, T* state, const T*) {
    const T sum = state[0] + grad * grad;
    state[0] = is_finite(sum) ? sum : state[0];
  }

  template <class T>
  static LAYCA_INLINE T watched(T grad, const T* state) {
    return witness(grad) + state[0];
  }

  template <class T>
  static LAYCA_INLINE T step(T grad, const T* state, const T* options) {
    return grad / (square_root(state[0]) + options[0]);
  }
};

// States: exp_avg, exp_avg_sq, then max_exp_avg_sq under amsgrad.
template <bool amsgrad>
struct Adam : Counted {
  static constexpr const char* name = amsgrad ? "adam_amsgrad" : "adam";
  static constexpr int n_states = amsgrad ? 3 : 2;
  static constexpr bool reads_grad = false;

  static constexpr LAYCA_HOST_DEVICE bool is_square(int k) { return k > 0; }

  static LAYCA_INLINE void prepare(double count, const double* group, double* options) {
    using std::exp;
    using std::sqrt;
    Counted::prepare(count, group, options);
    options[4] = 1 / (1 - exp(count * group[4]));
    options[5] = 1 / sqrt(1 - exp(count * group[5]));
  }

  template <class T>
  static LAYCA_INLINE void advance(T grad, T* state, const T* options) {
    state[0] = running_mean(state[0], grad, options[0]);
    state[1] = running_square(state[1], grad, options[1], options[2]);
    if (amsgrad) state[2] = state[1] > state[2] ? state[1] : state[2];
  }

  template <class T>
  static LAYCA_INLINE T watched(T, const T* state) {
    return amsgrad ? state[1] + state[2] : state[1];
  }

  template <class T>
  static LAYCA_INLINE T step(T, const T* state, const T* options) {
    return state[0] * options[4] / (square_root(state[n_states - 1]) * options[5] + options[3]);
  }
};

// Those that keep an average of the gradients, beside which the step needs the gradient of this step.
struct Averaging : Uncounted {
  static constexpr int n_states = 1;
  static constexpr bool reads_grad = true;

  template <class T>
  static LAYCA_INLINE void advance(T grad, T* state, const T* options) {
    state[0] = running_mean(state[0], grad, options[0]);
  }
};

struct Lion : Averaging {
  static constexpr const char* name = "lion";

  template <class T>
  static LAYCA_INLINE T watched(T, const T* state) {
    return state[0];
  }

  // The sign of beta1*m + (1 - beta1)*g, where m, the average before this step, is taken from the one after it.
  template <class T>
  static LAYCA_INLINE T step(T grad, const T* state, const T* options) {
    const T mixed = options[1] * state[0] + options[2] * grad;
    return mixed > 0 ? T(1) : mixed < 0 ? T(-1) : mixed * T(0);
  }
};

// What Muon makes a matrix's direction of: the average, or Nesterov's look-ahead. The rest:
// layca_fast/step/directions.py.
struct Muon : Averaging {
  static constexpr const char* name = "muon";

  template <class T>
  static LAYCA_INLINE T step(T grad, const T* state, const T* options) {
    return options[1] * grad + options[2] * state[0];
  }
};

template <class... Formula>
struct FormulaList {};

// Every formula; a compiled backend instantiates its kernels for each of them.
using Formulas = FormulaList<Sgd, SgdMomentum, SgdNesterov, RmsProp<false, false>, RmsProp<true, false>,
                             RmsProp<false, true>, RmsProp<true, true>, Adagrad, Adam<false>, Adam<true>, Lion, Muon>;

}  // namespace layca
