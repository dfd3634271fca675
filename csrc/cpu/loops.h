// The two loops over elements, once for every formula and type: measure one tile, rotate one run of elements.
//
// The compiler vectorises them for the instruction set that this file is compiled for. Everything here lies in a
// namespace of that instruction set: of functions of one name the linker keeps any one, and that may be one which the
// processor cannot run. For the same reason nothing here uses the standard library's templates.
#pragma once

#include <cstdint>
#include <cstring>

#include "../base_steps.h"
#include "../clean.h"
#include "kernels.h"
#include "sums.h"
#include "windows.h"

namespace layca::cpu::LAYCA_INSTRUCTIONS {

// What the elements of one block were: it stays in the first-level cache.
template <class Formula, class T>
struct Old {
  alignas(64) T weights[block_length];
  alignas(64) T states[Formula::n_states > 0 ? Formula::n_states : 1][block_length];
};

// Where `Clean` does something about numbers that are not finite, this only notices: what the squares of the steps do
// not show, the sum of an element's watched numbers does. (Huge numbers do the same; looking again does no harm.)
template <class T>
struct Watch {
  using Trouble = T;
  LAYCA_INLINE T operator()(T x) { return x; }
  template <class Formula>
  LAYCA_INLINE T gradient(T grad) {
    return grad;
  }
  template <class Formula, class Stored>
  LAYCA_INLINE void states(T, T*, const Stored&) {}
  template <class Formula>
  LAYCA_INLINE Trouble trouble(T grad, const T* state) const {
    return Formula::watched(grad, state);
  }
};

// How weights move by coefficients: in their own type, or in float64.
template <class T>
struct Linear {
  T a, b;
  // At a = 1 a weight without a step keeps its bits, which a denormal number would lose in any arithmetic.
  LAYCA_INLINE T operator()(T w, T u) const {
    const T moved = a * w + b * u, step = a == T(1) ? u : T(1);
    return step == T(0) ? w : moved;
  }
};

template <class T>
struct Precise {
  double a, b, c;
  LAYCA_INLINE T operator()(T weight, T step) const {
    const double w = weight, u = step;
    return static_cast<T>(a * w + b * (u - c * w));
  }
};

// What is done with an element's step u, once it is measured: nothing, or it is stored for rotate, or, where the
// coefficients do not depend on the dots, the weight w moves at once.
struct Forget {
  static constexpr bool moves = false;
  template <class T>
  LAYCA_INLINE void operator()(const TypedRun<T>&, std::int64_t, T, T) const {}
};

struct Store {
  static constexpr bool moves = false;
  template <class T>
  LAYCA_INLINE void operator()(const TypedRun<T>& run, std::int64_t i, T, T u) const {
    run.steps[i] = u;
  }
};

template <class Move>
struct MoveAtOnce {
  static constexpr bool moves = true;
  Move move;
  template <class T>
  LAYCA_INLINE void operator()(const TypedRun<T>& run, std::int64_t i, T w, T u) const {
    run.param[i] = move(w, u);
  }
};

// New states of element `start + i` in place, what it was into place i of `old`, and its part of the sums.
template <class Check, class Formula, class AnyRun, class T, class Use>
LAYCA_INLINE auto advance_element(const AnyRun& run, std::int64_t start, std::int64_t i, int lane, const Use& use,
                                  Old<Formula, T>& old, Sums& sums) {
  Check check;
  T state[max_states] = {};
  for (int k = 0; k < Formula::n_states; ++k) old.states[k][i] = state[k] = run.states[k][start + i];
  const T w = run.param[start + i];
  if (Use::moves) old.weights[i] = w;
  const T grad = check.template gradient<Formula>(run.grad_scale * run.grad[start + i]);
  Formula::advance(grad, state, run.options);
  for (int k = 0; k < Formula::n_states; ++k) state[k] = run.stored(state[k]);
  check.template states<Formula>(grad, state, [&](int, T x) { return run.stored(x); });
  for (int k = 0; k < Formula::n_states; ++k) run.states[k][start + i] = state[k];
  const T u = check(Formula::step(grad, state, run.options));
  sums.add_product(lane, w, u);
  use(run, start + i, w, u);
  return check.template trouble<Formula>(grad, state);
}

// All that for elements [first, length) from `start`, one by one: what is rare need not be fast, and takes the compiler
// a fraction of the time. The sum of their troubles.
template <class Check, class Formula, class AnyRun, class T, class Use>
LAYCA_COLD auto advance_one_by_one(const AnyRun& run, std::int64_t start, std::int64_t first, std::int64_t length,
                                   const Use& use, Old<Formula, T>& old, Sums& sums) {
  typename Check::Trouble trouble = 0;
  for (std::int64_t i = first; i < length; ++i) {
    trouble += advance_element<Check>(run, start, i, static_cast<int>(i % lanes), use, old, sums);
  }
  return trouble;
}

// The same, in vectors, for `length` elements from `start`.
template <class Check, class Formula, class AnyRun, class T, class Use>
LAYCA_INLINE auto advance_block(const AnyRun& run, std::int64_t start, std::int64_t length, const Use& use,
                                Old<Formula, T>& old, Sums& sums) {
  typename Check::Trouble trouble[lanes] = {}, total = 0;
  std::int64_t first = 0;
  for (; first + lanes <= length; first += lanes) {
#pragma omp simd
    for (int lane = 0; lane < lanes; ++lane) {
      trouble[lane] += advance_element<Check>(run, start, first + lane, lane, use, old, sums);
    }
  }
  for (int lane = 0; lane < lanes; ++lane) total += trouble[lane];
  if (first < length) total += advance_one_by_one<Check>(run, start, first, length, use, old, sums);
  return total;
}

// Puts back what advance_block has changed.
template <class Formula, class T, class Use>
void undo_block(const TypedRun<T>& run, std::int64_t start, std::int64_t length, const Use&,
                const Old<Formula, T>& old) {
  const auto bytes = static_cast<std::size_t>(length) * sizeof(T);
  for (int k = 0; k < Formula::n_states; ++k) std::memcpy(run.states[k] + start, old.states[k], bytes);
  if (Use::moves) std::memcpy(run.param + start, old.weights, bytes);
}

template <class Formula, class Window, class Use>
LAYCA_INLINE Partial advance(const Run& memory, const Use& use) {
  using T = typename Window::Element;
  Window window(memory);
  Old<Formula, T> old;
  Sums sums;
  std::int64_t non_finite = 0;
  for (std::int64_t start = 0; start < memory.length; start += block_length) {
    const std::int64_t length = memory.length - start < block_length ? memory.length - start : block_length;
    const auto run = window.open(start, length, true);
    const std::int64_t first = window.first(start);
    // Summing block by block keeps the rounding error near that of a single addition.
    Sums block_sums;
    const T watched = advance_block<Watch<T>>(run, first, length, use, old, block_sums);
    // Cleaning takes longer than watching, and is hardly ever needed.
    if (!is_finite(watched) || !block_sums.squares_are_finite()) {
      undo_block(run, first, length, use, old);
      block_sums = Sums();
      non_finite += advance_one_by_one<Clean<T>>(run, first, 0, length, use, old, block_sums);
    }
    window.close_states(start, length);
    if (Use::moves) window.close_weights(start, length);
    sums.add(block_sums);
  }
  return {sums.total(), non_finite};
}

template <class Formula, class Window>
Partial measure(const Run& run) {
  return advance<Formula, Window>(run, Forget());
}

template <class Formula, class Window>
Partial measure_and_store(const Run& run) {
  return advance<Formula, Window>(run, Store());
}

template <class Formula, class Window>
Partial step_linearly(const Run& run, double a, double b) {
  using T = typename Window::Element;
  return advance<Formula, Window>(run, MoveAtOnce<Linear<T>>{{static_cast<T>(a), static_cast<T>(b)}});
}

template <class Formula, class Window>
Partial step_precisely(const Run& run, double a, double b, double c) {
  return advance<Formula, Window>(run, MoveAtOnce<Precise<typename Window::Element>>{{a, b, c}});
}

// The base step of element i once more, from the states that measure left.
template <class Formula, class T>
LAYCA_INLINE T step_again(const TypedRun<T>& run, std::int64_t i) {
  Clean<T> clean;
  T grad = 0, state[max_states] = {};
  if (Formula::reads_grad) grad = clean.template gradient<Formula>(run.grad_scale * run.grad[i]);
  for (int k = 0; k < Formula::n_states; ++k) state[k] = run.states[k][i];
  return clean(Formula::step(grad, state, run.options));
}

// (u - c*w)^2 of element i, in float64.
template <class Formula, class T>
LAYCA_INLINE double orthogonal_square_of(const TypedRun<T>& run, std::int64_t i, double c) {
  const double w = run.param[i], u = step_again<Formula>(run, i);
  return (u - c * w) * (u - c * w);
}

// Open one window after the other, of which body(run, start, length) sees a run that begins with it.
template <class Window, class Body>
LAYCA_INLINE void in_windows(Window& window, std::int64_t whole, bool reads_grad, const Body& body) {
  for (std::int64_t start = 0; start < whole; start += Window::width) {
    const std::int64_t length = whole - start < Window::width ? whole - start : Window::width;
    body(window.open(start, length, reads_grad), start, length);
  }
}

template <class Formula, class Window>
double orthogonal_square(const Run& memory, double c) {
  Window window(memory);
  double sums[lanes] = {}, total = 0;
  in_windows(window, memory.length, Formula::reads_grad, [&](const auto run, std::int64_t, std::int64_t length) {
    std::int64_t first = 0;
    for (; first + lanes <= length; first += lanes) {
#pragma omp simd
      for (int lane = 0; lane < lanes; ++lane) sums[lane] += orthogonal_square_of<Formula>(run, first + lane, c);
    }
    for (int lane = 0; first + lane < length; ++lane) {
      sums[lane] += orthogonal_square_of<Formula>(run, first + lane, c);
    }
  });
  for (const double sum : sums) total += sum;
  return total;
}

// The steps that measure left.
template <class Formula>
struct Again {
  static constexpr bool reads_grad = Formula::reads_grad;
  template <class T>
  LAYCA_INLINE T operator()(const TypedRun<T>& run, std::int64_t i) const {
    return step_again<Formula>(run, i);
  }
};

struct Stored {
  static constexpr bool reads_grad = false;
  template <class T>
  LAYCA_INLINE T operator()(const TypedRun<T>& run, std::int64_t i) const {
    return run.steps[i];
  }
};

template <class Window, class Steps, class Move>
LAYCA_INLINE void move_weights(const Run& memory, const Steps& step_of, const Move& move) {
  Window window(memory);
  in_windows(window, memory.length, Steps::reads_grad, [&](const auto run, std::int64_t start, std::int64_t length) {
#pragma omp simd
    for (std::int64_t i = 0; i < length; ++i) run.param[i] = move(run.param[i], step_of(run, i));
    window.close_weights(start, length);
  });
}

template <class Steps, class Window>
void rotate(const Run& run, double a, double b) {
  using T = typename Window::Element;
  move_weights<Window>(run, Steps(), Linear<T>{static_cast<T>(a), static_cast<T>(b)});
}

template <class Steps, class Window>
void rotate_precisely(const Run& run, double a, double b, double c) {
  move_weights<Window>(run, Steps(), Precise<typename Window::Element>{a, b, c});
}

}  // namespace layca::cpu::LAYCA_INSTRUCTIONS
