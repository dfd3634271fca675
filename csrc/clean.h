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
