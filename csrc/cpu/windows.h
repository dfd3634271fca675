// Where the loops find the numbers of a run: in place where memory holds the type that they compute in, otherwise, of
// 16-bit parameters, in buffers of float32 that hold one block at a time and stay in the first-level cache.
//
// So no loop is compiled for each of the combinations of types that parameters, gradients and states may have. A window
// is opened on a block, and closed on what the loop has changed of it.
#pragma once

#include <cstdint>

#include "../halves.h"
#include "kernels.h"

namespace layca::cpu::LAYCA_INSTRUCTIONS {

// Elements that are advanced together, between two looks for trouble.
constexpr std::int64_t block_length = 1024;

// A run with its types.
template <class T>
struct TypedRun {
  T* param;
  const T* grad;
  T* states[max_states];
  T* steps;
  T options[max_options];
  T grad_scale;

  explicit TypedRun(const Run& run)
      : param(static_cast<T*>(run.param)),
        grad(static_cast<const T*>(run.grad)),
        steps(static_cast<T*>(run.steps)),
        grad_scale(static_cast<T>(run.grad_scale)) {
    for (int k = 0; k < max_states; ++k) states[k] = static_cast<T*>(run.states[k]);
    for (int k = 0; k < max_options; ++k) options[k] = static_cast<T>(run.options[k]);
  }

  // What memory keeps of a state.
  LAYCA_INLINE T stored(T state) const { return state; }
};

template <class T>
class InPlace {
 public:
  using Element = T;
  // One window is as wide as the run.
  static constexpr std::int64_t width = INT64_MAX / 2;

  explicit InPlace(const Run& run) : run_(run) {}

  // The run for the elements from `start`, the first of which lies at `first(start)`.
  LAYCA_INLINE TypedRun<T> open(std::int64_t, std::int64_t, bool) const { return run_; }
  static LAYCA_INLINE std::int64_t first(std::int64_t start) { return start; }
  LAYCA_INLINE void close_states(std::int64_t, std::int64_t) const {}
  LAYCA_INLINE void close_weights(std::int64_t, std::int64_t) const {}

 private:
  TypedRun<T> run_;
};

// One loop for every conversion, and no copy of it in every kernel.
template <class Half>
LAYCA_NOINLINE void widen(const std::uint16_t* from, float* to, std::int64_t length) {
#pragma omp simd
  for (std::int64_t i = 0; i < length; ++i) to[i] = Half::widen(from[i]);
}

template <class Half>
LAYCA_NOINLINE void narrow(const float* from, std::uint16_t* to, std::int64_t length) {
#pragma omp simd
  for (std::int64_t i = 0; i < length; ++i) to[i] = Half::narrow(from[i]);
}

template <class Half>
LAYCA_NOINLINE void join(const std::uint16_t* from, const std::int16_t* remainder, float* to, std::int64_t length) {
#pragma omp simd
  for (std::int64_t i = 0; i < length; ++i) to[i] = Half::join(from[i], remainder[i]);
}

template <class Half>
LAYCA_NOINLINE void split(const float* from, std::uint16_t* to, std::int16_t* remainder, std::int64_t length) {
#pragma omp simd
  for (std::int64_t i = 0; i < length; ++i) {
    const float x = from[i];
    const std::uint16_t upper = Half::upper(x);
    to[i] = upper;
    remainder[i] = Half::remainder(x, upper);
  }
}

struct BufferedRun : TypedRun<float> {
  std::uint32_t bias, odd, mask;

  explicit BufferedRun(const Run& run)
      : TypedRun<float>(run),
        bias(run.types.state == Type::BFLOAT16 ? 0x7FFF : 0),
        odd(run.types.state == Type::BFLOAT16 ? 1 : 0),
        mask(run.types.state == Type::BFLOAT16 ? 0xFFFF0000 : 0xFFFFFFFF) {}

  // Rounded at once where memory holds a bfloat16, so that measure makes its step of what rotate will find.
  LAYCA_INLINE float stored(float state) const {
    const std::uint32_t bits = bits_of(state), rounded = (bits + bias + ((bits >> 16) & odd)) & mask;
    return state == state ? float_of(rounded) : state;
  }
};

template <int n_states>
class Buffered {
 public:
  using Element = float;
  static constexpr std::int64_t width = block_length;

  explicit Buffered(const Run& run) : memory_(run), run_(run) { run_.param = param_; }

  LAYCA_INLINE BufferedRun open(std::int64_t start, std::int64_t length, bool reads_grad) {
    const bool is_bfloat16 = memory_.types.param == Type::BFLOAT16;
    const std::uint16_t* const param = halves(memory_.param) + start;
    if (const std::int16_t* const remainder = memory_.remainder) {
      is_bfloat16 ? join<Bfloat16>(param, remainder + start, param_, length)
                  : join<Float16>(param, remainder + start, param_, length);
    } else {
      is_bfloat16 ? widen<Bfloat16>(param, param_, length) : widen<Float16>(param, param_, length);
    }
    run_.steps = static_cast<float*>(memory_.steps) + (memory_.steps ? start : 0);
    if (reads_grad) run_.grad = readable(memory_.types.grad, memory_.grad, start, length, grad_);
    for (int k = 0; k < n_states; ++k) {
      // Its own buffer, or memory, which may be written to.
      run_.states[k] = const_cast<float*>(readable(memory_.types.state, memory_.states[k], start, length, states_[k]));
    }
    return run_;
  }

  static LAYCA_INLINE std::int64_t first(std::int64_t) { return 0; }

  LAYCA_INLINE void close_states(std::int64_t start, std::int64_t length) const {
    if (memory_.types.state == Type::FLOAT32) return;
    for (int k = 0; k < n_states; ++k) {
      narrow<Bfloat16>(states_[k], halves(memory_.states[k]) + start, length);
    }
  }

  LAYCA_INLINE void close_weights(std::int64_t start, std::int64_t length) const {
    const bool is_bfloat16 = memory_.types.param == Type::BFLOAT16;
    std::uint16_t* const param = halves(memory_.param) + start;
    if (std::int16_t* const remainder = memory_.remainder) {
      is_bfloat16 ? split<Bfloat16>(param_, param, remainder + start, length)
                  : split<Float16>(param_, param, remainder + start, length);
    } else {
      is_bfloat16 ? narrow<Bfloat16>(param_, param, length) : narrow<Float16>(param_, param, length);
    }
  }

 private:
  static LAYCA_INLINE std::uint16_t* halves(void* memory) { return static_cast<std::uint16_t*>(memory); }

  // Elements from `start` as float32: where they lie, or in `buffer`.
  static LAYCA_INLINE const float* readable(Type type, const void* memory, std::int64_t start, std::int64_t length,
                                            float* buffer) {
    const auto* const from = static_cast<const std::uint16_t*>(memory);
    if (type == Type::FLOAT32) return static_cast<const float*>(memory) + start;
    type == Type::BFLOAT16 ? widen<Bfloat16>(from + start, buffer, length)
                           : widen<Float16>(from + start, buffer, length);
    return buffer;
  }

  const Run& memory_;
  BufferedRun run_;
  alignas(64) float param_[block_length];
  alignas(64) float grad_[block_length];
  alignas(64) float states_[n_states > 0 ? n_states : 1][block_length];
};

}  // namespace layca::cpu::LAYCA_INSTRUCTIONS
