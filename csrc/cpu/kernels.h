// The two loops over elements, once for every formula and type: measure one tile, rotate one run of elements.
//
// Both are vectorised by the compiler. Where it can, it compiles each for several instruction sets, and the loader
// picks the best that the processor has.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../base_steps.h"
#include "../batch.h"

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

// An integer as wide as T: vector loops count in lanes of one width.
template <class T>
using Counter = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;

// A piece of a run on its way: new states and base steps, before anything is stored. It stays in the first-level cache.
constexpr std::int64_t block_length = 512;

template <class Formula, class T>
struct Block {
  alignas(64) T step[block_length];
  alignas(64) T states[max_states][block_length];
};

// What is done about numbers that are not finite. `Watch` only notices them, at one addition each: x * 0 is 0 where x
// is finite, else NaN. `Clean` takes 0 in their place.
template <class T>
struct Watch {
  T trouble = 0;
  LAYCA_INLINE T operator()(T x) {
    trouble += x * T(0);
    return x;
  }
};

template <class T>
struct Clean {
  Counter<T> trouble = 0;
  LAYCA_INLINE T operator()(T x) {
    const Counter<T> broken = is_finite(x) ? 0 : 1;
    trouble |= broken;
    return broken == 0 ? x : T(0);
  }
};

// New states and base step of element `start + i`, into place i of the block.
template <class Check, class Formula, class T>
LAYCA_INLINE auto advance_element(const Run<T>& run, std::int64_t start, std::int64_t i, Block<Formula, T>& block) {
  Check check;
  T state[max_states] = {};
  for (int k = 0; k < Formula::n_states; ++k) state[k] = run.states[k][start + i];
  const T grad = check(run.grad_scale * run.grad[start + i]);
  Formula::advance(grad, state, run.options);
  for (int k = 0; k < Formula::n_states; ++k) block.states[k][i] = state[k] = check(state[k]);
  block.step[i] = check(Formula::step(grad, state, run.options));
  return check.trouble;
}

// New states and base steps of `length` elements from `start`; the sum of their troubles.
template <class Check, class Formula, class T>
LAYCA_INLINE auto advance_block(const Run<T>& run, std::int64_t start, std::int64_t length, Block<Formula, T>& block) {
  decltype(Check::trouble) trouble = 0;
#pragma omp simd reduction(+ : trouble)
  for (std::int64_t i = 0; i < length; ++i) trouble += advance_element<Check>(run, start, i, block);
  return trouble;
}

// Sums over elements, a lane for each residue of their index, so that every instruction set adds in the same order.
struct Sums {
  static constexpr int lanes = 16;
  double n2[lanes] = {}, d[lanes] = {}, q[lanes] = {};

  LAYCA_INLINE void add_product(int lane, double w, double u) {
    n2[lane] += w * w;
    d[lane] += w * u;
    q[lane] += u * u;
  }

  template <class T>
  LAYCA_INLINE void add_products(const T* param, const T* step, std::int64_t length) {
    std::int64_t first = 0;
    for (; first + lanes <= length; first += lanes) {
#pragma omp simd
      for (int lane = 0; lane < lanes; ++lane) add_product(lane, param[first + lane], step[first + lane]);
    }
    for (int lane = 0; first + lane < length; ++lane) add_product(lane, param[first + lane], step[first + lane]);
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

// Advance the states of one tile (modified in place) and sum up its dots, products and sums in float64.
template <class Formula, class T>
LAYCA_CLONES Partial measure_run(const Run<T>& arguments) {
  const Run<T> run = arguments;
  Block<Formula, T> block;
  Sums sums;
  std::int64_t non_finite = 0;
  for (std::int64_t start = 0; start < run.length; start += block_length) {
    const std::int64_t length = run.length - start < block_length ? run.length - start : block_length;
    // Cleaning takes three times as long as noticing, and is hardly ever needed.
    if (advance_block<Watch<T>>(run, start, length, block) != 0) {
      non_finite += advance_block<Clean<T>>(run, start, length, block);
    }
    for (int k = 0; k < Formula::n_states; ++k) {
      std::memcpy(run.states[k] + start, block.states[k], static_cast<std::size_t>(length) * sizeof(T));
    }
    // Summing block by block keeps rounding errors near those of a single addition.
    Sums block_sums;
    block_sums.add_products(run.param + start, block.step, length);
    sums.add(block_sums);
  }
  return {sums.total(), non_finite};
}

// The base step of element i once more, from the states that measure left.
template <class Formula, class T>
LAYCA_INLINE T step_again(const Run<T>& run, std::int64_t i) {
  Clean<T> clean;
  T grad = 0, state[max_states] = {};
  if (Formula::reads_grad) grad = clean(run.grad_scale * run.grad[i]);
  for (int k = 0; k < Formula::n_states; ++k) state[k] = run.states[k][i];
  return clean(Formula::step(grad, state, run.options));
}

// The sum of (u - c*w)^2, in float64, a lane for each residue of the index.
template <class Formula, class T>
LAYCA_CLONES double orthogonal_square_of_run(const Run<T>& arguments, double c) {
  constexpr int lanes = Sums::lanes;
  const Run<T> run = arguments;
  double sums[lanes] = {};
  for (std::int64_t first = 0; first < run.length; first += lanes) {
    const int length = static_cast<int>(run.length - first < lanes ? run.length - first : lanes);
    for (int lane = 0; lane < length; ++lane) {
      const double w = run.param[first + lane], u = step_again<Formula>(run, first + lane);
      sums[lane] += (u - c * w) * (u - c * w);
    }
  }
  double total = 0;
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
