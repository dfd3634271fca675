// What one thread of a block does: its elements of a tile measured or rotated, its part of a layer's sums.
//
// Functions of a thread's number, host and device, so that emulator.cpp can run them where there is no GPU. Every
// thread takes packs of elements. Where an array does not begin at a multiple of a pack, or a run ends within one, packs
// are read and written element by element; who takes which elements, and in which order, stays the same.
#pragma once

#include <cmath>
#include <cstdint>

#include "../base_steps.h"
#include "../batch.h"
#include "../clean.h"
#include "../layer.h"
#include "arrays.h"

namespace layca::cuda {

constexpr int block_threads = 256;

// Packs of each array that a thread of measure and rotate loads before it uses any of them, so that memory works on all
// at once.
constexpr int packs_at_once = 2;

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

// One thread's elements [begin, end) of a run; `begin` is the first of a pack. Work has `load<whole>(start, count)`,
// and `use<whole>` of what that returned.
template <bool whole, int at_once, class Work>
LAYCA_INLINE void walk(Work& work, int thread, int begin, int end) {
  constexpr int width = pack_width<typename Work::Number>, stride = block_threads * width;
  int start = begin + ((thread - begin / width) & (block_threads - 1)) * width;
  for (; start < end; start += at_once * stride) {
    typename Work::Loaded loaded[at_once];
    LAYCA_UNROLL
    for (int k = 0; k < at_once; ++k) {
      const int at = start + k * stride;
      if (at < end) loaded[k] = work.template load<whole>(at, end - at);
    }
    LAYCA_UNROLL
    for (int k = 0; k < at_once; ++k) {
      const int at = start + k * stride;
      if (at < end) work.template use<whole>(loaded[k], at, end - at);
    }
  }
}

template <int at_once, class Work>
LAYCA_INLINE void walk_run(Work& work, int thread, int length, bool aligned) {
  constexpr int width = pack_width<typename Work::Number>;
  const int whole = aligned ? length / width * width : 0;
  walk<true, at_once>(work, thread, 0, whole);
  if (whole < length) walk<false, 1>(work, thread, whole, length);
}

// What a block adds up: n2, d, q, and how many elements were not finite, exact as a float64 far beyond any tile.
struct Sums {
  double of[4];
};

// Elements of one pack; `steps_only`: without the gradient, unless the step itself is made of it.
template <class Formula, class T, bool steps_only>
struct Elements {
  static constexpr bool has_grad = Formula::reads_grad || !steps_only;
  static constexpr int room = Formula::n_states > 0 ? Formula::n_states : 1;

  // As they lie in memory.
  struct Loaded {
    typename ArraysOf<T>::Weights::Loaded param;
    typename ArraysOf<T>::Others::Loaded grad, states[room];
  };

  Pack<Element<T>> param, grad, states[room];

  template <bool whole>
  static LAYCA_INLINE Loaded load(const Run<Formula, T>& run, int start, int count) {
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

  static LAYCA_INLINE Elements decode(const Run<Formula, T>& run, const Loaded& loaded) {
    Elements elements;
    elements.param = run.param.decode(loaded.param);
    if constexpr (has_grad) elements.grad = run.grad.decode(loaded.grad);
    LAYCA_UNROLL
    for (int k = 0; k < Formula::n_states; ++k) elements.states[k] = run.states[k].decode(loaded.states[k]);
    return elements;
  }

  // The base step of element i, from states that measure has advanced.
  LAYCA_INLINE Element<T> step(const Run<Formula, T>& run, int i) const {
    Clean<Element<T>> clean;
    Element<T> clean_grad = 0, state[max_states] = {};
    if constexpr (Formula::reads_grad) clean_grad = clean.template gradient<Formula>(run.grad_scale * grad.of[i]);
    LAYCA_UNROLL
    for (int k = 0; k < Formula::n_states; ++k) state[k] = states[k].of[i];
    return clean(Formula::step(clean_grad, state, run.options));
  }
};

template <class Formula, class T>
struct Measure {
  using Number = Element<T>;
  using Read = Elements<Formula, T, false>;
  using Loaded = typename Read::Loaded;
  const Run<Formula, T> run;
  double n2, d, q;
  int non_finite;

  template <bool whole>
  LAYCA_INLINE Loaded load(int start, int count) const {
    return Read::template load<whole>(run, start, count);
  }

  template <bool whole>
  LAYCA_INLINE void use(const Loaded& loaded, int start, int count) {
    Read elements = Read::decode(run, loaded);
    LAYCA_UNROLL
    for (int i = 0; i < pack_width<Number>; ++i) {
      if (whole || i < count) advance(elements, i);
    }
    LAYCA_UNROLL
    for (int k = 0; k < Formula::n_states; ++k) {
      run.states[k].template store<whole, Reuse::AGAIN>(start, elements.states[k], count);
    }
  }

 private:
  LAYCA_INLINE void advance(Read& elements, int i) {
    using std::fma;
    Clean<Number> clean;
    Number state[max_states] = {};
    LAYCA_UNROLL
    for (int k = 0; k < Formula::n_states; ++k) state[k] = elements.states[k].of[i];
    const Number grad = clean.template gradient<Formula>(run.grad_scale * elements.grad.of[i]);
    Formula::advance(grad, state, run.options);
    LAYCA_UNROLL
    for (int k = 0; k < Formula::n_states; ++k) {
      elements.states[k].of[i] = state[k] = clean(run.states[k].stored(state[k]));
    }
    const double w = elements.param.of[i], u = clean(Formula::step(grad, state, run.options));
    n2 = fma(w, w, n2);
    d = fma(w, u, d);
    q = fma(u, u, q);
    non_finite += static_cast<int>(clean.broken);
  }
};

template <class Formula, class T>
struct Rotate {
  using Number = Element<T>;
  using Read = Elements<Formula, T, true>;
  using Loaded = typename Read::Loaded;
  const Run<Formula, T> run;
  const Rotation turn;

  template <bool whole>
  LAYCA_INLINE Loaded load(int start, int count) const {
    return Read::template load<whole>(run, start, count);
  }

  template <bool whole>
  LAYCA_INLINE void use(const Loaded& loaded, int start, int count) const {
    using std::fma;
    const Read elements = Read::decode(run, loaded);
    Pack<Number> step, turned;
    LAYCA_UNROLL
    for (int i = 0; i < pack_width<Number>; ++i) step.of[i] = elements.step(run, i);
    if (turn.mode == Mode::PRECISE) {
      LAYCA_UNROLL
      for (int i = 0; i < pack_width<Number>; ++i) {
        const double w = elements.param.of[i], u = step.of[i];
        turned.of[i] = static_cast<Number>(turn.a * w + turn.b * (u - turn.c * w));
      }
    } else {
      const Number a = static_cast<Number>(turn.a), b = static_cast<Number>(turn.b);
      LAYCA_UNROLL
      for (int i = 0; i < pack_width<Number>; ++i) turned.of[i] = fma(a, elements.param.of[i], b * step.of[i]);
    }
    run.param.template store<whole, Reuse::NEVER>(start, turned, count);
  }
};

// Sums up (u - c*w)^2.
template <class Formula, class T>
struct OrthogonalSquare {
  using Number = Element<T>;
  using Read = Elements<Formula, T, true>;
  using Loaded = typename Read::Loaded;
  const Run<Formula, T> run;
  const double c;
  double sum;

  template <bool whole>
  LAYCA_INLINE Loaded load(int start, int count) const {
    return Read::template load<whole>(run, start, count);
  }

  template <bool whole>
  LAYCA_INLINE void use(const Loaded& loaded, int, int count) {
    const Read elements = Read::decode(run, loaded);
    LAYCA_UNROLL
    for (int i = 0; i < pack_width<Number>; ++i) {
      const double w = elements.param.of[i], u = elements.step(run, i);
      if (whole || i < count) sum += (u - c * w) * (u - c * w);
    }
  }
};

// Advance the states of a thread's elements (in place) and sum them up.
template <class Formula, class T>
LAYCA_INLINE Sums measure_on_thread(const Batch& batch, const TileSpan& tile, int thread) {
  Measure<Formula, T> work{make_run<Formula, T>(batch.types, tile.tensor, tile.offset, tile.length), 0, 0, 0, 0};
  walk_run<packs_at_once>(work, thread, work.run.length, work.run.is_aligned(true));
  return {{work.n2, work.d, work.q, static_cast<double>(work.non_finite)}};
}

LAYCA_INLINE void write_partials(const Batch& batch, std::int64_t tile, const Sums& total) {
  for (int k = 0; k < 3; ++k) batch.partials[3 * tile + k] = total.of[k];
  batch.partial_counts[tile] = static_cast<std::int64_t>(total.of[3]);
}

// A thread's part of the partial sums of a layer. Without a gradient measure left the tiles alone: what stands there is
// of an earlier step.
LAYCA_INLINE Sums sum_tiles_on_thread(const Batch& batch, const LayerSpan& layer, int thread) {
  Sums sums{};
  if (!layer.tensor.has_grad()) return sums;
#ifdef __CUDACC__
#pragma unroll 4
#endif
  for (std::int64_t i = thread; i < layer.tiles; i += block_threads) {
    const std::int64_t tile = layer.first_tile + i;
    for (int k = 0; k < 3; ++k) sums.of[k] += batch.partials[3 * tile + k];
    sums.of[3] += static_cast<double>(batch.partial_counts[tile]);
  }
  return sums;
}

LAYCA_INLINE void write_dots(const Batch& batch, std::int64_t layer, const Sums& total) {
  for (int k = 0; k < 3; ++k) batch.dots[3 * layer + k] = total.of[k];
  batch.counts[layer * Count::WIDTH + Count::NON_FINITE] += static_cast<std::int64_t>(total.of[3]);
}

// Whether sigma^2 of a layer must be taken from its elements, tile by tile.
LAYCA_INLINE bool must_measure_again(const LayerSpan& layer, const Dots& dots) {
  return turns(layer.tensor) && is_nearly_parallel(orthogonal_square(dots), dots.q);
}

// A thread's part of sigma^2. One block walks the whole layer: slow for a large one, but next to no step is so nearly
// parallel.
template <class Formula, class T>
LAYCA_INLINE Sums measure_again_on_thread(const Batch& batch, const LayerSpan& layer, const Dots& dots, int thread) {
  double sum = 0;
  for (std::int64_t start = 0; start < layer.length; start += batch.tile) {
    const std::int64_t rest = layer.length - start, length = rest < batch.tile ? rest : batch.tile;
    OrthogonalSquare<Formula, T> work{make_run<Formula, T>(batch.types, layer.tensor, layer.offset + start, length),
                                      dots.d / dots.n2, 0};
    walk_run<1>(work, thread, work.run.length, work.run.is_aligned(Formula::reads_grad));
    sum += work.sum;
  }
  return {{sum, 0, 0, 0}};
}

// Apply the coefficients to a thread's elements of a tile (in place), unless the layer stays as it is.
template <class Formula, class T>
LAYCA_INLINE void rotate_on_thread(const Batch& batch, std::int64_t index, int thread) {
  const TileSpan tile = tile_span(batch, index);
  const Rotation turn = layer_rotation(batch, tile.layer);
  // KEEP is also the mode of every layer without a gradient.
  if (turn.mode == Mode::KEEP) return;
  Rotate<Formula, T> work{make_run<Formula, T>(batch.types, tile.tensor, tile.offset, tile.length), turn};
  walk_run<packs_at_once>(work, thread, work.run.length, work.run.is_aligned(Formula::reads_grad));
}

// Count the step of a tensor that has a gradient (in place) and write its options.
template <class Formula>
LAYCA_INLINE void prepare_tensor(const Batch& batch, std::int64_t tensor) {
  const TensorRow row = tensor_row(batch, tensor);
  if (!row.has_grad()) return;
  float* const count = row.pointer<float>(Column::STEP);
  *count += 1;
  Formula::prepare(*count, row.hyper + Hyper::OPTION, batch.step_options + tensor * max_options);
}

}  // namespace layca::cuda
