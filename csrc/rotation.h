// From three dot products to one linear combination, per layer: layca_fast/formulas/rotation.py `coefficients`, host
// and device.
#pragma once

#include <cmath>

#include "portable.h"

namespace layca {

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "layca_fast tests for NaN and infinity, which -ffast-math folds away: compile without it"
#endif

// Compilers must not assume that numbers are finite (-ffast-math), or this is always true. Not x - x == 0: where x is a
// product, a compiler may fuse that into the product's rounding error.
template <class T>
LAYCA_INLINE bool is_finite(T x) {
  return x * T(0) == T(0);
}

// How a layer's weights change: by nothing at all, by a*w + b*u, or by a*w + b*(u - c*w) in float64.
struct Mode {
  static constexpr double KEEP = 0, LINEAR = 1, PRECISE = 2;
};

struct Dots {
  double n2, d, q;  // <w,w>, <w,u>, <u,u>
};

// Where a rule puts the new weights in the plane of weights and step: so far along w and so far against the part of u
// that is orthogonal to it. Only the direction matters.
struct Turn {
  double along, across;
};

// Numbers of the rules, as the tensor table has them.
struct Rule {
  enum : int { LAYCA = 0, HYPERBALL = 1 };
};

struct Rotation {
  double a, b, c, mode;
  double radius;  // the radius state after this step
};

// No direction to turn in below this sine of the angle between weights and step: 4 float32 epsilons.
constexpr double smallest_sine = 4 * 0x1p-23;

// A layer whose norm is below this part of its radius was set to zero: see layca_fast/formulas/rotation.py.
constexpr double smallest_share = 0x1p-100;

// Below this squared sine the three dots no longer give sigma to full accuracy: it is measured again.
constexpr double nearly_parallel_sine2 = 1e-2;

// b as a float32 is exact to rounding, and so is b*u, only well inside float32's range.
constexpr double smallest_float32_b = 0x1p-100, largest_float32_b = 0x1p100;

LAYCA_HOST_DEVICE inline Rotation keep_rotation(double radius) { return {1, 0, 0, Mode::KEEP, radius}; }

// A tensor that does not rotate: the base step with decoupled decay, w - lr*(u + weight_decay*w).
LAYCA_HOST_DEVICE inline Rotation plain_step(double q, double lr, double weight_decay) {
  const bool moves = lr > 0 && (q > 0 || weight_decay > 0);
  // As a float32, the factor 1 - lr*weight_decay would be wrong by the same rounding at every step.
  const double mode = weight_decay > 0 ? Mode::PRECISE : Mode::LINEAR;
  return {1, -lr, -weight_decay, moves ? mode : Mode::KEEP, 0};
}

// sigma^2, the squared norm of the part of u that is orthogonal to w, from the three dots.
LAYCA_HOST_DEVICE inline double orthogonal_square(const Dots& dots) { return dots.q - dots.d * (dots.d / dots.n2); }

// Whether sigma^2 from the dots has lost digits to cancellation: see layca_fast/formulas/rotation.py
// `is_nearly_parallel`.
LAYCA_HOST_DEVICE inline bool is_nearly_parallel(double sigma2, double q) { return sigma2 < nearly_parallel_sine2 * q; }

// Turn by atan(lr).
LAYCA_HOST_DEVICE inline Turn layca(double lr) { return {1, lr}; }

// w - lr*n*u/|u|, without projection: layca_fast/formulas/rotation.py `hyperball`.
LAYCA_HOST_DEVICE inline Turn hyperball(const Dots& dots, double n, double sigma, double lr) {
  using std::sqrt;
  const double step_norm = sqrt(dots.q);
  return {1 - lr * (dots.d / (n * step_norm)), lr * (sigma / step_norm)};
}

// A rotating layer: turned as its rule says towards -u, onto the sphere of its radius or, with `current`, of its norm.
// `noise` is what may be wrong with u, as a part of the norm of w. What radii <= 0 and `waits` are:
// layca_fast/formulas/rotation.py `coefficients`.
LAYCA_HOST_DEVICE inline Rotation rotation(const Dots& dots, double sigma2, double lr, double radius, bool current,
                                           bool waits, int rule, double noise) {
  using std::sqrt;
  const double n = sqrt(dots.n2), size = radius < 0 ? -radius : radius;
  const bool joins = waits && radius < 0;
  if (joins && n < size) {
    // A difference of weights, which alone has noise, is the step and its rate in one.
    Rotation step = plain_step(dots.q, noise > 0 && lr > 0 ? 1 : lr, 0);
    step.radius = radius;
    return step;
  }
  const double sigma = sqrt(sigma2 > 0 ? sigma2 : 0);
  // A NaN compares false everywhere here, so a layer with a non-finite dot never moves.
  const bool moves = lr > 0 && is_finite(lr * lr) && dots.n2 > 0 && is_finite(dots.n2) &&
                     (current || n > smallest_share * size) && sigma > smallest_sine * sqrt(dots.q) &&
                     sigma > noise * n;
  if (!moves) return keep_rotation(radius);

  const double target = current || joins || radius == 0 ? n : size;
  const Turn turn = rule == Rule::HYPERBALL ? hyperball(dots, n, sigma, lr) : layca(lr);
  const double reach2 = turn.along * turn.along + turn.across * turn.across;
  const double shrink = target / sqrt(reach2);
  const double k = shrink * turn.along / n, b = -shrink * turn.across / sigma, c = dots.d / (n * n);
  // In radii, b*u is longer than the new weights where across/reach, the sine of the rotation, is more than sigma/|u|.
  const bool cancels = is_nearly_parallel(sigma2, dots.q) || sigma2 * reach2 < turn.across * turn.across * dots.q;
  const bool out_of_range = -b < smallest_float32_b || -b > largest_float32_b;
  const bool precise = cancels || out_of_range;
  return {precise ? k : k - b * c, b, c, precise ? Mode::PRECISE : Mode::LINEAR,
          radius < 0 || (radius == 0 && !current) ? target : radius};
}

}  // namespace layca
