// The run of elements that one tile is: where its arrays lie, and what its packs hold once they are read.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../batch.h"
#include "../clean.h"
#include "arrays.h"

namespace layca::cuda {

// Where the elements of one tile lie, and what the formula is told about them.
template <class Formula, class T>
struct Run {
  typename ArraysOf<T>::Weights param;
  typename ArraysOf<T>::Others grad;
  typename ArraysOf<T>::Others states[max_states];
  Element<T> options[max_options];
  Element<T> grad_scale;
  int length;

  LAYCA_INLINE bool is_aligned(bool with_grad) const {
    std::uintptr_t bits = param.alignment();
    if (with_grad) bits |= grad.alignment();
    LAYCA_UNROLL
    for (int k = 0; k < Formula::n_states; ++k) bits |= states[k].alignment();
    return bits % pack_bytes == 0;
  }
};

template <class Formula, class T>
LAYCA_INLINE Run<Formula, T> make_run(const Types& types, const TensorRow& tensor, std::int64_t offset,
                                      std::int64_t length) {
  using Weights = typename ArraysOf<T>::Weights;
  using Others = typename ArraysOf<T>::Others;
  Run<Formula, T> run;
  run.param = Weights::weights(tensor, types.param, offset);
  run.grad = Others::at(tensor, Column::GRAD, types.grad, offset);
  LAYCA_UNROLL
  for (int k = 0; k < Formula::n_states; ++k) {
    run.states[k] = Others::at(tensor, Column::STATE + k, types.state, offset);
  }
  LAYCA_UNROLL
  for (int k = 0; k < max_options; ++k) run.options[k] = static_cast<Element<T>>(tensor.options[k]);
  run.grad_scale = static_cast<Element<T>>(tensor.hyper[Hyper::GRAD_SCALE]);
  run.length = static_cast<int>(length);
  return run;
}

// Elements of one pack, with `Weights` and `Others` as what a pack of each is held in.
template <class Formula, class Weights, class Others>
struct Elements {
  Weights param;
  Others grad, states[Formula::n_states > 0 ? Formula::n_states : 1];
};

// How they are read; `steps_only`: without the gradient, unless the step itself is made of it.
template <class Formula, class T, bool steps_only>
struct Reader {
  static constexpr bool has_grad = Formula::reads_grad || !steps_only;
  using Number = Element<T>;
  // As they lie in memory.
  using Loaded = Elements<Formula, typename ArraysOf<T>::Weights::Loaded, typename ArraysOf<T>::Others::Loaded>;
  using Decoded = Elements<Formula, Pack<Number>, Pack<Number>>;

  const Run<Formula, T> run;

  template <bool whole>
  LAYCA_INLINE Loaded load(int start, int count) const {
    // rotate is the last to read; measure leaves to it all but a gradient that it does without.
    constexpr Reuse reuse = steps_only ? Reuse::NEVER : Reuse::AGAIN;
    constexpr Reuse grad_reuse = Formula::reads_grad ? reuse : Reuse::NEVER;
    Loaded loaded;
    loaded.param = run.param.template load<whole, reuse>(start, count);
    if constexpr (has_grad) loaded.grad = run.grad.template load<whole, grad_reuse>(start, count);
    LAYCA_UNROLL
    for (int k = 0; k < Formula::n_states; ++k) {
      loaded.states[k] = run.states[k].template load<whole, reuse>(start, count);
    }
    return loaded;
  }

  // In place where that changes nothing: a copy would cost registers.
  LAYCA_INLINE decltype(auto) decode(Loaded& loaded) const {
    if constexpr (std::is_same_v<Loaded, Decoded>) {
      return (loaded);
    } else {
      Decoded decoded;
      decoded.param = run.param.decode(loaded.param);
      if constexpr (has_grad) decoded.grad = run.grad.decode(loaded.grad);
      LAYCA_UNROLL
      for (int k = 0; k < Formula::n_states; ++k) decoded.states[k] = run.states[k].decode(loaded.states[k]);
      return decoded;
    }
  }

  // The base step of element i, from states that measure has advanced.
  LAYCA_INLINE Number step(const Decoded& elements, int i) const {
    Clean<Number> clean;
    Number clean_grad = 0, state[max_states] = {};
    if constexpr (Formula::reads_grad) {
      clean_grad = clean.template gradient<Formula>(run.grad_scale * elements.grad.of[i]);
    }
    LAYCA_UNROLL
    for (int k = 0; k < Formula::n_states; ++k) state[k] = elements.states[k].of[i];
    return clean(Formula::step(clean_grad, state, run.options));
  }
};

}  // namespace layca::cuda
