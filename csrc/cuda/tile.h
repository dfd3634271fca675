// What one thread of a block does: its elements of a tile measured or rotated, its part of a layer's sums.
//
// Functions of a thread's number. Every thread takes packs of elements. Where an array does not begin at a multiple of
// a pack, or a run ends within one, packs are read and written element by element; who takes which elements, and in
// which order, stays the same.
#pragma once

#include <cmath>
#include <cstdint>

#include "../base_steps.h"
#include "../batch.h"
#include "../clean.h"
#include "../layer.h"
#include "run.h"

namespace layca::cuda {

constexpr int block_threads = 256;

// Packs of each array that a thread of measure and rotate loads before it uses any of them, so that memory works on all
// at once.
constexpr int packs_at_once = 2;

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

template <class Formula, class T>
struct Measure : Reader<Formula, T, false> {
  using Read = Reader<Formula, T, false>;
  using Read::run;
  using typename Read::Decoded;
  using typename Read::Loaded;
  using typename Read::Number;
  double n2 = 0, d = 0, q = 0;
  int non_finite = 0;

  LAYCA_INLINE explicit Measure(const Run<Formula, T>& of) : Read{of} {}

  template <bool whole>
  LAYCA_INLINE void use(Loaded& loaded, int start, int count) {
    auto&& elements = Read::decode(loaded);
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
  LAYCA_INLINE void advance(Decoded& elements, int i) {
    using std::fma;
    Clean<Number> clean;
    Number state[max_states] = {};
    LAYCA_UNROLL
    for (int k = 0; k < Formula::n_states; ++k) state[k] = elements.states[k].of[i];
    const Number grad = clean.template gradient<Formula>(run.grad_scale * elements.grad.of[i]);
    Formula::advance(grad, state, run.options);
    LAYCA_UNROLL
    for (int k = 0; k < Formula::n_states; ++k) state[k] = run.states[k].stored(state[k]);
    clean.template states<Formula>(grad, state, [&](int k, Number x) { return run.states[k].stored(x); });
    LAYCA_UNROLL
    for (int k = 0; k < Formula::n_states; ++k) elements.states[k].of[i] = state[k];
    const double w = elements.param.of[i], u = clean(Formula::step(grad, state, run.options));
    n2 = fma(w, w, n2);
    d = fma(w, u, d);
    q = fma(u, u, q);
    non_finite += static_cast<int>(clean.broken);
  }
};

template <class Formula, class T>
struct Rotate : Reader<Formula, T, true> {
  using Read = Reader<Formula, T, true>;
  using Read::run;
  using typename Read::Loaded;
  using typename Read::Number;
  const Rotation turn;

  LAYCA_INLINE Rotate(const Run<Formula, T>& of, const Rotation& by) : Read{of}, turn(by) {}

  template <bool whole>
  LAYCA_INLINE void use(Loaded& loaded, int start, int count) const {
    using std::fma;
    auto&& elements = Read::decode(loaded);
    Pack<Number> step, turned;
    LAYCA_UNROLL
    for (int i = 0; i < pack_width<Number>; ++i) step.of[i] = Read::step(elements, i);
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
struct OrthogonalSquare : Reader<Formula, T, true> {
  using Read = Reader<Formula, T, true>;
  using typename Read::Loaded;
  using typename Read::Number;
  const double c;
  double sum = 0;

  LAYCA_INLINE OrthogonalSquare(const Run<Formula, T>& of, double part) : Read{of}, c(part) {}

  template <bool whole>
  LAYCA_INLINE void use(Loaded& loaded, int, int count) {
    auto&& elements = Read::decode(loaded);
    LAYCA_UNROLL
    for (int i = 0; i < pack_width<Number>; ++i) {
      const double w = elements.param.of[i], u = Read::step(elements, i);
      if (whole || i < count) sum += (u - c * w) * (u - c * w);
    }
  }
};

// Advance the states of a thread's elements (in place) and sum them up.
template <class Formula, class T>
LAYCA_INLINE Sums measure_on_thread(const Batch& batch, const TileSpan& tile, int thread) {
  Measure<Formula, T> work(make_run<Formula, T>(batch.types, tile.tensor, tile.offset, tile.length));
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
  return turns_whole(layer.tensor) && is_nearly_parallel(orthogonal_square(dots), dots.q);
}

// A thread's part of sigma^2. One block walks the whole layer: slow for a large one, but next to no step is so nearly
// parallel.
template <class Formula, class T>
LAYCA_INLINE Sums measure_again_on_thread(const Batch& batch, const LayerSpan& layer, const Dots& dots, int thread) {
  double sum = 0;
  for (std::int64_t start = 0; start < layer.length; start += batch.tile) {
    const std::int64_t rest = layer.length - start, length = rest < batch.tile ? rest : batch.tile;
    OrthogonalSquare<Formula, T> work(make_run<Formula, T>(batch.types, layer.tensor, layer.offset + start, length),
                                      dots.d / dots.n2);
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
  Rotate<Formula, T> work(make_run<Formula, T>(batch.types, tile.tensor, tile.offset, tile.length), turn);
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
