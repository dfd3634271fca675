// Numbers that are not finite count as zero: element by element, host and device.
#pragma once

#include <cstdint>

#include "portable.h"
#include "rotation.h"

namespace layca {

// An integer as wide as T: vector loops count in lanes of one width.
std::int32_t counter_like(float);
std::int64_t counter_like(double);
template <class T>
using Counter = decltype(counter_like(T()));

// Takes 0 in place of what is not finite, and of a gradient whose witness is not, and counts the element.
template <class T>
struct Clean {
  using Trouble = Counter<T>;
  Counter<T> broken = 0;
  LAYCA_INLINE T operator()(T x) { return keep_if(is_finite(x), x); }
  template <class Formula>
  LAYCA_INLINE T gradient(T grad) {
    return keep_if(is_finite(Formula::witness(grad)), grad);
  }
  // The states of an element go together: a mean without its mean square, or 0 in the place of one, would make any
  // step. Where one is not finite they start anew, with the square of this gradient. `stored`: what memory keeps.
  template <class Formula, class Stored>
  LAYCA_INLINE void states(T grad, T* state, [[maybe_unused]] const Stored& stored) {
    if constexpr (Formula::n_states == 0) return;
    bool are_good = true;
    LAYCA_UNROLL
    for (int k = 0; k < Formula::n_states; ++k) are_good = are_good && is_finite(state[k]);
    LAYCA_UNROLL
    for (int k = 0; k < Formula::n_states; ++k) {
      const T anew = Formula::is_square(k) ? stored(k, grad * grad) : T(0);
      state[k] = are_good ? state[k] : (*this)(anew);
    }
    broken |= are_good ? 0 : 1;
  }
  template <class Formula>
  LAYCA_INLINE Trouble trouble(T, const T*) const {
    return broken;
  }

 private:
  LAYCA_INLINE T keep_if(bool is_good, T x) {
    const Counter<T> is_broken = is_good ? 0 : 1;
    broken |= is_broken;
    return is_broken == 0 ? x : T(0);
  }
};

}  // namespace layca
