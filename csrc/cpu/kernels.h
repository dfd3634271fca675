// The two loops over elements, once for every formula and type: measure one tile, rotate one run of elements.
//
// Both are vectorised by the compiler. Where it can, it compiles each for several instruction sets, and the loader
// picks the best that the processor has.
#pragma once

#include <cstdint>
#include <cstring>

#include "../base_steps.h"
#include "../batch.h"
#include "../clean.h"

#ifdef LAYCA_TARGET_CLONES
#define LAYCA_CLONES __attribute__((noinline, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LAYCA_CLONES
#endif

namespace layca::cpu {

// Where the elements of one run lie, and what the formula is told about them.
template <class T>
struct Run {
  T* param;
  const T* grad;
  T* states[max_states];
  T options[max_options];
  T grad_scale;
  std::int64_t length;
};

struct Partial {
  Dots dots;
  std::int64_t non_finite;
};

// Elements that are advanced together before anything is stored. Their new states stay in the first-level cache.
constexpr std::int64_t block_length = 1024;

template <class Formula, class T>
struct NewStates {
  alignas(64) T of[Formula::n_states > 0 ? Formula::n_states : 1][block_length];
};

// Where `Clean` does something about numbers that are not finite, this only notices: the sum of an element's numbers is
// not finite if one of them is (or if they are huge, in which case looking again does no harm).
template <class T>
struct Watch {
  using Trouble = T;
  T sum = 0;
  LAYCA_INLINE T operator()(T x) {
    sum += x;
    return x;
  }
  template <class Formula>
  LAYCA_INLINE T gradient(T grad) {
    (*this)(Formula::witness(grad));
    return grad;
  }
  LAYCA_INLINE Trouble trouble() const { return sum * T(0); }
};

// A lane for each residue of the elements' index, so that every instruction set adds in the same order.
constexpr int lanes = 8;

// The three dots, products and sums in float64.
struct Sums {
  double n2[lanes] = {}, d[lanes] = {}, q[lanes] = {};

  LAYCA_INLINE void add_product(int lane, double w, double u) {
    n2[lane] += w * w;
    d[lane] += w * u;
    q[lane] += u * u;
  }

  LAYCA_INLINE void add(const Sums& other) {
#pragma omp simd
    for (int lane = 0; lane < lanes; ++lane) {
      n2[lane] += other.n2[lane];
      d[lane] += other.d[lane];
      q[lane] += other.q[lane];
    }
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

// New states of element `start + i`, into place i of `states`, and its part of the sums.
template <class Check, class Formula, class T>
LAYCA_INLINE auto advance_element(const Run<T>& run, std::int64_t start, std::int64_t i, int lane,
                                  NewStates<Formula, T>& states, Sums& sums) {
  Check check;
  T state[max_states] = {};
  for (int k = 0; k < Formula::n_states; ++k) state[k] = run.states[k][start + i];
  const T grad = check.template gradient<Formula>(run.grad_scale * run.grad[start + i]);
  Formula::advance(grad, state, run.options);
  for (int k = 0; k < Formula::n_states; ++k) states.of[k][i] = state[k] = check(state[k]);
  sums.add_product(lane, run.param[start + i], check(Formula::step(grad, state, run.options)));
  return check.trouble();
}

// New states and sums of `length` elements from `start`; the sum of the elements' troubles.
template <class Check, class Formula, class T>
LAYCA_INLINE auto advance_block(const Run<T>& run, std::int64_t start, std::int64_t length,
                                NewStates<Formula, T>& states, Sums& sums) {
  typename Check::Trouble trouble[lanes] = {}, total = 0;
  std::int64_t first = 0;
  for (; first + lanes <= length; first += lanes) {
#pragma omp simd
    for (int lane = 0; lane < lanes; ++lane) {
      trouble[lane] += advance_element<Check>(run, start, first + lane, lane, states, sums);
    }
  }
  for (int lane = 0; first + lane < length; ++lane) {
    trouble[lane] += advance_element<Check>(run, start, first + lane, lane, states, sums);
  }
  for (int lane = 0; lane < lanes; ++lane) total += trouble[lane];
  return total;
}

// Advance the states of one tile (modified in place) and sum up its dots.
template <class Formula, class T>
LAYCA_CLONES Partial measure_run(const Run<T>& arguments) {
  const Run<T> run = arguments;
  NewStates<Formula, T> states;
  Sums sums;
  std::int64_t non_finite = 0;
  for (std::int64_t start = 0; start < run.length; start += block_length) {
    const std::int64_t length = run.length - start < block_length ? run.length - start : block_length;
    // Summing block by block keeps the rounding error near that of a single addition.
    Sums block_sums;
    // Cleaning takes longer than watching, and is hardly ever needed.
    if (advance_block<Watch<T>>(run, start, length, states, block_sums) != 0) {
      block_sums = Sums();
      non_finite += advance_block<Clean<T>>(run, start, length, states, block_sums);
    }
    for (int k = 0; k < Formula::n_states; ++k) {
      std::memcpy(run.states[k] + start, states.of[k], static_cast<std::size_t>(length) * sizeof(T));
    }
    sums.add(block_sums);
  }
  return {sums.total(), non_finite};
}

// The base step of element i once more, from the states that measure left.
template <class Formula, class T>
LAYCA_INLINE T step_again(const Run<T>& run, std::int64_t i) {
  Clean<T> clean;
  T grad = 0, state[max_states] = {};
  if (Formula::reads_grad) grad = clean.template gradient<Formula>(run.grad_scale * run.grad[i]);
  for (int k = 0; k < Formula::n_states; ++k) state[k] = run.states[k][i];
  return clean(Formula::step(grad, state, run.options));
}

// (u - c*w)^2 of element i, in float64.
template <class Formula, class T>
LAYCA_INLINE double orthogonal_square_of(const Run<T>& run, std::int64_t i, double c) {
  const double w = run.param[i], u = step_again<Formula>(run, i);
  return (u - c * w) * (u - c * w);
}

// The sum of (u - c*w)^2 over a run.
template <class Formula, class T>
LAYCA_CLONES double orthogonal_square_of_run(const Run<T>& arguments, double c) {
  const Run<T> run = arguments;
  double sums[lanes] = {}, total = 0;
  std::int64_t first = 0;
  for (; first + lanes <= run.length; first += lanes) {
#pragma omp simd
    for (int lane = 0; lane < lanes; ++lane) sums[lane] += orthogonal_square_of<Formula>(run, first + lane, c);
  }
  for (int lane = 0; first + lane < run.length; ++lane) {
    sums[lane] += orthogonal_square_of<Formula>(run, first + lane, c);
  }
  for (const double sum : sums) total += sum;
  return total;
}

// w = a*w + b*u in T (modified in place).
template <class Formula, class T>
LAYCA_CLONES void rotate_run(const Run<T>& arguments, T a, T b) {
  const Run<T> run = arguments;
#pragma omp simd
  for (std::int64_t i = 0; i < run.length; ++i) {
    run.param[i] = a * run.param[i] + b * step_again<Formula>(run, i);
  }
}

// w = a*w + b*(u - c*w) in float64, rounded to T (modified in place).
template <class Formula, class T>
LAYCA_CLONES void rotate_run_precisely(const Run<T>& arguments, double a, double b, double c) {
  const Run<T> run = arguments;
#pragma omp simd
  for (std::int64_t i = 0; i < run.length; ++i) {
    const double w = run.param[i], u = step_again<Formula>(run, i);
    run.param[i] = static_cast<T>(a * w + b * (u - c * w));
  }
}

}  // namespace layca::cpu
