// The three dots of a run: products and sums in float64, in an order that no instruction set changes.
#pragma once

#include "../rotation.h"

namespace layca::cpu::LAYCA_INSTRUCTIONS {

// x*y + z, fused where that is sure to give the same bits: the product of two float32 numbers is exact in float64.
template <class T>
LAYCA_INLINE double multiply_add(T x, T y, double z) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  if (sizeof(T) == sizeof(float)) return __builtin_fma(static_cast<double>(x), static_cast<double>(y), z);
#endif
  return static_cast<double>(x) * static_cast<double>(y) + z;
}

// A lane for each residue of the elements' index, so that every instruction set adds in the same order.
constexpr int lanes = 16;

// The three dots, products and sums in float64.
struct Sums {
  double n2[lanes] = {}, d[lanes] = {}, q[lanes] = {};

  template <class T>
  LAYCA_INLINE void add_product(int lane, T w, T u) {
    n2[lane] = multiply_add(w, w, n2[lane]);
    d[lane] = multiply_add(w, u, d[lane]);
    q[lane] = multiply_add(u, u, q[lane]);
  }

  LAYCA_INLINE void add(const Sums& other) {
#pragma omp simd
    for (int lane = 0; lane < lanes; ++lane) {
      n2[lane] += other.n2[lane];
      d[lane] += other.d[lane];
      q[lane] += other.q[lane];
    }
  }

  LAYCA_INLINE bool squares_are_finite() const {
    double sum = 0;
    for (const double square : q) sum += square;
    return is_finite(sum);
  }

  LAYCA_INLINE Dots total() {
    for (int half = lanes / 2; half > 0; half /= 2) {
#pragma omp simd
      for (int lane = 0; lane < half; ++lane) {
        n2[lane] += n2[lane + half];
        d[lane] += d[lane + half];
        q[lane] += q[lane + half];
      }
    }
    return {n2[0], d[0], q[0]};
  }
};

}  // namespace layca::cpu::LAYCA_INSTRUCTIONS
